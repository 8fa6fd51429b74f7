"""Tokenizers of every kind that models have, trained here in milliseconds: nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, ClassVar

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

SCRIPTS = {
    "Latin": "The quick brown fox doesn't jump over the lazy dog; it's 3.14 o'clock.",
    "accents": "naïve Übergröße señor čaj đem façade Łódź",
    "Greek": "Η γρήγορη καφέ αλεπού",
    "Cyrillic": "Быстрая коричневая лиса, данные",
    "Arabic": "الثعلب البني السريع",
    "Hebrew": "השועל החום המהיר",
    "Devanagari": "तेज़ भूरी लोमड़ी",
    "Thai": "สุนัขจิ้งจอกสีน้ำตาล",
    "Chinese": "你好，世界。敏捷的棕色狐狸",
    "Japanese": "素早い茶色の狐がジャンプする",
    "Korean": "빠른 갈색 여우",
    "emoji": "🦄 👩‍👩‍👧‍👦 🇩🇪 e\u0301",
    "code": 'def f(x):\n    return {"a": [1, 2]}\t# done\n\n  end',
}
CORPUS = [
    *SCRIPTS.values(),
    "user assistant system tool hello world one two three",
    "the dog, the fox . the end",
] * 2
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _fast(tokenizer: Tokenizer, **named: Any) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.chat_template = CHAT
    return fast


def _chat_named() -> dict[str, Any]:
    return {
        "bos_token": SPECIALS[0],
        "eos_token": SPECIALS[2],
        "pad_token": SPECIALS[0],
        "additional_special_tokens": [SPECIALS[1]],
    }


def _edited(tokenizer: Tokenizer, edit: Callable[[dict[str, Any]], None]) -> Tokenizer:
    written = json.loads(tokenizer.to_str())
    edit(written)
    return Tokenizer.from_str(json.dumps(written))


def _byte_level_backend(vocab_size: int = 400, *, prefix_space: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_level() -> PreTrainedTokenizerFast:
    """As Qwen's, Llama 3's and GPT-2's."""
    return _fast(_byte_level_backend(), **_chat_named())


def byte_level_prefix_space() -> PreTrainedTokenizerFast:
    """As RoBERTa's and Falcon's older ones: a space is put before a text."""
    return _fast(_byte_level_backend(prefix_space=True), **_chat_named())


def tekken() -> PreTrainedTokenizerFast:
    """As tiktoken's and Mistral's tekken: cut by a regular expression, then byte-level without another cut."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    cut = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(cut, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel()])
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _fast(tokenizer, **_chat_named())


def holes() -> PreTrainedTokenizerFast:
    """A pruned vocabulary: six ids are gone, and added ones stand behind a gap."""

    def prune(written: dict[str, Any]) -> None:
        vocab = written["model"]["vocab"]
        gone = {token for token, i in vocab.items() if 300 <= i < 306}
        for token in gone:
            del vocab[token]
        merges = [m if isinstance(m, list) else m.split(" ") for m in written["model"]["merges"]]
        written["model"]["merges"] = [
            m for m in merges if not gone & {*m, "".join(m)} and "".join(m) in vocab
        ]
        for token_id, content, special in (
            (410, "<|fim|>", True),
            (411, "<think>", False),
            (413, "čaj", False),
        ):
            vocab[content] = token_id  # or `tokenizers` would number it anew
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            written["added_tokens"].append({"id": token_id, "content": content, "special": special, **flags})

    return _fast(_edited(_byte_level_backend(), prune), **_chat_named())


def added_tokens() -> PreTrainedTokenizerFast:
    """Byte-level, with added tokens of every kind: letters of the byte alphabet, strips, normalized."""
    fast = byte_level()
    fast.add_tokens(
        [
            *(
                AddedToken(word, normalized=False)
                for word in ("<résumé>", "đem", "čaj", "naïveté", "¡ñ!", "Ġx")
            ),
            AddedToken("<left>", lstrip=True, normalized=False),
            AddedToken("<right>", rstrip=True, normalized=False),
            AddedToken("<word>", single_word=True, normalized=True),
            AddedToken("<ünï>", normalized=True),
            AddedToken("    ", normalized=False),
        ]
    )
    fast.add_tokens([AddedToken("<|tool|>", special=True, rstrip=True)], special_tokens=True)
    return fast


def _sentencepiece_decoder(*, strips: bool) -> decoders.Decoder:
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strips else parts)


def _sentencepiece(*, prefix_space: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix_space else space
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = _sentencepiece_decoder(strips=prefix_space)
    named = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=440,
        special_tokens=[*named, *SPECIALS, *byte_tokens],
        limit_alphabet=60,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)

    def bytes_are_vocabulary(written: dict[str, Any]) -> None:
        written["added_tokens"] = [t for t in written["added_tokens"] if t["content"] not in byte_tokens]

    tokenizer = _edited(tokenizer, bytes_are_vocabulary)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return _fast(
        tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIALS[:2],
    )


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space before every text, which the decoder strips, and bytes where letters are unknown."""
    return _sentencepiece(prefix_space=True)


def sentencepiece_no_prefix() -> PreTrainedTokenizerFast:
    """As Gemma's."""
    return _sentencepiece(prefix_space=False)


