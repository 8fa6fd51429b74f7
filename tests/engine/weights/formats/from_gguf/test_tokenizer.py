"""The tokenizer and chat template come from a GGUF file; a way to cut text that is not known is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import AutoTokenizer

from conftest import CORPUS, make_tiny_model
from gguf_files import write_gguf
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
