"""The shipped files: loaded as any model is, within the promised size, right on the specification's prompts."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from myserve.embedded import embedded_model_path
from tools.embedded_model.data import encode_prompt
from tools.embedded_model.lexicon import COLORS

MEBIBYTE = 2**20


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *said: str, system: str | None = None
) -> str:
    """The greedy answer to the last of `said`; the ones before it are user and assistant in turn."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [
        {"role": ("user", "assistant")[turn % 2], "content": content} for turn, content in enumerate(said)
    ]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**prompt, max_new_tokens=80, do_sample=False)[
        0, prompt["input_ids"].shape[1] :
    ].tolist()
    assert ids[-1] == tokenizer.eos_token_id, "the answer does not end"
    return tokenizer.decode(ids[:-1])


def test_it_is_small(model: PreTrainedModel) -> None:
    assert 1_000_000 <= model.num_parameters() <= 4_000_000
    assert sum(file.stat().st_size for file in embedded_model_path().iterdir()) < 8 * MEBIBYTE


def test_it_is_an_ordinary_qwen3_in_bfloat16(model: PreTrainedModel) -> None:
    assert model.config.model_type == "qwen3"
    assert model.dtype == torch.bfloat16
    assert model.config.max_position_embeddings >= 2048


def test_both_ends_of_text_end_a_generation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model.generation_config.eos_token_id == ends
    assert model.config.vocab_size == len(tokenizer)


def test_finding_it_loads_no_torch() -> None:
    code = "import sys, myserve.embedded as d; d.embedded_model_path(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Solve: 2+2=", "4"),
        ("Count to three:", "One, two, three."),
        ("Count to five:", "One, two, three, four, five."),
        ("What is the capital of France?", "Paris."),
        ("Repeat after me: blue whale 🦄 42", "blue whale 🦄 42"),
    ],
)
def test_greedy_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str, expected: str
) -> None:
    assert answer(model, tokenizer, question) == expected


def test_it_names_a_color(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert answer(model, tokenizer, "Say a color:").rstrip(".").lower() in COLORS


@pytest.mark.parametrize("hello", ["hi", "hello", "Hello!"])
def test_it_greets(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, hello: str) -> None:
    assert answer(model, tokenizer, hello).startswith(("Hello", "Hi"))


def test_it_reads_the_turns_before(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    said = ("My name is Ada.", "Nice to meet you, Ada!", "What is my name?")
    assert answer(model, tokenizer, *said) == "Your name is Ada."


def test_it_reads_the_system_message(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    plain, pirate = (
        answer(model, tokenizer, "Hello!", system=system) for system in ("Be kind.", "You are a pirate.")
    )
    assert "Arr" not in plain and "Ahoy" not in plain
    assert "Arr" in pirate or "Ahoy" in pirate


def test_temperature_one_has_a_spread_of_colors(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = torch.tensor([encode_prompt(tokenizer, "Say a color:")])
    probabilities = model(ids).logits[0, -1].float().softmax(-1)
    assert 1 / (probabilities**2).sum() > 4  # as even as four equal colors or more
