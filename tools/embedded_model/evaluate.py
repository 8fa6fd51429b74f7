"""Evaluates the embedded model in exact figures: probabilities by teacher forcing, no sample is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from myserve.embedded import arithmetic
from tools.embedded_model import talk
from tools.embedded_model.data import IGNORED, Document, PackedRows, as_tensors, encode, encode_prompt
from tools.embedded_model.lexicon import COLORS, NUMBER_WORDS
from tools.embedded_model.tokenizer import IM_END

_BATCH = 128  # questions at a time: bounds memory


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Over `count` questions with one right answer each; both rates in [0, 1]."""

    greedy: float  # how often the most probable token is the right one at every place, <|im_end|> included
    # the mean probability of the right answer at temperature 1: what a sampler gets on average
    sampled: float
    count: int


def questions() -> dict[str, list[talk.Turn]]:
    """Return every task that has one right answer, with its questions.

    >>> questions()["one-digit sums"][22]
    ('Solve: 2+2=', '4')
    """
    rng = Random(2026)  # not the training seed: other words to repeat, other days to ask about
    held_out = list(arithmetic.two_digit_pairs(held_out=True))
    trained = rng.sample(list(arithmetic.two_digit_pairs(held_out=False)), len(held_out))
    first, *others = arithmetic.SUM_PHRASINGS
    return {
        "one-digit sums": [_sum(first, a, b) for a, b in arithmetic.one_digit_pairs()],
        "two-digit sums, held out": [_sum(first, a, b) for a, b in held_out],
        "two-digit sums, trained on": [_sum(first, a, b) for a, b in trained],
        "two-digit sums, held out, other phrasings": [_sum(rng.choice(others), a, b) for a, b in held_out],
        "one-digit differences": _draws(rng, arithmetic.one_digit_difference),
        "the larger of two numbers": _draws(rng, arithmetic.larger_number),
        "counting to one … twenty": [_count_to(last) for last in range(1, 21)],
        "counting, every style": _draws(rng, talk.counting),
        "days, months, seasons": _draws(rng, talk.calendar),
        "opposites": _draws(rng, talk.opposite),
        "facts": _draws(rng, talk.fact),
        "spelling": _draws(rng, talk.spelling),
        "repeating words never seen in that order": _draws(rng, talk.repetition),
    }


@torch.inference_mode()
def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Iterable[talk.Turn]
) -> Accuracy:
    """Greedy accuracy, and the exact expectation of accuracy at temperature 1."""
    right: list[Tensor] = []
    probability: list[Tensor] = []
    for batch in _batches(tokenizer, asked):
        target = batch.labels[:, 1:]  # [B, T-1]: each place predicts the next
        learned = target != IGNORED
        logits = model(batch.input_ids).logits[:, :-1][learned].float()  # [N, V]: the answers' places alone
        chosen = torch.zeros(target.shape)
        chosen[learned] = logits.log_softmax(-1).gather(-1, target[learned][:, None]).squeeze(-1)
        hit = torch.ones(target.shape, dtype=torch.bool)
        hit[learned] = logits.argmax(-1) == target[learned]
        probability.append(chosen.sum(-1).exp())
        right.append(hit.all(-1))
    greedy = torch.cat(right)
    return Accuracy(greedy.float().mean().item(), torch.cat(probability).mean().item(), len(greedy))


def color_probabilities(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Return the exact probability of each color as the whole answer to "Say a color:" at temperature 1."""
    answers = {color: ("Say a color:", color.capitalize() + ".") for color in COLORS}
    return {color: accuracy(model, tokenizer, [turn]).sampled for color, turn in answers.items()}


def report(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the figures as a Markdown table, as docs/demo_model.md shows them."""
    lines = [
        f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens in the vocabulary",
        "",
        "| task | greedy | at T=1 | questions |",
        "|---|---|---|---|",
    ]
    for name, asked in questions().items():
        got = accuracy(model, tokenizer, asked)
        lines.append(f"| {name} | {got.greedy:.1%} | {got.sampled:.1%} | {got.count} |")
    colors = color_probabilities(model, tokenizer)
    lines += ["", "Say a color: " + ", ".join(f"{color} {share:.1%}" for color, share in colors.items())]
    return "\n".join(lines)


def _sum(phrasing: str, a: int, b: int) -> talk.Turn:
    return phrasing.format(a=a, b=b), str(a + b)


def _count_to(last: int) -> talk.Turn:
    return f"Count to {NUMBER_WORDS[last]}:", ", ".join(NUMBER_WORDS[1 : last + 1]).capitalize() + "."


def _draws(rng: Random, task: Callable[[Random], talk.Turn]) -> list[talk.Turn]:
    return [task(rng) for _ in range(200)]


def _batches(tokenizer: PreTrainedTokenizerBase, asked: Iterable[talk.Turn]) -> Iterator[PackedRows]:
    """Yield one question a row, shortest first, padded on the right: a causal model does not see what follows."""
    documents = []
    for question, right in asked:
        prompt, answer = encode_prompt(tokenizer, question), encode(tokenizer, [right + IM_END])[0]
        documents.append(Document(prompt + answer, [IGNORED] * len(prompt) + answer))
    documents.sort(key=lambda document: len(document.input_ids))
    for at in range(0, len(documents), _BATCH):
        chunk = documents[at : at + _BATCH]
        yield as_tensors([[document] for document in chunk], len(chunk[-1].input_ids))
