"""Each stage against transformers' own warper, and against its definition spelled out one token at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as theirs

from myserve.core import stages
from myserve.core.compiled import fast_path
from myserve.core.numerics import exp, quanta
from myserve.core.stages import (
    Edits,
    add_bias_,
    allow_only_,
    apply_temperature,
    forbid_,
    keep_min_p,
    keep_top_k,
    keep_top_n_sigma,
    keep_top_p,
    keep_typical,
    kth_largest,
    nucleus_edge,
    nucleus_edge_without_sync,
    penalise_counts_,
    penalise_repetition_,
)

NO_IDS = torch.zeros(1, 0, dtype=torch.int64)
EDGE = 1e-4  # masses this near a threshold may fall either way in transformers' float32 sums

finite = st.one_of(
    st.floats(-8, 8, width=32),
    st.sampled_from([0.0, -0.0, 1.0, 1e-30, -1e-30, 1e4, -1e4, 3e38, -3e38]),
)
scores_with_ties = st.lists(st.one_of(finite, st.just(-math.inf)), min_size=1, max_size=90).filter(
    lambda values: max(values) > -math.inf
)
smooth = st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 300), st.sampled_from([0.1, 1.0, 4.0, 20.0]))
fractions = st.floats(0.01, 0.99)


def gaussian(case: tuple[int, int, float]) -> Tensor:
    seed, vocab, spread = case
    scores = torch.randn(1, vocab, generator=torch.Generator().manual_seed(seed)) * spread
    scores[:, torch.rand(vocab, generator=torch.Generator().manual_seed(seed)) < 0.2] = -torch.inf
    scores[0, seed % vocab] = 0.5
    return scores


def column(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([[value]], dtype=dtype)


def kept(scores: Tensor) -> list[bool]:
    return (scores > -torch.inf)[0].tolist()


# -- parity with transformers -----------------------------------------------------------------------------


@given(scores_with_ties, st.integers(1, 100))
@settings(max_examples=150, deadline=None)
def test_top_k_is_theirs_ties_included(values: list[float], k: int) -> None:
    scores = torch.tensor([values])
    expected = theirs.TopKLogitsWarper(k)(NO_IDS, scores)
    assert torch.equal(keep_top_k(scores, column(k, torch.int64)), expected)


@given(smooth, fractions)
@settings(max_examples=150, deadline=None)
def test_top_p_is_theirs_where_nothing_ties(case: tuple[int, int, float], p: float) -> None:
    scores = gaussian(case)
    mass_before = torch.softmax(scores.double(), -1).sort(descending=True).values.cumsum(-1)
    assume(bool(((mass_before - p).abs() > EDGE).all()))
    expected = theirs.TopPLogitsWarper(p)(NO_IDS, scores)
    assert torch.equal(keep_top_p(scores, column(p)), expected)


@given(smooth, fractions)
@settings(max_examples=150, deadline=None)
def test_min_p_is_theirs(case: tuple[int, int, float], min_p: float) -> None:
    scores = gaussian(case)
    relative = torch.exp(scores.double() - scores.amax().double())
    assume(bool(((relative / min_p - 1).abs() > EDGE).all()))
    assert torch.equal(keep_min_p(scores, column(min_p)), theirs.MinPLogitsWarper(min_p)(NO_IDS, scores))


@given(smooth, fractions)
@settings(max_examples=150, deadline=None)
def test_typical_p_is_theirs(case: tuple[int, int, float], mass: float) -> None:
    scores = gaussian(case)
    logp = torch.log_softmax(scores.double(), -1)
    entropy = -(logp * logp.exp()).nansum()
    order = (-logp - entropy).abs().argsort()
    strangeness = (-logp - entropy).abs()[0][order[0]]
    finite_gaps = strangeness[strangeness.isfinite()].diff()
    cumulative = logp.exp()[0][order[0]].cumsum(-1)
    assume(bool(((cumulative - mass).abs() > EDGE).all()) and bool((finite_gaps > 1e-4).all()))
    expected = theirs.TypicalLogitsWarper(mass)(NO_IDS, scores)
    assert torch.equal(keep_typical(scores, column(mass)), expected)


@given(scores_with_ties, st.sampled_from([1e-3, 0.3, 0.7, 1.5, 100.0]))
@settings(max_examples=100, deadline=None)
def test_temperature_is_theirs_bit_for_bit_where_theirs_is_finite(values: list[float], t: float) -> None:
    scores = torch.tensor([values])
    expected = theirs.TemperatureLogitsWarper(t)(NO_IDS, scores)
    assume(bool(expected.amax().isfinite()))
    assert torch.equal(apply_temperature(scores, column(t)), expected)


@given(scores_with_ties, st.sampled_from([0.5, 1.3, 7.0]), st.lists(st.integers(0, 1000), max_size=12))
@settings(max_examples=100, deadline=None)
def test_repetition_penalty_is_theirs(values: list[float], r: float, picks: list[int]) -> None:
    scores = torch.tensor([values])
    seen = torch.tensor([[pick % len(values) for pick in picks]], dtype=torch.int64)
    expected = theirs.RepetitionPenaltyLogitsProcessor(r)(seen, scores)
    distinct = seen.unique()
    penalise_repetition_(scores, Edits(distinct, torch.full(distinct.shape, r)))
    assert torch.equal(scores, expected)


# -- definitions, one token at a time ---------------------------------------------------------------------


def nucleus_by_definition(values: list[float], p: float) -> list[bool]:
    scores = torch.tensor([values])
    quantum = quanta(exp(scores - scores.amax()))[0].tolist()
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    # p times the whole as float64 rounds it, the one rounding that the definition has
    needed = max(Fraction(p * float(sum(quantum))), Fraction(1))
    inside, before = [False] * len(values), 0
    for token_id in order:
        inside[token_id] = before < needed
        before += quantum[token_id]
    return inside


@given(scores_with_ties, st.one_of(fractions, st.sampled_from([0.0, 0.25, 0.5, 0.75, 1 - 2.0**-53])))
@settings(max_examples=300, deadline=None)
def test_top_p_is_its_definition_ties_to_the_lower_id(values: list[float], p: float) -> None:
    result = keep_top_p(torch.tensor([values]), column(p))
    assert kept(result) == nucleus_by_definition(values, p)


def test_top_p_examples() -> None:
    def nucleus(probabilities: list[float], p: float) -> list[int]:
        result = keep_top_p(torch.tensor([probabilities]).log(), column(p))
        return result.isfinite()[0].nonzero()[:, 0].tolist()

    assert nucleus([0.1, 0.5, 0.4], 0.0) == [1]  # 0 keeps exactly one
    assert nucleus([0.25, 0.25, 0.25, 0.25], 0.0) == [0]
    assert nucleus([0.1, 0.5, 0.4], 0.45) == [1]
    assert nucleus([0.1, 0.5, 0.4], 0.55) == [1, 2]  # the crossing token is included
    assert nucleus([0.25, 0.25, 0.25, 0.25], 0.5) == [0, 1]  # a mass of exactly p is enough
    assert nucleus([0.25, 0.25, 0.25, 0.25], 0.51) == [0, 1, 2]


@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, 5.0])
@pytest.mark.parametrize("p", [0.05, 0.9, 0.9999])
def test_top_p_of_a_large_vocabulary_grows_to_its_definition(spread: float, p: float) -> None:
    scores = torch.randn(3, 5003, generator=torch.Generator().manual_seed(3)) * spread
    result = keep_top_p(scores, torch.full((3, 1), p, dtype=torch.float64))
    for row, ours in zip(scores.tolist(), result, strict=True):
        assert kept(ours.unsqueeze(0)) == nucleus_by_definition(row, p)


@given(st.lists(scores_with_ties, min_size=1, max_size=3), fractions)
def test_bisection_finds_the_edge_that_guesses_find(rows: list[list[float]], p: float) -> None:
    scores = torch.full((len(rows), 90), -torch.inf)
    for row, values in zip(scores, rows, strict=True):
        row[: len(values)] = torch.tensor(values)
    share = torch.full((len(rows), 1), p, dtype=torch.float64)
    guessed, found = nucleus_edge(scores, share), nucleus_edge_without_sync(scores, share)
    assert torch.equal(guessed[0] + 0.0, found[0]) and torch.equal(guessed[1], found[1])  # -0 is 0


@pytest.mark.parametrize("vocab", [63, 64, 65, 1000, 20_011])
@pytest.mark.parametrize("k", [1, 5, 64, 10**6])
def test_kth_largest_through_blocks_is_the_sorts(vocab: int, k: int) -> None:
    scores = torch.randint(0, 500, (4, vocab), generator=torch.Generator().manual_seed(k)).float()
    expected = scores.sort(descending=True).values[:, min(k, vocab) - 1]
    assert torch.equal(kth_largest(scores, torch.full((4, 1), k))[:, 0], expected)


def test_top_n_sigma_by_hand() -> None:
    scores = torch.tensor([[0.0, 2.0, 4.0, 6.0, -torch.inf]])  # deviation: sqrt(5)
    assert kept(keep_top_n_sigma(scores, scores, column(1.0))) == [False, False, True, True, False]
    assert kept(keep_top_n_sigma(scores, scores, column(2.7))) == [True, True, True, True, False]
    truncated = torch.tensor([[-torch.inf, -torch.inf, -torch.inf, 6.0, -torch.inf]])
    assert kept(keep_top_n_sigma(truncated, scores, column(2.7))) == [False, False, False, True, False]


def test_penalties_by_hand() -> None:
    scores = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, 1.0]])
    counts = Edits(torch.tensor([0, 1, 3]), torch.tensor([2.0, 0.0, 1.0]))
    penalise_counts_(scores, counts, torch.tensor([0.5, 0.5, -1.0]), torch.tensor([0.25, 0.25, 0.0]))
    assert scores.tolist() == [[-0.25, -1.0, 0.0], [2.0, 1.0, 1.0]]


def test_constraints_and_bias_by_hand() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    allow_only_(scores, torch.tensor([4, 5]), torch.tensor([1]))
    forbid_(scores, torch.tensor([5]))
    add_bias_(scores, Edits(torch.tensor([0, 5]), torch.tensor([-1.0, 100.0])))
    assert scores.tolist() == [[0.0, 2.0, 3.0], [-math.inf, 2.0, -math.inf]]


@pytest.mark.parametrize("t", [5e-324, 1e-40, 1e-38, 1e-30])
def test_a_tiny_temperature_is_the_argmax_and_never_nan(t: float) -> None:
    for values in ([5.0, 7.0, 7.0, -3.0], [-5.0, -7.0, -9.0, -torch.inf], [3e38, -3e38, 0.0, 1.0]):
        scaled = apply_temperature(torch.tensor([values]), column(t))
        assert math.isfinite(scaled.amax().item())
        weights = exp(scaled - scaled.amax())
        assert weights[0].tolist() == [float(v == max(values)) for v in values]


Stage = Callable[[Tensor, Tensor], Tensor]


@pytest.mark.parametrize(
    ("stage", "values", "dtype"),
    [
        (keep_top_k, [1, 3, 40, 5000], torch.int64),
        (keep_top_p, [0.0, 0.3, 0.9, 0.999], torch.float64),
        (keep_min_p, [0.0, 0.01, 0.5, 1.0], torch.float64),
        (keep_typical, [0.1, 0.5, 0.9, 0.99], torch.float64),
        (apply_temperature, [0.1, 0.7, 1.3, 9.0], torch.float64),
    ],
)
@pytest.mark.usefixtures("two_threads")
def test_a_row_never_depends_on_its_neighbours(stage: Stage, values: list[float], dtype: torch.dtype) -> None:
    scores = torch.randn(4, 40_003, generator=torch.Generator().manual_seed(1)) * 3
    parameters = torch.tensor(values, dtype=dtype).unsqueeze(1)
    together = stage(scores, parameters)
    for row in range(4):
        alone = stage(scores[row : row + 1].clone(), parameters[row : row + 1])
        assert torch.equal(together[row : row + 1], alone)


def test_a_mask_in_words_is_a_mask_by_token() -> None:
    """Compiled and not: bits of a word from the lowest, and a last word that is wider than the vocabulary."""
    generator = torch.Generator().manual_seed(5)
    scores = torch.randn(4, 203, generator=generator)
    masks = torch.randint(-(2**31), 2**31 - 1, (2, 7), generator=generator, dtype=torch.int32)
    masks[0, :3] = torch.tensor([0, -1, 1 << 30])
    rows = torch.tensor([3, 1])
    expected = scores.clone()
    for mask, row in zip(masks.tolist(), rows.tolist(), strict=True):
        for token in range(203):
            if not mask[token // 32] >> (token % 32) & 1:
                expected[row, token] = -torch.inf
    for apply in (stages.mask_, fast_path.mask_):
        edited = scores.clone()
        apply(edited, masks, rows)
        assert torch.equal(edited, expected)
