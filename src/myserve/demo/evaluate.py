"""What the embedded model can do, in exact figures: probabilities by teacher forcing, no sample is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from myserve.demo import arithmetic, talk
from myserve.demo.data import encode, encode_prompt
from myserve.demo.lexicon import COLORS, NUMBER_WORDS
from myserve.demo.tokenizer import IM_END

_BATCH = 256  # questions at a time; bounds memory, changes no figure


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Over `count` questions with one right answer each; both rates in [0, 1]."""

    greedy: float  # how often the most probable token is the right one at every place, <|im_end|> included
    sampled: (
        float  # the mean probability of the right answer at temperature 1: what a sampler gets on average
    )
    count: int


def questions() -> dict[str, list[talk.Turn]]:
    """Every task that has one right answer, with the questions that it is measured on.

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
    for ids, prompt_length in _equal_length_batches(tokenizer, asked):
        answer = ids[:, prompt_length:]  # [B, A]
        # Each place predicts the next, so the answer's logits begin one place before it.
        kept = model(ids, logits_to_keep=answer.shape[1] + 1).logits
        logits = kept[:, :-1].float()  # [B, A, V]
        chosen = logits.log_softmax(-1).gather(-1, answer[..., None]).squeeze(-1)  # [B, A]
        probability.append(chosen.sum(-1).exp())
        right.append((logits.argmax(-1) == answer).all(-1))
    greedy = torch.cat(right)
    return Accuracy(greedy.float().mean().item(), torch.cat(probability).mean().item(), len(greedy))


def color_probabilities(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """The exact probability of each color as the whole answer to "Say a color:" at temperature 1."""
    answers = {color: ("Say a color:", color.capitalize() + ".") for color in COLORS}
    return {color: accuracy(model, tokenizer, [turn]).sampled for color, turn in answers.items()}


def report(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """The figures as a Markdown table, as docs/demo_model.md shows them."""
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


def _equal_length_batches(
    tokenizer: PreTrainedTokenizerBase, asked: Iterable[talk.Turn]
) -> Iterator[tuple[Tensor, int]]:
    """Token ids [B, T] of prompts with their answers, and the prompts' length."""

    # Equal lengths need no padding, and padding would need a proof that it changes nothing.
    def lengths(pair: tuple[list[int], list[int]]) -> tuple[int, int]:
        return len(pair[0]), len(pair[1])

    pairs = [
        (encode_prompt(tokenizer, question), encode(tokenizer, [right + IM_END])[0])
        for question, right in asked
    ]
    for (prompt_length, _), group in groupby(sorted(pairs, key=lengths), lengths):
        rows = torch.tensor([prompt + answer for prompt, answer in group])
        for ids in torch.split(rows, _BATCH):
            yield ids, prompt_length
