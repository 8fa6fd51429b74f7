"""The figures: exact by construction, and those in docs/demo_model.md are the shipped model's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from runs import thorough
from tools.embedded_model.evaluate import accuracy, color_probabilities, questions

DOCS = Path(__file__).parents[2] / "docs" / "demo_model.md"
ROW = re.compile(
    r"^\| (?P<task>[^|]+) \| (?P<greedy>[\d.]+)% \| (?P<sampled>[\d.]+)% \| (?P<count>\d+) \|$", re.MULTILINE
)
PROMISED = {
    "one-digit sums": (0.95, 1.0),
    "two-digit sums, held out": (0.60, 0.90),
    "counting to one … twenty": (0.95, 1.0),
}
SHORT = ("facts", "one-digit differences", "opposites")
QUOTED = {row["task"]: row for row in ROW.finditer(DOCS.read_text(encoding="utf-8"))}


def test_the_docs_quote_every_task() -> None:
    assert list(QUOTED) == list(questions())


@pytest.mark.parametrize("task", [task if task in SHORT else thorough(task) for task in sorted(QUOTED)])
def test_the_docs_quote_what_the_model_does(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str
) -> None:
    got = accuracy(model, tokenizer, questions()[task])
    # bfloat16 rounds differently on other processors: a question or two may tip over.
    assert got.greedy == pytest.approx(float(QUOTED[task]["greedy"]) / 100, abs=0.03)
    assert got.sampled == pytest.approx(float(QUOTED[task]["sampled"]) / 100, abs=0.03)
    assert got.count == int(QUOTED[task]["count"])
    low, high = PROMISED.get(task, (0.0, 1.0))
    assert low <= got.greedy <= high


def test_sampled_accuracy_is_what_sampling_gives(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The exact expectation against 400 draws of `generate`, on a sum that the model is unsure of."""
    asked = min(
        questions()["two-digit sums, held out"][:12],
        key=lambda turn: abs(accuracy(model, tokenizer, [turn]).sampled - 0.5),
    )
    expected = accuracy(model, tokenizer, [asked]).sampled
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked[0]}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    torch.manual_seed(0)
    drawn = model.generate(**prompt, do_sample=True, top_k=0, num_return_sequences=400, max_new_tokens=8)
    answers = tokenizer.batch_decode(drawn[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    rate = sum(answer == asked[1] for answer in answers) / len(answers)
    assert 0.02 < expected < 0.98
    assert rate == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 400) ** 0.5)


def test_a_wrong_answer_counts_as_wrong(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    got = accuracy(model, tokenizer, [("Solve: 2+2=", "5")])
    assert got.greedy == 0.0 and got.sampled < 0.1


def test_colors_are_a_distribution(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert 0.9 < sum(color_probabilities(model, tokenizer).values()) <= 1.0 + 1e-3
