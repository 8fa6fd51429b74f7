"""Numbers of JSON texts are finite, whatever the model would write; nothing else of a text is held back."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from myserve.core.grammar import Grammar
from myserve.core.params import SamplingParams
from myserve.engine.constraints.json_numbers import (
    EXPONENT_DIGITS,
    INTEGER_DIGITS,
    NumberBounds,
    NumberState,
)
from myserve.engine.engine import Engine
from runs import Asked, run

# Characters, and tokens of several as vocabularies have them.
TOKENS = [bytes([i]) for i in range(256)]
TOKENS += [
    b"00",
    b"523",
    b"1e9",
    b"E52",
    b"2e999",
    b"e-1234",
    b'"1e',
    b'e999"',
    b"+123",
    b", ",
    b" 3E5235",
    b'{"e123": ',
]
BOUNDS = NumberBounds(TOKENS)
NUMBER = re.compile(r'"(?:\\.|[^"\\])*(?:"|\\?\Z)|(-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)')


def walk(draw: random.Random, pieces: list[bytes]) -> str:
    """A text of tokens that begin as `pieces` and go on at random, each one that the state lets by."""
    state, text = BOUNDS.begin(), b""
    for piece in pieces:
        state.feed(piece)
        text += piece
    for _ in range(40):
        mask = torch.full((-(-len(TOKENS) // 32),), -1, dtype=torch.int32)
        state.forbid(mask)
        ids = draw.choices([*range(48, 58), 101, 69, 43, 45, 46, 44, 34, 92, *range(256, len(TOKENS))], k=50)
        token = next(i for i in ids if int(mask[i >> 5]) >> (i & 31) & 1)
        state.append(token)
        text += TOKENS[token]
    return text.decode()


@given(
    seed=st.integers(0, 1 << 30), start=st.sampled_from([[], [b"[1"], [b"9" * 198], [b'"a\\"', b'"', b"1e"]])
)
@settings(max_examples=200, deadline=None)
def test_no_number_of_any_text_is_beyond(seed: int, start: list[bytes]) -> None:
    for found in NUMBER.finditer(walk(random.Random(seed), start)):
        if (number := found[1]) is not None:
            assert math.isfinite(float(number)), number


def test_a_second_sign_ends_an_exponent_and_begins_a_number() -> None:
    state = BOUNDS.begin()
    state.feed(b"1e--77E52")
    mask = torch.full((9,), -1, dtype=torch.int32)
    state.forbid(mask)
    assert not int(mask[ord("5") >> 5]) >> (ord("5") & 31) & 1


def test_inside_a_string_nothing_is_held_back() -> None:
    state = BOUNDS.begin()
    state.feed(b'{"a": "x\\"1e99')
    mask = torch.full((9,), -1, dtype=torch.int32)
    state.forbid(mask)
    assert (mask == -1).all()


def test_where_a_grammar_leaves_nothing_else_it_has_its_way() -> None:
    state = BOUNDS.begin()
    state.feed(b"1e99")
    mask = torch.zeros(9, dtype=torch.int32)
    mask[ord("5") >> 5] = 1 << (ord("5") & 31)
    state.forbid(mask)
    assert mask.any()


SCHEMAS = [
    {"type": "number"},
    {"type": "integer"},
    {"type": "array", "items": {"type": "number", "minimum": 0}, "minItems": 2},
    {},
    {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]},
]


def digits_and_exponents(engine: Engine) -> list[Asked]:
    """Requests whose model would write nothing but digits and exponents."""
    table = engine.constraints._table
    wished = [i for i in range(len(table)) if table[i] in (b"9", b"E", b"5", b"+", b"1")]
    bias = {i: 60.0 + 3 * number for number, i in enumerate(wished)}
    return [
        Asked(
            [60, 61, 62],
            SamplingParams(
                max_tokens=320, seed=i, temperature=5.0, logit_bias=bias, grammar=Grammar.json_schema(schema)
            ),
        )
        for i, schema in enumerate(SCHEMAS)
    ]


def values(value: object) -> list[object]:
    if isinstance(value, dict | list):
        return [v for inner in (value.values() if isinstance(value, dict) else value) for v in values(inner)]
    return [value]


def finite(text: str) -> bool:
    found = [float(v) for v in values(json.loads(text)) if isinstance(v, int | float) and len(str(v)) < 5000]
    return all(map(math.isfinite, found))


def test_a_served_models_numbers_are_finite(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine("llama")
    texts = [choice.text for [choice] in run(engine, digits_and_exponents(engine))]
    assert all(map(finite, texts)), texts
    numbers = [found[1] for text in texts for found in NUMBER.finditer(text) if found[1]]
    assert any(len(re.split("[.eE]", number)[0]) > INTEGER_DIGITS - 4 for number in numbers)
    assert any(re.search(f"[eE][+-]?[0-9]{{{EXPONENT_DIGITS}}}", number) for number in numbers)


def test_control_without_bounds_they_are_not(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NumberState, "forbid", lambda *_: None)
    engine = make_engine("llama")
    texts = [choice.text for [choice] in run(engine, digits_and_exponents(engine))]

    def beyond(text: str) -> bool:
        try:
            return not finite(text)
        except OverflowError:  # an integer that no float64 holds
            return True

    assert any(map(beyond, texts))
