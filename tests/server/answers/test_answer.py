"""Usage so far is the usage of the choices so far, whatever order their deltas come in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from myserve.engine.outputs import Delta, RequestMetrics, TokenOutput
from myserve.server.answers.answer import UsageSoFar, usage_of
from myserve.server.choice import Choice

TOKEN = TokenOutput(5, -1.0, -1.0)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.booleans()), max_size=20))
def test_usage_so_far_is_the_usage_so_far(gained: list[tuple[int, int, bool]]) -> None:
    choices = [Choice(index, index // 2, [1] * (3 + index // 2), seed=1) for index in range(6)]
    so_far = UsageSoFar(choices)
    for index, count, ends in gained:
        choice = choices[index]
        if choice.last is not None:
            continue
        metrics = RequestMetrics(prompt_tokens=len(choice.prompt_token_ids), cached_tokens=index + 1)
        delta = Delta(index % 2, "", (TOKEN,) * count)
        if ends:
            delta = Delta(index % 2, "", (TOKEN,) * count, (TOKEN,), finish_reason="stop", metrics=metrics)
        choice.add(delta)
        assert so_far.add(choice, delta) == usage_of(choices)