def _unigram(decoder: decoders.Decoder, *, byte_fallback: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoder
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    trainer = trainers.UnigramTrainer(
        vocab_size=520,
        special_tokens=["<unk>", *SPECIALS, *byte_tokens],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)

    def falls_back(written: dict[str, Any]) -> None:
        written["model"]["byte_fallback"] = byte_fallback
        written["added_tokens"] = [t for t in written["added_tokens"] if t["content"] not in byte_tokens]

    return _fast(_edited(tokenizer, falls_back), unk_token="<unk>", **_chat_named())


def unigram() -> PreTrainedTokenizerFast:
    """As T5's and XLM-R's: the Metaspace decoder, unknown letters are lost."""
    return _unigram(decoders.Metaspace(prepend_scheme="always"), byte_fallback=False)


def unigram_bytes() -> PreTrainedTokenizerFast:
    """Unigram with byte fallback."""
    return _unigram(_sentencepiece_decoder(strips=True), byte_fallback=True)


def _wordpiece(*, cleans: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=cleans)
    trainer = trainers.WordPieceTrainer(
        vocab_size=420, special_tokens=["[UNK]", "[CLS]", "[SEP]", *SPECIALS], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _fast(
        tokenizer,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        **_chat_named(),
        clean_up_tokenization_spaces=cleans,
    )


def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT's: words are joined by spaces, `##` goes on with a word."""
    return _wordpiece(cleans=False)


def wordpiece_cleaned() -> PreTrainedTokenizerFast:
    """With both clean-ups: the decoder's, token by token, and transformers', over the whole text."""
    return _wordpiece(cleans=True)


def end_of_word() -> PreTrainedTokenizerFast:
    """As the first GPT's: `</w>` ends a word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=460, special_tokens=["<unk>", *SPECIALS], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _fast(tokenizer, unk_token="<unk>", **_chat_named())


def word_level() -> PreTrainedTokenizerFast:
    """No decoder at all: tokens are joined by spaces."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(
        vocab_size=200, special_tokens=["<unk>", *SPECIALS], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _fast(tokenizer, unk_token="<unk>", **_chat_named())


def byt5() -> ByT5Tokenizer:
    """Bytes, written in Python; bytes that are no UTF-8 are left out of its text."""
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    return tokenizer


class TiktokenLike(PreTrainedTokenizer):
    """Written in Python, over tokens that are bytes, as the first Qwen's."""

    vocab_files_names: ClassVar[dict[str, str]] = {}

    def __init__(self, **named: Any) -> None:
        self._tokens = [bytes([b]) for b in range(256)] + [b" the", b" fox", "你".encode(), "🦄".encode()[:2]]
        self._ids = {token: i for i, token in enumerate(self._tokens)}
        super().__init__(**named)

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    def get_vocab(self) -> dict[Any, int]:
        return {**self._ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_: Any) -> list[bytes]:
        data, tokens = text.encode(), []
        while data:
            longest = max((token for token in self._tokens if data.startswith(token)), key=len)
            tokens.append(longest)
            data = data[len(longest) :]
        return tokens

    def _convert_token_to_id(self, token: bytes) -> int:
        return self._ids[token]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        if isinstance(tokens, str | bytes):
            added = self.added_tokens_encoder.get(tokens) if isinstance(tokens, str) else None
            return self._ids.get(tokens) if added is None else added
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def _convert_id_to_token(self, token_id: int) -> bytes:
        return self._tokens[token_id]

    def convert_tokens_to_string(self, tokens: list[Any]) -> str:
        return b"".join(t if isinstance(t, bytes) else t.encode() for t in tokens).decode("utf-8", "replace")


def tiktoken_python() -> TiktokenLike:
    """A Python tokenizer of byte tokens."""
    tokenizer = TiktokenLike(eos_token="<|im_end|>", additional_special_tokens=SPECIALS[:2])
    tokenizer.chat_template = CHAT
    return tokenizer


class Backwards(TiktokenLike):
    """Its decoding follows no rule that a stream could: every token changes all of the text."""

    def convert_tokens_to_string(self, tokens: list[Any]) -> str:
        return super().convert_tokens_to_string(tokens)[::-1]


def backwards() -> Backwards:
    """The last resort's case."""
    tokenizer = Backwards(eos_token="<|im_end|>")
    tokenizer.chat_template = CHAT
    return tokenizer


KINDS: dict[str, Callable[[], Any]] = {
    kind.__name__: kind
    for kind in (
        byte_level,
        byte_level_prefix_space,
        tekken,
        holes,
        added_tokens,
        sentencepiece,
        sentencepiece_no_prefix,
        unigram,
        unigram_bytes,
        wordpiece,
        wordpiece_cleaned,
        end_of_word,
        word_level,
        byt5,
        tiktoken_python,
        backwards,
    )
}
# Kinds whose tokens have bytes, so that text is these, joined.
BYTEWISE = [
    k for k in KINDS if k not in ("wordpiece", "wordpiece_cleaned", "end_of_word", "word_level", "backwards")
]


@cache
def tokenizer(kind: str) -> Any:
    """Return the tokenizer of a kind; tests leave it as it is."""
    return KINDS[kind]()


def vocab_size(kind: str) -> int:
    """Return the width of a model's logits for it: padded, as models pad."""
    highest = max(tokenizer(kind).get_vocab().values())
    return (highest // 64 + 2) * 64


def known_ids(kind: str) -> list[int]:
    """Return the ids that have a token."""
    return sorted(set(tokenizer(kind).get_vocab().values()))


def kinds() -> Iterator[str]:
    """All kinds, by name."""
    return iter(KINDS)
