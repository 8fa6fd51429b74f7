"""Draws along a draft are the draws of one step after the other, however many positions are drawn at once."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from myserve.core.params import SamplingParams
from myserve.core.rows import RowState
from myserve.core.sampling import Sampled, Sampler
from myserve.engine.runner.drawing import draw_tokens, drawn_positions
from myserve.engine.scheduling.batch import Batch, ScheduledTokens
from myserve.engine.scheduling.request import Request

V, K = 64, 5
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9, "top_logprobs": 3},
    {"temperature": 1.0, "kept": True, "logit_bias": {3: 2.0}},
    {"temperature": 1.0, "noise": "torch"},
    {"frequency_penalty": 1.5, "repetition_penalty": 1.2},
    {"min_tokens": 3, "max_tokens": 9},
    {"bad_words_ids": ((1, 2), (7,))},
    {"allowed_token_ids": tuple(range(20))},
]


def row(params: dict[str, Any], seed: int) -> RowState:
    return RowState(
        SamplingParams(**params),
        seed=seed,
        sample_index=0,
        prompt_token_ids=[1, 5, 7],
        vocab_size=V,
        eos_token_ids=[0],
    )


def one_by_one(logits: torch.Tensor, state: RowState, stop_ids: frozenset[int]) -> list[Any]:
    drawn: list[Any] = []
    for position in range(K + 1):
        (outcome,) = Sampler().sample(logits[position : position + 1], [state])
        assert isinstance(outcome, Sampled)
        state.append(outcome.token_id)
        drawn.append(outcome)
        if outcome.token_id in stop_ids:
            break
    return drawn


@pytest.mark.parametrize("at_once", [1, 2, 3, 16])
def test_draws_along_a_draft_are_those_of_single_steps(at_once: int) -> None:
    rng, batch, logits, expected, rows = random.Random(at_once), Batch(), [], [], []
    for number, params in enumerate(PARAMS * 3):
        logits.append(torch.randn(K + 1, V, generator=torch.Generator().manual_seed(number)) * 2)
        stop_ids = frozenset([0, 11]) if number % 3 else frozenset([])
        single = one_by_one(logits[-1], row(params, number), stop_ids)
        right = rng.randint(0, K)
        tokens = [s.token_id for s in single] + [0] * K
        draft = [t if i < right else (t + 1) % V for i, t in enumerate(tokens[:K])]
        request = Request(id=str(number), prompt_token_ids=[1, 5, 7], max_tokens=99, stop_ids=stop_ids)
        batch.add(ScheduledTokens(request, 2, 1))
        batch.draws.append((request, number))
        batch.add_draft(number, tuple(draft), "test")
        rows.append(row(params, number))
        expected.append(single[: right + 1])
    positions = drawn_positions(batch)
    assert [p for own in positions for p in own] == list(range(len(PARAMS) * 3 * (K + 1)))
    row_of = {position: position for position in range(batch.num_tokens)}
    drawn = draw_tokens(batch, torch.cat(logits), row_of, rows, Sampler().sample, at_once)
    assert drawn == expected
    assert [r.num_completion_tokens for r in rows] == [len(own) for own in expected]


def test_rows_that_remember_tokens_are_never_drawn_ahead() -> None:
    remembering = [params for params in PARAMS if row(params, 0).remembers]
    assert remembering == [
        p for p in PARAMS if {"noise", "frequency_penalty", "min_tokens", "bad_words_ids"} & p.keys()
    ]
    with pytest.raises(AssertionError, match="would matter"):
        row(remembering[0], 0).ahead(1)


def test_sampling_is_asked_for_as_many_rows_as_there_is_time_for() -> None:
    asked: list[int] = []

    def counting(sampler: Sampler) -> Callable[..., Any]:
        def sample(logits: torch.Tensor, rows: Any, places: Any) -> Any:
            asked.append(len(rows))
            return sampler.sample(logits, rows, places)

        return sample

    logits = torch.zeros(4, V)
    logits[:, 9] = 5.0
    for at_once in (1, 2, 8):
        request = Request(id="r", prompt_token_ids=[1, 5, 7], max_tokens=99)
        batch = Batch()
        batch.add(ScheduledTokens(request, 2, 1))
        batch.draws.append((request, 0))
        batch.add_draft(0, (9, 9, 9), "test")
        rows = [row({"temperature": 0.0}, 0)]
        draw_tokens(batch, logits, {i: i for i in range(4)}, rows, counting(Sampler()), at_once)
    assert asked == [1, 2, 1, 2, 2, 4]
