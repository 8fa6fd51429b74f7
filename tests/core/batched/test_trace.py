"""A waterfall is what was sampled: its last stage is the draw's distribution, and its race has the draw's winner."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from myserve.core.batched.trace import trace
from myserve.core.logprobs import ranks, ranks_in_row
from myserve.core.params import SamplingParams
from myserve.core.rows import RowState
from myserve.core.sampling import Sampled, Sampler
from myserve.core.waterfall import Waterfall, WaterfallOptions

V = 1000
PROMPT = [1, 2, 3]
DRAWN = [5, 5, 9]

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "warm": {"temperature": 1.7},
    "cold": {"temperature": 1e-3},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.4, "temperature": 0.8},
    "min_p": {"min_p": 0.2},
    "typical": {"typical_p": 0.3},
    "sigma": {"top_n_sigma": 1.0},
    "all": {"temperature": 1.3, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.9},
    "penalties": {"repetition_penalty": 3.0, "frequency_penalty": 2.0, "presence_penalty": -1.5},
    "bias": {"logit_bias": {7: 4.0, 8: -100.0}},
    "allowed": {"allowed_token_ids": (5, 7, 9, 11)},
    "one": {"allowed_token_ids": (7,)},
    "min_tokens": {"min_tokens": 9},
    "torch": {"noise": "torch", "top_p": 0.8},
    "greedy torch": {"noise": "torch", "temperature": 0.0, "logit_bias": {4: 5.0}},
}


def row_of(seed: int, **asked: Any) -> RowState:
    return RowState(
        SamplingParams(waterfall=WaterfallOptions(at=len(DRAWN)), **asked),
        seed=seed,
        sample_index=1,
        prompt_token_ids=PROMPT,
        vocab_size=V,
        eos_token_ids=[0],
        completion_token_ids=DRAWN,
    )


def drawn(logits: torch.Tensor, row: RowState, *, compiled: bool = True) -> Sampled:
    (outcome,) = Sampler(compiled=compiled).sample(logits, [row])
    assert isinstance(outcome, Sampled), outcome
    return outcome


def waterfall_of(sampled: Sampled) -> Waterfall:
    assert sampled.waterfall is not None
    return sampled.waterfall


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_waterfall_ends_where_the_draw_fell(name: str, compiled: bool) -> None:
    torch.manual_seed(3)
    for seed in range(8):
        logits = torch.randn(1, V) * 3
        sampled = drawn(logits, row_of(seed, **CASES[name]), compiled=compiled)
        found = waterfall_of(sampled)
        assert found.draw.token_id == sampled.token_id
        (token,) = [one for one in found.tokens if one.token_id == sampled.token_id]
        assert token.removed_by is None
        first, last = token.probabilities[0], token.probabilities[-1]
        assert first is not None and math.isclose(math.log(first), sampled.logprob, abs_tol=2e-6)
        assert last is not None and math.isclose(math.log(last), sampled.sampling_logprob, abs_tol=2e-6)
        for at, stage in enumerate(found.stages):
            listed = [p for one in found.tokens if (p := one.probabilities[at]) is not None]
            assert len(listed) + stage.rest_tokens == stage.num_tokens
            assert math.isclose(sum(listed) + stage.rest_mass, 1.0, abs_tol=1e-9)
        assert [one.rank for one in found.tokens] == sorted({one.rank for one in found.tokens})


def test_the_stages_that_act_are_told_and_no_others() -> None:
    logits = torch.randn(1, V)

    def names(**asked: Any) -> list[str]:
        return [stage.name for stage in waterfall_of(drawn(logits, row_of(1, **asked))).stages]

    assert names() == ["raw"]
    assert names(temperature=0.0) == ["raw", "temperature"]
    everything = {
        "allowed_token_ids": tuple(range(500)),
        "logit_bias": {4: 1.0},
        "presence_penalty": 1.0,
    }
    assert names(**everything, **CASES["all"]) == [
        *("raw", "constraints", "logit_bias", "penalties", "temperature"),
        *("top_k", "top_p", "min_p", "typical_p"),
    ]


def test_what_a_stage_removed_is_told_with_its_mass() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(1, 1)
    params = SamplingParams(top_k=2, waterfall=WaterfallOptions(at=0))
    row = RowState(params, seed=0, sample_index=0, prompt_token_ids=[0], vocab_size=4, eos_token_ids=[])
    found = waterfall_of(drawn(logits, row))
    share = logits[0].double().softmax(-1).tolist()
    assert [stage.num_removed for stage in found.stages] == [0, 2]
    assert math.isclose(found.stages[1].removed_mass, share[2] + share[3], rel_tol=1e-6)
    assert [one.removed_by for one in found.tokens] == [None, None, "top_k", "top_k"]
    assert math.isclose(found.stages[0].entropy, -sum(p * math.log(p) for p in share), rel_tol=1e-6)


def test_the_first_to_arrive_are_those_that_would_win_without_the_ones_before() -> None:
    """The control of the race: a token forbidden, the next one wins, and no other arrival has moved."""
    torch.manual_seed(0)
    logits = torch.randn(1, V)
    before = waterfall_of(drawn(logits, row_of(4)))
    bad = ((before.draw.token_id,),)
    after = waterfall_of(drawn(logits, row_of(4, bad_words_ids=bad)))
    assert after.draw.token_id == before.draw.runner_up
    noise = {one.token_id: one.noise for one in before.tokens if one.noise is not None}
    kept = {one.token_id: one.noise for one in after.tokens if one.noise is not None}
    assert len(noise.keys() & kept.keys()) > 10
    assert all(kept[i] == noise[i] for i in noise.keys() & kept.keys())


def test_another_place_has_no_waterfall_and_a_large_vocabulary_a_short_one() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 152_000)
    params = SamplingParams(waterfall=WaterfallOptions(at=1, top=10), temperature=0.9, top_p=0.95)
    row = RowState(params, seed=0, sample_index=0, prompt_token_ids=[0], vocab_size=152_000, eos_token_ids=[])
    assert drawn(logits, row).waterfall is None
    row.append(3)
    sampled = drawn(logits, row)
    assert waterfall_of(sampled).draw.token_id == sampled.token_id
    assert len(waterfall_of(sampled).tokens) <= 5 * 10
    assert trace(logits, row, 10) == sampled.waterfall, "it changes nothing that it looks at"


def test_ranks_in_a_row_are_those_of_a_sort() -> None:
    generator = torch.Generator().manual_seed(2)
    for V in (1, 7, 5000):
        for scores in (torch.randn(V, generator=generator), torch.randn(V, generator=generator).round()):
            scores[V // 3 :: 5] = -torch.inf
            order = sorted(range(V), key=lambda token_id: (-float(scores[token_id]), token_id))
            ids = torch.randint(V, (40,), generator=generator)
            expected = [order.index(token_id) + 1 for token_id in ids.tolist()]
            assert ranks_in_row(scores, ids) == expected
            assert ranks(scores.expand(40, -1), scores[ids].unsqueeze(1), ids.unsqueeze(1)) == expected


def test_entropies_are_of_the_model_s_own_distribution() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, V) * 2
    rows = [row_of(seed, entropies=seed != 1, temperature=0.3, top_k=3) for seed in range(3)]
    outcomes = Sampler().sample(logits, rows)
    exact = torch.distributions.Categorical(logits=logits.double()).entropy().tolist()
    told = [outcome.entropy for outcome in outcomes if isinstance(outcome, Sampled)]
    assert told[1] is None
    assert told[0] == pytest.approx(exact[0], rel=1e-6) and told[2] == pytest.approx(exact[2], rel=1e-6)
