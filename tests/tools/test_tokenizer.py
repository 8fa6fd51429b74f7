"""Any text comes back unchanged, digits stand alone, the template gives the ids that training saw."""

from __future__ import annotations

from random import Random

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from myserve.embedded import embedded_model_path
from tools.embedded_model.data import draw_chat, render_chat

# Hypothesis refuses function-scoped fixtures; loading once at first use keeps imports light.
_LOADED: list[PreTrainedTokenizerBase] = []


def shipped() -> PreTrainedTokenizerBase:
    if not _LOADED:
        _LOADED.append(AutoTokenizer.from_pretrained(embedded_model_path()))
    return _LOADED[0]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_round_trips(text: str) -> None:
    ids = shipped()(text)["input_ids"]
    assert shipped().decode(ids) == text


@given(st.integers(0, 10**12))
def test_a_digit_is_a_token(number: int) -> None:
    assert shipped().tokenize(f"{number}") == list(str(number))


@pytest.mark.parametrize("text", ["Zß🦄你", "👩‍💻", "é", "\x00\t\r\n  ", "<|im_start|>user"])
def test_awkward_text_round_trips(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_byte_is_in_the_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    # The first 256 after the special tokens are the bytes: with them, nothing is ever unknown.
    singles = [token for token in tokenizer.get_vocab() if len(token) == 1]
    assert len(singles) == 256
    assert tokenizer.unk_token_id is None


def test_template_gives_these_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Solve: 2+2="}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])

    def plain(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    assert rendered == [
        *(start, *plain("system\nBe kind."), end, *plain("\n")),
        *(start, *plain("user\nSolve: 2+2="), end, *plain("\n")),
        *(start, *plain("assistant\n")),
    ]


def test_template_renders_what_training_rendered(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = Random(5)
    for _ in range(50):
        chat = draw_chat(rng)
        assert tokenizer.apply_chat_template(chat, tokenize=False) == render_chat(chat)


def test_template_reads_null_content_parts_and_every_role(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None},
        {"role": "tool", "content": "7"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nab<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n<|im_start|>tool\n7<|im_end|>\n"
    )


def test_template_names_an_unknown_role(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(jinja2.TemplateError, match="unknown role: narrator"):
        tokenizer.apply_chat_template([{"role": "narrator", "content": "x"}], tokenize=False)
