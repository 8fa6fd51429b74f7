"""Long lists of ids are read once for a request, and change scores as short ones do, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from myserve.core.batched import edits
from myserve.core.batched.edits import ScoreScratch, edit
from myserve.core.params import SamplingParams
from myserve.core.rows import BadWordIndex, BadWords, RowState

V = 40
IDS = st.integers(0, V - 1)


def row(params: SamplingParams) -> RowState:
    return RowState(params, seed=1, sample_index=0, prompt_token_ids=[1, 2], vocab_size=V, eos_token_ids=[0])


def edited(asked: list[dict[str, Any]], long: int) -> torch.Tensor:
    raw = torch.randn(len(asked), V, generator=torch.Generator().manual_seed(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edits, "LONG", long)
        return edit(raw, [row(SamplingParams(**one)) for one in asked], ScoreScratch()).clone()


@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "allowed_token_ids": st.lists(IDS, min_size=1, max_size=60).map(tuple),
                "logit_bias": st.dictionaries(IDS, st.floats(-120, 120, width=32)),
                "bad_words_ids": st.lists(st.lists(IDS, min_size=1, max_size=3).map(tuple), max_size=9).map(
                    tuple
                ),
            },
        ),
        min_size=1,
        max_size=4,
    )
)
def test_long_lists_change_scores_as_short_ones_do(asked: list[dict[str, Any]]) -> None:
    assert torch.equal(edited(asked, long=0), edited(asked, long=1000))


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), min_size=1, max_size=12),
    st.lists(st.integers(0, 3), max_size=8),
    st.integers(0, 8),
)
def test_bad_words_by_index_are_those_that_the_text_could_complete(
    words: list[tuple[int, ...]], text: list[int], cut: int
) -> None:
    tracked = BadWords(BadWordIndex(words), text[:cut])
    for token_id in text[cut:]:
        tracked.append(token_id)
    plain = {word[-1] for word in words if not word[:-1] or tuple(text[-len(word) + 1 :]) == word[:-1]}
    assert set(tracked.completions()) == plain


def test_what_a_request_asks_is_read_once_for_all_its_choices_and_prompts() -> None:
    params = SamplingParams(
        allowed_token_ids=tuple(range(30)), logit_bias=dict.fromkeys(range(30), 1.0), seed=1
    )
    rows = [row(one) for one in (params, params, params.with_seed(2))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edits, "LONG", 10)
        edit(torch.zeros(3, V), rows, ScoreScratch())
        made = dict(params.with_seed(3)._derived)
        edit(torch.zeros(3, V), rows, ScoreScratch())
    assert made and made == params._derived
    assert SamplingParams(allowed_token_ids=(1,)).derived("allowed", lambda: 5) == 5
