"""The tokenizer and chat template come from a GGUF file; a way to cut text that is not known is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import AutoTokenizer, LlamaTokenizer

from conftest import CORPUS, make_tiny_model
from gguf_files import close, write_gguf
from myserve.engine.config import EngineConfig
from myserve.engine.weights.formats.from_gguf.file import GgufFile
from myserve.engine.weights.formats.from_gguf.tokenizer import gguf_tokenizer
from myserve.engine.weights.loader import LoadedModel, load
from myserve.errors import RequestError

Kind = gguf.GGMLQuantizationType


def loaded(path: Path, **config: Any) -> LoadedModel:
    return load(str(path), EngineConfig(**config))


def test_the_tokenizer_and_its_template_come_from_the_file(tmp_path: Path) -> None:
    folder = make_tiny_model("qwen3", tmp_path / "model")
    tokenizer = loaded(write_gguf(folder, tmp_path / "model.gguf", Kind.F32)).tokenizer
    own = AutoTokenizer.from_pretrained(folder)
    for text in [*CORPUS, "<|im_start|>user\nhi<|im_end|>\n", "  spaces  ", ""]:
        ids = own(text, add_special_tokens=False).input_ids
        assert tokenizer(text, add_special_tokens=False).input_ids == ids
        assert tokenizer.decode(ids) == own.decode(ids)
    messages = [{"role": "user", "content": "hi"}]
    rendered = [
        t.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for t in (tokenizer, own)
    ]
    assert rendered[0] == rendered[1]
    assert tokenizer.eos_token_id == own.eos_token_id


def test_a_split_of_text_that_is_not_known_is_refused(tmp_path: Path) -> None:
    """It would be cut as GPT-2 cuts, and give other tokens."""
    folder = make_tiny_model("qwen3", tmp_path / "model")
    file = GgufFile(write_gguf(folder, tmp_path / "model.gguf", Kind.F32))
    file.metadata["tokenizer.ggml.pre"] = "command-r"
    with pytest.raises(RequestError, match="command-r"):
        gguf_tokenizer(file)


@pytest.mark.parametrize("first_space", [False, True, None])
def test_a_text_begins_with_a_space_where_the_file_says_so(first_space: bool | None, tmp_path: Path) -> None:
    """A SentencePiece vocabulary; None: the file says nothing, and llama.cpp puts one."""
    pieces = ["▁", "a", "b", "▁a", "ab", "▁ab", "<0x41>"]
    tokens = ["<unk>", "<s>", "</s>", *pieces]
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 3 + [-9.0, -8.0, -7.0, -3.0, -2.0, -1.0, 0.0])
    writer.add_token_types([2, 3, 3, *[1] * 6, 6])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if first_space is not None:
        writer.add_add_space_prefix(first_space)
    close(writer)
    made = gguf_tokenizer(GgufFile(tmp_path / "model.gguf"))
    right = LlamaTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[("▁", "ab"), ("a", "b"), ("▁", "a")],
        add_prefix_space=first_space is not False,
    )
    for text in ("ab", "ab ab", " ab", "a", ""):
        ids = made(text, add_special_tokens=False).input_ids
        assert ids == right(text, add_special_tokens=False).input_ids
        assert made.decode(ids) == right.decode(ids)
    first = made("ab", add_special_tokens=False).input_ids
    assert first == [tokens.index("ab" if first_space is False else "▁ab")]
