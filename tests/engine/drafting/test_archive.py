"""Earlier completions are found by their prompt and their cache root alone, and are bounded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from myserve.engine.drafting.archive import Archive, prompt_key


def test_a_key_is_of_the_prompt_and_of_what_prefixes_share() -> None:
    assert prompt_key("a", [1, 2]) == prompt_key("a", (1, 2))
    assert (
        len(
            {
                prompt_key("a", [1, 2]),
                prompt_key("b", [1, 2]),
                prompt_key("a", [1, 2, 3]),
                prompt_key("a", [513]),
            }
        )
        == 4
    )


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), max_size=40))
def test_bounds_hold_and_the_newest_stay(added: list[tuple[int, int]]) -> None:
    archive = Archive(limit=30, per_prompt=10)
    for number, (key, length) in enumerate(added):
        archive.add(key, [number] * length)
        assert archive.num_tokens <= 30
        kept = list(archive.completions(key))
        assert sum(map(len, kept)) <= 10
        assert kept[-1:] == [[number] * min(length, 10)]
    assert archive.num_tokens == sum(sum(map(len, archive.completions(key))) for key in range(4))
