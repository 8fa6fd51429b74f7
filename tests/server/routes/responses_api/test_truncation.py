"""A conversation is shortened by few looks at it, none of them at far more than fits."""

from __future__ import annotations

from bisect import bisect_left

import pytest

from myserve.server.routes.responses_api.truncation import cuts_of, first_that_fits, without_oldest
from myserve.wire.chat import ChatMessage


@pytest.mark.parametrize("number", [1, 2, 3, 4, 7, 8, 33])
def test_it_is_the_first_that_fits(number: int) -> None:
    for first in range(number + 2):
        found = first_that_fits(number, lambda at, first=first: at >= first)
        assert found == min(bisect_left(range(number), True, key=lambda at: at >= first), number - 1)


def test_a_long_conversation_is_looked_at_where_it_is_short() -> None:
    messages = [ChatMessage(role="user", content="a") for _ in range(10_000)]
    cuts, looked_at = cuts_of(messages), []

    def fits(at: int) -> bool:
        looked_at.append(len(without_oldest(messages, cuts[at])))
        return looked_at[-1] <= 100

    assert len(without_oldest(messages, cuts[first_that_fits(len(cuts), fits)])) == 100
    assert len(looked_at) < 20 and max(looked_at) < 200
