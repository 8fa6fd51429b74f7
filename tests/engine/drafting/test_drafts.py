"""Drafts come from a request's own text and from completions of its prompt, within one cache root alone."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import pytest

from myserve.engine.drafting import drafts as drafts_module
from myserve.engine.drafting.drafts import NGRAM, SIBLING, Draft, Drafts


@dataclass(eq=False)
class Growing:
    prompt_token_ids: list[int]
    cache_root: Hashable = "mine"
    token_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)


def propose(drafts: Drafts, request: Growing, most: int) -> Draft | None:
    return drafts.propose([(request, most)])[0]


def test_the_prompt_and_the_completion_are_copied_from() -> None:
    drafts, request = Drafts(), Growing([1, 2, 3, 4, 5, 9])
    request.token_ids += [1, 2]
    draft = propose(drafts, request, 3)
    assert draft is not None and (draft.token_ids, draft.drafter) == ((3, 4, 5), NGRAM)
    request.token_ids += [7, 8, 1, 2, 7]
    draft = propose(drafts, request, 2)
    assert draft is not None and draft.token_ids == (8, 1)
    request.token_ids += [50]
    assert propose(drafts, request, 3) is None


def test_siblings_and_earlier_completions_of_the_prompt_are_copied_from() -> None:
    drafts, first, second = Drafts(), Growing([1, 2]), Growing([1, 2])
    first.token_ids += [10, 11, 12, 13]
    second.token_ids += [10, 11]
    propose(drafts, first, 3)
    draft = propose(drafts, second, 3)
    assert draft is not None and (draft.token_ids, draft.drafter) == ((12, 13), SIBLING)
    for request in (first, second):
        drafts.end(request)
    later = Growing([1, 2])
    later.token_ids += [10]
    draft = propose(drafts, later, 3)
    assert draft is not None and (draft.token_ids, draft.drafter) == ((11, 12, 13), SIBLING)
    drafts.end(later)
    drafts.end(later)  # idempotent


def test_another_cache_root_or_prompt_shares_nothing() -> None:
    drafts, first = Drafts(), Growing([1, 2])
    first.token_ids += [10, 11, 12, 13]
    propose(drafts, first, 3)
    drafts.end(first)
    for other in (Growing([1, 2], cache_root="another"), Growing([1, 2, 2])):
        other.token_ids += [10]
        assert propose(drafts, other, 3) is None


def test_a_request_whose_drafts_are_wrong_is_drafted_less() -> None:
    drafts, request = Drafts(), Growing([1, 2, 3] * 20)
    chances = []
    for token in range(100, 130):
        request.token_ids += [1, 2]
        draft = propose(drafts, request, 4)
        chances.append(0.0 if draft is None else draft.chances[0])
        request.token_ids.append(token)  # not the 3 that is proposed
        propose(drafts, request, 4)
    assert chances[-1] < chances[0] / 4


def test_a_long_prompt_is_read_in_pieces_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts_module, "READ_AT_ONCE", 100)
    monkeypatch.setattr(drafts_module, "INDEXED_TOKENS", 400)
    monkeypatch.setattr(drafts_module, "ALWAYS_INDEXED", 50)
    drafts = Drafts()
    first = Growing(list(range(1000)))
    first.token_ids += [990]  # 390 of the last 400 tokens that are read
    seen = [propose(drafts, first, 2) is not None for _ in range(4)]
    assert seen == [False, False, False, True]
    second = Growing([*range(2000, 2060), 5])
    second.token_ids += [2005]  # beyond the bound: of its 61 tokens the last 50
    assert propose(drafts, second, 2) is None
    second.token_ids += [2030]
    draft = propose(drafts, second, 2)
    assert draft is not None and draft.token_ids == (2031, 2032)


def test_chances_fall_along_a_draft() -> None:
    drafts, request = Drafts(), Growing([*list(range(30)), 0, 1, 2])
    request.token_ids += [3]
    draft = propose(drafts, request, 15)
    assert draft is not None and len(draft.chances) == len(draft.token_ids) == 15
    assert list(draft.chances) == sorted(draft.chances, reverse=True)
