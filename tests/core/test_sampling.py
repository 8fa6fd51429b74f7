"""The batched sampler: every row as if it were alone, whatever the company, the place and the way it is drawn."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from myserve.core.compiled import fast_path, nucleus
from myserve.core.logprobs import prompt_logprobs
from myserve.core.sampling import (
    RowState,
    Sampled,
    Sampler,
    SamplerCfg,
    apply_penalties,
    sample_next,
    top_k_top_p_filter,
)
from myserve.errors import ConstraintError, NonFiniteLogitsError, RequestError

MakeRow = Callable[..., RowState]
VOCAB = 131

MIXES: list[dict[str, object]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 0.0, "top_logprobs": 3, "logprobs_mode": "processed"},
    {"temperature": 1e-30},
    {"top_k": 1},
    {"top_k": 7, "top_logprobs": 5},
    {"top_k": 1000, "kept": True},
    {"top_p": 0.0},
    {"top_p": 0.3, "temperature": 1.5},
    {"top_p": 0.95, "logprobs_mode": "processed", "top_logprobs": 20},
    {"top_p": 0.9999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"typical_p": 0.6},
    {"top_n_sigma": 1.5},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "top_logprobs": 2},
    {"frequency_penalty": 0.5, "presence_penalty": -1.0},
    {"repetition_penalty": 1.3, "top_p": 0.9},
    {"logit_bias": {5: 3.0, 90: -100.0}, "logprob_token_ids": (5, 90, 0)},
    {"allowed_token_ids": (3, 64, 65, 130)},
    {"bad_words_ids": ((4,), (2, 3, 9), (17, 18)), "min_tokens": 20},
    {"min_tokens": 3, "stop_token_ids": (77,), "temperature": 2.0},
    {"noise": "torch", "top_p": 0.8},
    {"noise": "torch"},
]


def company(make_row: MakeRow, vocab: int = VOCAB) -> list[RowState]:
    return [
        make_row(seed=7 * i, index=i % 3, prompt=range(2, 5 + i), vocab=vocab, **mix)
        for i, mix in enumerate(MIXES)
    ]


def logits_for(rows: int, vocab: int = VOCAB, step: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(step)) * 2.5


def step(sampler: Sampler, logits: Tensor, rows: list[RowState]) -> list[Sampled]:
    drawn = sampler.sample(logits, rows)
    for row, one in zip(rows, drawn, strict=True):
        assert isinstance(one, Sampled)
        row.append(one.token_id)
    return [one for one in drawn if isinstance(one, Sampled)]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("vocab", [VOCAB, 20_011])
@pytest.mark.usefixtures("two_threads")
def test_a_row_is_the_same_alone_and_in_any_company(make_row: MakeRow, compiled: bool, vocab: int) -> None:
    sampler = Sampler(compiled=compiled)
    steps = 4 if vocab == VOCAB else 2
    together = company(make_row, vocab)
    expected = [step(sampler, logits_for(len(MIXES), vocab, t), together) for t in range(steps)]
    shuffled = company(make_row, vocab)
    places = list(range(len(MIXES)))
    for t in range(steps):
        random.Random(t).shuffle(places)
        half = len(places) // 2
        logits = logits_for(len(MIXES), vocab, t)
        for part in (places[:1], places[1:half], places[half:]):
            drawn = step(sampler, logits[part], [shuffled[b] for b in part])
            assert drawn == [expected[t][b] for b in part]


@pytest.mark.parametrize("vocab", [1, 63, VOCAB, 4_999])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 2.0, 30.0])
@pytest.mark.parametrize("on_a_device", [False, True])
def test_compiled_and_tensor_draws_are_the_same_bits(
    make_row: MakeRow, vocab: int, spread: float, on_a_device: bool, request: pytest.FixtureRequest
) -> None:
    mixes = [
        mix | {"seed": seed}
        for seed in range(3)
        for mix in MIXES
        if vocab > 130
        or not {"logit_bias", "allowed_token_ids", "bad_words_ids", "stop_token_ids"} & set(mix)
    ]
    rows = [make_row(vocab=vocab, prompt=(0,), eos=(), **(mix | {"min_tokens": 0})) for mix in mixes]
    again = [make_row(vocab=vocab, prompt=(0,), eos=(), **(mix | {"min_tokens": 0})) for mix in mixes]
    logits = logits_for(len(rows), vocab) * spread
    logits[:, ::3] = logits[:, :1].clone()  # ties in every row
    if vocab > 2:
        logits[1::2, 1] = -torch.inf
    compiled = [step(Sampler(), logits, rows) for _ in range(2)]
    if on_a_device:
        request.getfixturevalue("as_on_a_device")
    assert compiled == [step(Sampler(compiled=False), logits, again) for _ in range(2)]


@pytest.mark.parametrize("vocab", [1, 63, 4_999, 20_011])
@pytest.mark.usefixtures("two_threads")
def test_bfloat16_scores_are_drawn_from_as_the_float32_that_they_are(make_row: MakeRow, vocab: int) -> None:
    """Rows that nothing else looks at are widened where they are drawn from; all others beforehand."""
    plain = [mix for mix in MIXES if set(mix) <= {"temperature", "top_k", "top_p", "min_p", "kept"}]
    for mixes in ([mix for mix in plain if "kept" not in mix], plain):
        rows, again = (
            [make_row(vocab=vocab, seed=b, **mix) for b, mix in enumerate(mixes)] for _ in range(2)
        )
        logits = logits_for(len(rows), vocab).to(torch.bfloat16)
        if vocab > 2:
            logits[1::2, 1] = -torch.inf
            logits[:, 2] = logits.amax(-1)  # a tie at the top
        sampler = Sampler()
        assert step(sampler, logits, rows) == step(Sampler(compiled=False), logits.float(), again)
        assert (sampler._raw._memory is None) == (mixes is not plain), "the control: what is copied"


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
@pytest.mark.parametrize(
    "change", [{}, {"logit_bias": {5: 1.5}}, {"temperature": 0.8}, {"top_p": 0.8}], ids=str
)
def test_masked_rows_have_the_same_bits_whatever_is_skipped(
    make_row: MakeRow, share: float, change: dict[str, Any]
) -> None:
    """Few allowed or many, the best raw token among them or not."""
    vocab, rows = 4_999, 12
    allowed = [
        tuple({5, *random.Random(seed).sample(range(vocab), max(1, int(share * vocab)))})
        for seed in range(rows)
    ]
    logits = logits_for(rows, vocab)
    for row in range(0, rows, 2):
        logits[row, allowed[row][-1]] = 30.0
    with_best = [int(logits[row].argmax()) in allowed[row] for row in range(rows)]
    assert any(with_best) and (share > 0.99 or not all(with_best))
    compiled, tensors = (
        [make_row(seed=row, vocab=vocab, allowed_token_ids=ids, **change) for row, ids in enumerate(allowed)]
        for _ in range(2)
    )
    drawn = step(Sampler(), logits, compiled)
    assert drawn == step(Sampler(compiled=False), logits, tensors)
    free = [make_row(seed=row, vocab=vocab, **change) for row in range(rows)]
    assert [one.logprob for one in drawn] != [one.sampling_logprob for one in drawn], (
        "the mask took mass away"
    )
    assert drawn != step(Sampler(), logits, free)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=300), st.integers(1, 300))
@settings(max_examples=200, deadline=None)
def test_sort_best_brings_the_k_largest_to_the_front(values: list[int], k: int) -> None:
    k = min(k, len(values))
    ordered = nucleus.sort_best(torch.tensor(values, dtype=torch.float32).numpy(), k)
    assert ordered[:k].tolist() == sorted(values, reverse=True)[:k]


@pytest.mark.parametrize("vocab", [1, 63, VOCAB, 4_999])
def test_compiled_and_tensor_logprobs_are_the_same_bits(monkeypatch: pytest.MonkeyPatch, vocab: int) -> None:
    logits = (logits_for(70, vocab) * 4).round() / 4  # many ties
    logits[::2, vocab // 2] = -torch.inf
    targets = [t % vocab for t in range(70)]
    logits[torch.arange(70), torch.arange(70) % vocab] = 0.25
    for k in (1, 5, 200):
        compiled = prompt_logprobs(logits, targets, k)
        with monkeypatch.context() as patched:
            patched.setattr(fast_path, "covers", lambda scores: False)
            assert prompt_logprobs(logits, targets, k) == compiled


def test_the_callers_grad_mode_does_not_matter(make_row: MakeRow) -> None:
    sampler, logits, mix = Sampler(), logits_for(1), {"frequency_penalty": 0.5, "repetition_penalty": 1.2}
    inside, outside = torch.inference_mode, torch.enable_grad
    for made, used in ((inside, outside), (outside, inside)):
        with made():
            row = make_row(**mix)
            first = step(sampler, logits, [row])
        with used():
            assert first + step(sampler, logits, [row]) == [
                *first,
                *step(Sampler(), logits, [row_after(make_row, first, mix)]),
            ]


def row_after(make_row: MakeRow, drawn: list[Sampled], mix: dict[str, float]) -> RowState:
    return make_row(completion=[one.token_id for one in drawn], **mix)


def test_logits_that_still_carry_a_graph_are_taken(make_row: MakeRow) -> None:
    logits = logits_for(1).requires_grad_()
    assert Sampler().sample(logits, [make_row()]) == Sampler().sample(logits.detach(), [make_row()])
    assert prompt_logprobs(logits, [1]) == prompt_logprobs(logits.detach(), [1])


def test_another_threads_default_dtype_changes_nothing(make_row: MakeRow) -> None:
    """transformers changes it, for the whole process, while it makes a model: another than the one that samples."""
    logits = logits_for(len(MIXES))

    def drawn(compiled: bool) -> list[Any]:
        return step(
            Sampler(compiled=compiled), logits, [make_row(seed=i, **mix) for i, mix in enumerate(MIXES)]
        )

    before = [drawn(True), drawn(False)]
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.empty(1).dtype == torch.bfloat16
        assert [drawn(True), drawn(False)] == before
        assert prompt_logprobs(logits, [0] * len(MIXES), 5)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_batch_dependent_operation_would_have_been_noticed(two_threads: None) -> None:
    """The control of the tests above: the textbook normaliser does change with the batch."""
    logits = logits_for(64, 40_003)
    together = torch.logsumexp(logits, -1)
    assert not torch.equal(together, torch.stack([torch.logsumexp(row, -1) for row in logits]))


def test_bf16_and_float16_logits_are_drawn_as_their_float32_values(make_row: MakeRow) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        logits = logits_for(len(MIXES)).to(dtype)
        narrow = Sampler().sample(logits, company(make_row))
        assert narrow == Sampler().sample(logits.float(), company(make_row))


# -- rows that fail ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("poison", [math.nan, -math.nan, math.inf])
def test_a_poisoned_row_fails_alone(make_row: MakeRow, compiled: bool, poison: float) -> None:
    sampler = Sampler(compiled=compiled)
    logits = logits_for(len(MIXES))
    expected = sampler.sample(logits, company(make_row))
    sick = logits.clone()
    sick[::4, 17] = torch.tensor(poison).copysign(torch.tensor(math.copysign(1.0, poison)))
    for place, (drawn, healthy) in enumerate(
        zip(sampler.sample(sick, company(make_row)), expected, strict=True)
    ):
        if place % 4 == 0:
            assert isinstance(drawn, NonFiniteLogitsError)
            assert "not finite" in str(drawn)
        else:
            assert drawn == healthy


@pytest.mark.parametrize("compiled", [True, False])
def test_constraints_that_forbid_everything_fail_their_row_alone(make_row: MakeRow, compiled: bool) -> None:
    rows = [
        make_row(),
        make_row(allowed_token_ids=(0,), min_tokens=1),
        make_row(allowed_token_ids=(4,), bad_words_ids=((4,),)),
    ]
    fine, *stuck = Sampler(compiled=compiled).sample(logits_for(3), rows)
    assert isinstance(fine, Sampled)
    for error in stuck:
        assert isinstance(error, ConstraintError)
        assert "no token is left to draw" in str(error)


# -- what each parameter does, through the sampler --------------------------------------------------------


def one(make_row: MakeRow, logits: list[float], **row: object) -> Sampled:
    drawn = Sampler().sample(torch.tensor([logits]), [make_row(vocab=len(logits), eos=(), **row)])[0]
    assert isinstance(drawn, Sampled)
    return drawn


def test_zero_is_greedy_and_the_lowest_id_wins_a_tie(make_row: MakeRow) -> None:
    drawn = one(make_row, [1.0, 5.0, 5.0, 2.0], temperature=0)
    assert (drawn.token_id, drawn.sampling_logprob) == (1, 0.0)


def test_top_k_1_is_not_argmax_under_ties(make_row: MakeRow) -> None:
    drawn = {one(make_row, [5.0, 5.0, 0.0], top_k=1, seed=seed).token_id for seed in range(20)}
    assert drawn == {0, 1}
    assert {one(make_row, [5.0, 5.0, 0.0], top_p=0.0, seed=seed).token_id for seed in range(20)} == {0}


def test_top_k_is_applied_before_top_p_which_renormalises(make_row: MakeRow) -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist()
    # of the two that top-k leaves, the first has 4/7 = 0.57 of the mass: enough for 0.5, and 0.4 would not be
    assert (
        one(make_row, logits, top_k=2, top_p=0.5, kept=True).kept
        == one(make_row, logits, top_k=1, kept=True).kept
    )


def test_min_tokens_forbids_the_ends_until_it_is_reached(make_row: MakeRow) -> None:
    logits = torch.tensor([[9.0, 8.0, 0.0]])
    row = make_row(vocab=3, eos=(0,), stop_token_ids=(1,), min_tokens=2, temperature=0)
    tokens = [step(Sampler(), logits, [row])[0].token_id for _ in range(3)]
    assert tokens == [2, 2, 0]


def test_bad_words_are_matched_over_the_border_of_prompt_and_completion(make_row: MakeRow) -> None:
    logits = torch.tensor([[0.0, 1.0, 5.0, 4.0]])
    row = make_row(vocab=4, eos=(), prompt=(3, 1), bad_words_ids=((1, 2), (3, 3, 2)), temperature=0)
    tokens = [step(Sampler(), logits, [row])[0].token_id for _ in range(4)]
    assert tokens == [3, 2, 2, 2]  # 2 is forbidden after the prompt's 1, and would be after 3 3


def test_frequency_and_presence_count_the_completion_and_repetition_the_prompt_too(make_row: MakeRow) -> None:
    logits = [3.0, 2.9, -1.0]
    assert one(make_row, logits, prompt=(0,), temperature=0, presence_penalty=2.0).token_id == 0
    assert one(make_row, logits, completion=(0,), temperature=0, presence_penalty=2.0).token_id == 1
    assert one(make_row, logits, prompt=(0,), temperature=0, repetition_penalty=1.5).token_id == 1
    assert one(make_row, logits, completion=(0, 0, 1), temperature=0, frequency_penalty=0.5).token_id == 1


def test_counts_kept_by_the_token_equal_counts_of_the_whole_history(make_row: MakeRow) -> None:
    params = {
        "frequency_penalty": 0.3,
        "presence_penalty": 0.1,
        "repetition_penalty": 1.2,
        "bad_words_ids": ((7, 8),),
    }
    history = torch.randint(0, VOCAB, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    grown = make_row(**params)
    for token_id in history:
        grown.append(token_id)
    rebuilt = make_row(completion=history, **params)
    logits = logits_for(1)
    assert Sampler().sample(logits, [grown]) == Sampler().sample(logits, [rebuilt])
    assert Sampler().sample(logits, [grown]) != Sampler().sample(logits, [make_row(**params)])


@pytest.mark.parametrize("noise", ["counter", "torch"])
def test_a_completion_resumes_with_the_draws_it_would_have_had(make_row: MakeRow, noise: str) -> None:
    def run(row: RowState, steps: range) -> list[int]:
        return [step(Sampler(), logits_for(1, step=t), [row])[0].token_id for t in steps]

    whole = run(make_row(seed=3, noise=noise), range(12))
    resumed = make_row(seed=3, noise=noise, completion=whole[:5])
    assert run(resumed, range(5, 12)) == whole[5:]
    # the control: one that forgets what it has drawn goes another way
    assert run(make_row(seed=3, noise=noise), range(5, 12)) != whole[5:]


def test_counter_noise_goes_on_when_the_completion_is_sent_again_as_prompt(make_row: MakeRow) -> None:
    logits = logits_for(1)
    grown = make_row(seed=5, prompt=(1, 2), completion=(3, 4))
    assert Sampler().sample(logits, [grown]) == Sampler().sample(
        logits, [make_row(seed=5, prompt=(1, 2, 3, 4))]
    )


def test_sampling_twice_draws_the_same_for_nothing_was_appended(make_row: MakeRow) -> None:
    row = make_row()
    assert Sampler().sample(logits_for(1), [row]) == Sampler().sample(logits_for(1), [row])


def test_a_filter_that_keeps_the_winner_does_not_change_it(make_row: MakeRow) -> None:
    """Common random numbers: the token of the untruncated draw, wherever it is still in the support."""
    logits = logits_for(1)
    survived = 0
    for seed in range(200):
        plain, cut = (
            one(make_row, logits[0].tolist(), seed=seed, **mix) for mix in ({}, {"top_p": 0.6, "kept": True})
        )
        assert cut.kept is not None
        if plain.token_id in cut.kept.token_ids:
            survived += 1
            assert cut.token_id == plain.token_id
    assert 80 < survived < 160


def test_sample_index_and_ids_are_checked(make_row: MakeRow) -> None:
    with pytest.raises(RequestError, match="sample index"):
        make_row(index=-1)
    with pytest.raises(RequestError, match=r"logit_bias names token id 131"):
        make_row(logit_bias={131: 1.0})


# -- logprobs ---------------------------------------------------------------------------------------------


def test_raw_and_behaviour_logprobs_against_float64(make_row: MakeRow) -> None:
    logits = logits_for(1)
    raw = logits.double().log_softmax(-1)[0]
    for seed in range(20):
        drawn = one(make_row, logits[0].tolist(), seed=seed, temperature=0.7, top_k=10, top_logprobs=3)
        behaviour = logits.double() / 0.7
        behaviour[behaviour < behaviour.topk(10).values[:, -1:]] = -torch.inf
        assert drawn.logprob == pytest.approx(raw[drawn.token_id].item(), abs=1e-6)
        assert drawn.sampling_logprob == pytest.approx(
            behaviour.log_softmax(-1)[0, drawn.token_id].item(), abs=1e-6
        )
        assert [i for i, _ in drawn.top_logprobs] == raw.topk(3).indices.tolist()
        assert [v for _, v in drawn.top_logprobs] == pytest.approx(raw.topk(3).values.tolist(), abs=1e-6)


def test_processed_alternatives_are_of_the_support_alone(make_row: MakeRow) -> None:
    drawn = one(
        make_row,
        [3.0, 2.0, 1.0, 0.0],
        top_k=2,
        top_logprobs=4,
        logprobs_mode="processed",
        logprob_token_ids=(3, 0),
    )
    assert [i for i, _ in drawn.top_logprobs] == [0, 1]
    assert sum(math.exp(v) for _, v in drawn.top_logprobs) == pytest.approx(1.0)
    assert drawn.token_id_logprobs == ((3, None), (0, drawn.top_logprobs[0][1]))


def test_equal_alternatives_are_listed_by_id_whatever_others_ask_for(make_row: MakeRow) -> None:
    logits = torch.zeros(2, VOCAB)
    for others in (1, 100):
        rows = [make_row(top_logprobs=4), make_row(top_logprobs=others)]
        drawn = Sampler().sample(logits, rows)[0]
        assert isinstance(drawn, Sampled)
        assert [i for i, _ in drawn.top_logprobs] == [0, 1, 2, 3]


def test_kept_set_mass_and_entropy(make_row: MakeRow) -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().tolist()
    kept = one(make_row, logits, top_p=0.7, kept=True).kept
    assert kept is not None
    assert kept.token_ids == (0, 1)
    assert kept.mass == pytest.approx(0.75)
    assert kept.entropy == pytest.approx(-sum(p * math.log(p) for p in (0.5, 0.25, 0.15, 0.1)), abs=1e-6)
    greedy = one(make_row, logits, temperature=0, kept=True).kept
    assert greedy is not None
    assert (greedy.token_ids, greedy.mass, greedy.entropy) == ((0,), 1.0, 0.0)


def test_drawn_and_prompt_logprobs_are_the_same_bits(make_row: MakeRow) -> None:
    logits = logits_for(70, 1_003)
    rows = [make_row(vocab=1_003, seed=seed, temperature=1.3, top_logprobs=4) for seed in range(70)]
    drawn = step(Sampler(), logits, rows)
    scored = prompt_logprobs(logits, [one.token_id for one in drawn], k=4)
    assert [(s.token_id, s.logprob, s.top_logprobs) for s in scored] == [
        (d.token_id, d.logprob, d.top_logprobs) for d in drawn
    ]
    for t in (0, 63, 64, 69):  # in no company but its own
        assert prompt_logprobs(logits[t : t + 1], [drawn[t].token_id], k=4) == [scored[t]]


def test_prompt_logprobs_name_the_row_that_is_not_finite() -> None:
    logits = logits_for(80)
    logits[70, 3] = math.nan
    with pytest.raises(NonFiniteLogitsError, match="position 70"):
        prompt_logprobs(logits, [0] * 80)


def test_prompt_logprobs_of_an_impossible_token_is_none() -> None:
    scored = prompt_logprobs(torch.tensor([[0.0, -torch.inf]]), [1], k=2)[0]
    assert (scored.logprob, scored.top_logprobs) == (None, ((0, 0.0),))


# -- the original specification's functions ----------------------------------------------------------------


def test_apply_penalties_by_hand() -> None:
    logits = torch.zeros(2, 4, dtype=torch.float16)
    out = apply_penalties(logits, torch.tensor([[1, 1, 9], [-1, 0, 3]]), 0.5, 1.0)
    assert out.tolist() == [[0.0, -2.5, 0.0, 0.0], [-1.5, 0.0, 0.0, -1.5]]
    assert apply_penalties(logits, torch.zeros(2, 0, dtype=torch.int64), 0.5, 1.0).tolist() == [[0.0] * 4] * 2


def test_top_k_top_p_filter_off_values_keep_everything() -> None:
    logits = logits_for(2)
    for top_k, top_p in ((None, 1.0), (0, 1.0), (-1, 1.0), (10_000, 1.0)):
        assert torch.equal(top_k_top_p_filter(logits, top_k, top_p), logits)


def test_sample_next_casts_so_that_a_cold_half_precision_row_stays_finite() -> None:
    ids, chosen, logprobs = sample_next(
        torch.tensor([[6e4, 5.9e4, 0.0]], dtype=torch.float16),
        SamplerCfg(temperature=1e-5),
        torch.zeros(1, 0),
    )
    assert (ids.tolist(), chosen.tolist(), logprobs[0, 0].item()) == ([0], [0.0], 0.0)


def test_sampler_cfg_is_validated_as_sampling_params_are() -> None:
    with pytest.raises(RequestError, match="top_p"):
        SamplerCfg(top_p=2.0)


def test_a_large_batch_of_scores_takes_no_fresh_memory_each_step(make_row: MakeRow) -> None:
    """Beyond 32 MB the C library gives memory back at once: each step would fault in its scores page by page."""
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "RUSAGE_THREAD"):
        pytest.skip("no faults of one thread are counted here")
    B, V = 64, 152_064  # 39 MB as float32
    logits, sampler = torch.zeros(B, V, dtype=torch.bfloat16), Sampler()
    rows = [make_row(vocab=V, temperature=0.0) for _ in range(B)]

    def faults(work: Callable[[], object]) -> int:
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        work()
        return int(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)

    for _ in range(2):
        sampler.sample(logits, rows)
    control = faults(lambda: logits.to(torch.float32))
    if control < 1000:
        pytest.skip("this system hands memory out in huge pages, or keeps it")
    assert faults(lambda: sampler.sample(logits, rows)) < control / 4


def test_named_ids_of_a_prompt_are_scored_row_by_row() -> None:
    """In chunks too, against log-softmax in float64; a row's own ids, none of another's."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(150, 40, generator=generator) * 4
    targets = torch.randint(40, (150,), generator=generator).tolist()
    named = torch.randint(40, (150, 3), generator=generator).tolist()
    wanted = torch.log_softmax(logits.double(), -1)
    for row, scored in enumerate(prompt_logprobs(logits, targets, 2, named)):
        assert [i for i, _ in scored.token_id_logprobs] == named[row]
        for token_id, value in scored.token_id_logprobs:
            assert value == pytest.approx(float(wanted[row, token_id]), abs=1e-5)
        assert scored.rank == 1 + int((logits[row] > logits[row, targets[row]]).sum())
    assert prompt_logprobs(logits, targets)[0].token_id_logprobs == ()
