"""The byte table against each family's own decoder."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conftest import CORPUS, trained_tokenizer
from myserve.engine.token_bytes import TokenBytes, byte_level_alphabet


def test_byte_level_tokens_join_to_the_text() -> None:
    table = TokenBytes(trained_tokenizer(), 400)
    for text in [*CORPUS, "Zß🦄你", "\x00\xff", "👩‍👩‍👧‍👦"]:
        token_ids = trained_tokenizer().encode(text, add_special_tokens=False)
        assert b"".join(table[i] for i in token_ids) == text.encode()


def test_the_alphabet_covers_every_byte_once() -> None:
    assert sorted(byte_level_alphabet().values()) == list(range(256))


def test_ids_beyond_the_tokenizer_are_empty() -> None:
    assert TokenBytes(trained_tokenizer(), 400)[399] == b""


def test_special_ids_are_known() -> None:
    table = TokenBytes(trained_tokenizer(), 384)
    assert table.special_ids == {0, 1, 2}
    assert table.text([1, 2]) == ""
    assert table.text([1], skip_special_tokens=False) == "<|im_start|>"


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama 2's: `▁` for a space, bytes in angle brackets for what the vocabulary lacks."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def test_sentencepiece_keeps_its_spaces_and_its_bytes() -> None:
    tokenizer = sentencepiece_like()
    table = TokenBytes(tokenizer, len(tokenizer))
    text = "Hello, hello world! Ж"
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(table[i] for i in token_ids) == (" " + text).encode()
