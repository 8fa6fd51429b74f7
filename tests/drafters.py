"""Drafters for tests: they know what will be drawn, and propose it, or something else, or now one and now the other."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from myserve.engine.drafting.drafts import Draft
from myserve.engine.engine import Engine
from myserve.engine.scheduling.request import Request
from runs import Asked, Completion, run

Kind = Literal["right", "wrong", "mixed"]
VOCAB_SIZE = 384


class Forced:
    """Proposes `most` tokens each time: of a known completion, or spoiled; behind its end any tokens.

    `known[arrival - first][index]` are the ids that will be drawn.
    """

    def __init__(self, kind: Kind, known: Sequence[Sequence[Sequence[int]]], first: int) -> None:
        self._kind, self._known, self._first = kind, known, first
        self._rng = random.Random(0)

    def propose(self, asked: Sequence[tuple[Request, int]]) -> list[Draft | None]:
        return [self._draft(request, most) for request, most in asked]

    def _draft(self, request: Request, most: int) -> Draft | None:
        known = self._known[request.arrival - self._first][request.index]
        begun = request.num_output_tokens
        if begun >= len(known):
            # a step that was begun before its end was seen: whether a guess is right nobody knows
            return None
        tokens = [*known[begun : begun + most], *(self._rng.randrange(VOCAB_SIZE) for _ in range(most))][
            :most
        ]
        share = {"right": 0.0, "wrong": 1.0, "mixed": 0.3}[self._kind]
        drafted = tuple((t + 1) % VOCAB_SIZE if self._rng.random() < share else t for t in tokens)
        return Draft(drafted, "forced", (1.0,) * most)

    def end(self, request: Request) -> None:
        pass


@contextmanager
def drafting(engine: Engine, kind: Kind, known: Sequence[Sequence[Sequence[int]]]) -> Iterator[None]:
    """Let an engine draft so for the requests that are submitted next, in the order of `known`."""
    speculation = engine.scheduler.speculation
    assert speculation is not None, "an engine without speculation"
    before = speculation.drafter
    speculation.drafter = Forced(kind, known, first=next(engine._arrivals) + 1)
    try:
        yield
    finally:
        speculation.drafter = before


def run_drafting(
    engine: Engine, asked: list[Asked], kind: Kind, plain: list[list[Completion]]
) -> list[list[Completion]]:
    """Run requests with forced drafts; `plain`: what they give without."""
    with drafting(engine, kind, [[choice.ids for choice in choices] for choices in plain]):
        return run(engine, asked)
