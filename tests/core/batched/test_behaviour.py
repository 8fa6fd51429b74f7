"""All stages at once, of any parameters in range: a token is left, and every implementation leaves the same ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from torch import Tensor

from myserve.core import sampling, stages
from myserve.core.batched import behaviour
from myserve.core.batched.behaviour import scale, truncate
from myserve.core.compiled import fast_path
from myserve.core.noise import OPENED
from myserve.core.params import SamplingParams
from myserve.core.ranges import ranges_of
from myserve.core.rows import RowState
from myserve.core.sampling import Sampled, Sampler, SamplerCfg, sample_next, top_k_top_p_filter

SHAPE = ("temperature", "top_k", "top_p", "min_p", "typical_p", "top_n_sigma")
USUAL: dict[str, list[Any]] = {
    "temperature": [0.0, 1e-300, 0.3, 0.7, 1.0, 1.3, 100.0],
    "top_k": [None, -1, 0, 1, 2, 5, 40, 2**31 - 1],
    "top_p": [0.0, 0.1, 0.5, 0.9, 0.999, 1.0 - 2**-53, 1.0],
    "min_p": [0.0, 1e-300, 0.05, 0.5, 1.0],
    "typical_p": [5e-324, 0.1, 0.5, 0.9, 0.99, 1.0 - 2**-53, 1.0],
    "top_n_sigma": [None, 5e-324, 0.01, 0.5, 1.0, 3.0, 1e6],
}
# ties, neighbours, the ends of float32; and rows in which nothing is left but one token
scores_of_a_row = st.lists(
    st.one_of(
        st.sampled_from([0.0, 1.0, -1.0, 2.5, -30.0, 88.0, -88.0, -math.inf]),
        st.floats(-20, 20, width=32),
        st.floats(-(2.0**127), 2.0**127, width=32),
    ),
    min_size=1,
    max_size=90,
).filter(lambda values: max(values) > -math.inf)


def _value(name: str) -> st.SearchStrategy[Any]:
    allowed = ranges_of(SamplingParams)[name]
    any_number = (
        st.integers(int(allowed.low), int(allowed.high))
        if allowed.is_integer
        else st.floats(allowed.low, allowed.high, exclude_min=allowed.open_low)
    )
    return st.one_of(st.sampled_from(USUAL[name]), any_number)


shapes = st.fixed_dictionaries({name: _value(name) for name in SHAPE})
slow_enough = settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def may_stay(values: list[float], asked: dict[str, Any], hair: float = 1e-4) -> set[int]:
    """The ids that top-k, top-p and min-p leave, as `docs/sampling.md` tells them, in plain Python.

    Numbers are float64 here and float32 there, so what lies within a hair outside an edge may stay, too.
    """
    best = max(values)
    if asked["temperature"] == 0.0:
        return {values.index(best)}
    z = [(x - best) / max(asked["temperature"], 2.0**-126) for x in values]
    order = sorted((i for i, x in enumerate(z) if x > -math.inf), key=lambda i: (-z[i], i))
    if (asked["top_k"] or 0) > 0:
        edge = z[order[min(asked["top_k"], len(order)) - 1]]
        order = [i for i in order if z[i] >= edge - hair * (abs(edge) + 1)]
    weight = {i: math.exp(z[i]) for i in order}
    before = 0.0
    for rank, i in enumerate(order):
        if rank and before >= min(asked["top_p"] + hair, 1.0) * sum(weight.values()):
            del order[rank:]
            break
        before += weight[i]
    return {i for i in order if weight[i] >= asked["min_p"] * (1 - hair)}


@given(scores_of_a_row, shapes)
@slow_enough
def test_some_token_is_left_and_it_may_be(values: list[float], asked: dict[str, Any]) -> None:
    scores, params = torch.tensor([values]), [SamplingParams(**asked)]
    left = truncate(scale(scores, params), params)
    assert left.isfinite().any()
    assert not left.isnan().any()
    kept = set((left[0] > -math.inf).nonzero()[:, 0].tolist())
    assert kept <= {i for i, value in enumerate(values) if value > -math.inf}
    if asked["typical_p"] == 1.0:
        assert values.index(max(values)) in kept  # no other stage removes the likeliest, the first of equals
        if asked["top_n_sigma"] is None:
            heavy = {
                i for i in kept if left[0, i] - left[0].amax() > -20
            }  # others have less than a quantum of mass
            assert heavy <= may_stay(values, asked)


@given(st.lists(st.tuples(scores_of_a_row, shapes, st.integers(0, 2**64 - 1)), min_size=1, max_size=4))
@slow_enough
def test_every_implementation_draws_the_same_token_in_company_and_alone(
    monkeypatch: pytest.MonkeyPatch, asked: list[tuple[list[float], dict[str, Any], int]]
) -> None:
    vocab = max(len(values) for values, _, _ in asked)
    logits = torch.full((len(asked), vocab), -math.inf)
    for row, (values, _, _) in zip(logits, asked, strict=True):
        row[: len(values)] = torch.tensor(values)

    def rows() -> list[RowState]:
        return [
            RowState(
                SamplingParams(**shape, kept=True, top_logprobs=3, logprobs_mode="processed"),
                seed=seed,
                sample_index=0,
                prompt_token_ids=[0],
                vocab_size=vocab,
                eos_token_ids=[],
            )
            for _, shape, seed in asked
        ]

    together = Sampler(compiled=False).sample(logits, rows())
    for drawn in together:
        assert isinstance(drawn, Sampled), drawn
        assert drawn.kept is not None and drawn.token_id in drawn.kept.token_ids
        assert -math.inf < drawn.sampling_logprob <= 0.0
    alone = [Sampler().sample(logits[b : b + 1], [row])[0] for b, row in enumerate(rows())]
    assert alone == together
    bare = [RowState(SamplingParams(**shape), seed=seed, sample_index=0, prompt_token_ids=[0], vocab_size=vocab,
                     eos_token_ids=[]) for _, shape, seed in asked]  # fmt: skip
    compiled = Sampler().sample(logits, bare)  # where the compiled draw knows the stages
    assert [(d.token_id, d.sampling_logprob) for d in compiled if isinstance(d, Sampled)] == [
        (d.token_id, d.sampling_logprob) for d in together if isinstance(d, Sampled)
    ]
    with monkeypatch.context() as as_on_a_device:
        as_on_a_device.setattr(fast_path, "covers", lambda scores: False)
        as_on_a_device.setattr(stages, "nucleus_edge", stages.nucleus_edge_without_sync)
        as_on_a_device.setattr(sampling, "openings", lambda device: (OPENED, None))
        assert Sampler(compiled=False).sample(logits, rows()) == together


@given(scores_of_a_row, shapes, st.integers(0, 2**63 - 1))
@slow_enough
def test_the_original_surface_always_draws_what_it_kept(
    values: list[float], asked: dict[str, Any], seed: int
) -> None:
    logits, noise = torch.tensor([values]), torch.Generator().manual_seed(seed)
    cfg = SamplerCfg(temperature=asked["temperature"], top_p=asked["top_p"], top_k=asked["top_k"])
    token_id, logprob, _ = sample_next(logits, cfg, torch.zeros(1, 0, dtype=torch.int64), noise)
    assert 0 <= token_id.item() < len(values) and values[int(token_id)] > -math.inf
    assert math.isfinite(logprob.item())
    assert top_k_top_p_filter(logits, asked["top_k"], asked["top_p"]).isfinite().any()


def measured_from_the_untruncated_maximum(scores: Tensor, untruncated: Tensor, n: Tensor) -> Tensor:
    """How `keep_top_n_sigma` once was: empty where `keep_typical` has removed the likeliest token."""
    below = untruncated.amax(-1, keepdim=True).double() - untruncated.double()
    finite = below.isfinite()
    mean = below.where(finite, 0.0).sum(-1, keepdim=True) / finite.sum(-1, keepdim=True)
    deviation = (
        (below - mean).where(finite, 0.0).square().sum(-1, keepdim=True) / finite.sum(-1, keepdim=True)
    ).sqrt()
    return scores.masked_fill(below > n * deviation, -torch.inf)


def an_empty_row() -> tuple[list[float], dict[str, Any]]:
    def is_empty(case: tuple[list[float], dict[str, Any]]) -> bool:
        params = [SamplingParams(**case[1])]
        return not truncate(scale(torch.tensor([case[0]]), params), params).isfinite().any()

    return find(
        st.tuples(scores_of_a_row, shapes),
        is_empty,
        settings=settings(deadline=None, max_examples=2000, database=None, derandomize=True),
    )


@pytest.mark.thorough
def test_the_search_finds_what_ended_the_engine_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with the mend taken out the same search finds a row without a token."""
    with pytest.raises(NoSuchExample):
        an_empty_row()
    monkeypatch.setattr(behaviour, "keep_top_n_sigma", measured_from_the_untruncated_maximum)
    _, asked = an_empty_row()
    assert asked["typical_p"] < 1.0 and asked["top_n_sigma"] is not None
