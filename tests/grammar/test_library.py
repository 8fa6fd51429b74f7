"""What a grammar may be, what is refused and why; and what compiling one may do to everybody else: nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from myserve.core.grammar import MAX_SOURCE, Grammar
from myserve.errors import RequestError
from myserve.grammar.closing import Closer
from myserve.grammar.compiler import Compiler, Vocabulary
from myserve.grammar.guard import Guard
from myserve.grammar.library import Library

# every byte, an EOS, and a few words
TOKENS = [bytes([byte]) for byte in range(256)] + [b"<eos>", b'"a":', b"true", b"", b"}}"]
VOCABULARY = Vocabulary(TOKENS, frozenset({256}), (256,))

CHAIN = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(7000)} | {"a7000": {"type": "string"}}
REFUSED: dict[str, tuple[Grammar, str]] = {
    "no regex": (Grammar("regex", "(a"), "this regex cannot be used: .*unclosed group"),
    "look-ahead": (Grammar("regex", "(?=a)b"), "look-around"),
    "no grammar": (Grammar("lark", "start: foo"), "unknown name"),
    "an unknown keyword": (Grammar.json_schema({"not": {}}), 'this JSON schema cannot be used: .*"not"'),
    "nothing fits": (
        Grammar.json_schema({"type": "object", "properties": {"a": False}, "required": ["a"]}),
        "unsatisfiable",
    ),
    "its own definition": (
        Grammar.json_schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
        "cannot be used",
    ),
    "a crash of the compiler": (
        Grammar.json_schema({"$ref": "#/$defs/a0", "$defs": CHAIN}),
        "time or memory",
    ),
    "too many optional properties": (
        Grammar.json_schema({"type": "object", "properties": {f"p{i}": {} for i in range(1500)}}),
        "max is|too many items",
    ),
    "too many parts": (
        Grammar.json_schema(
            {
                "allOf": [
                    {"anyOf": [{"properties": {f"p{i}_{j}": {"type": "string"}}} for j in range(4)]}
                    for i in range(12)
                ]
            }
        ),
        "too large|time or memory",
    ),
    "a lone surrogate": (Grammar("regex", "\ud800"), "cannot be used"),
}


def plain_bytes(text: str) -> list[int]:
    return list(text.encode())


@pytest.fixture(scope="module")
def library() -> Iterator[Library]:
    library = Library(VOCABULARY, plain_bytes)
    yield library
    library.close()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_with_the_reason(library: Library, name: str) -> None:
    grammar, reason = REFUSED[name]
    with pytest.raises(RequestError, match=f"(?is){reason}") as refused:
        library.get(grammar)
    assert refused.value.param == "grammar"
    assert len(str(refused.value)) < 500


def test_others_compile_before_and_after_a_crash(library: Library) -> None:
    fine = Grammar.json_schema({"type": "integer", "minimum": 3})
    with pytest.raises(RequestError):
        library.get(REFUSED["a crash of the compiler"][0])
    assert library.get(fine).shortest == 2


def test_control_the_worker_really_crashes() -> None:
    """The chain of references overflows the compiler's stack: in this process it would end the tests."""
    guard = Guard(VOCABULARY)
    try:
        guard.check(Grammar.json_object())
        worker = guard._process
        assert worker is not None and worker.poll() is None
        with pytest.raises(RequestError):
            guard.check(REFUSED["a crash of the compiler"][0])
        assert worker.returncode not in (0, None)
    finally:
        guard.close()


def test_a_grammar_is_compiled_once_however_many_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(VOCABULARY, plain_bytes)
    seen: list[Grammar] = []
    compile_one = library._compile
    monkeypatch.setattr(library, "_compile", lambda grammar: seen.append(grammar) or compile_one(grammar))
    grammars = [Grammar("regex", "a{3}"), Grammar("regex", "b")]
    try:
        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(library.get, grammars * 8))

        async def prepare() -> list[Any]:
            return await asyncio.gather(*(library.prepare(grammar) for grammar in grammars))

        assert asyncio.run(prepare()) == made[:2]
        assert sorted(grammar.source for grammar in seen) == ["a{3}", "b"]
    finally:
        library.close()


def test_the_least_recently_used_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("myserve.grammar.library.KEPT", 2)
    library = Library(VOCABULARY, plain_bytes)
    try:
        first, second, third = (Grammar("regex", source) for source in "abc")
        kept = library.get(first)
        dropped = library.get(second)
        assert library.get(first) is kept
        library.get(third)
        assert library.get(first) is kept
        assert library.get(second) is not dropped
    finally:
        library.close()


def test_sizes_are_bounded() -> None:
    with pytest.raises(RequestError, match="between 1 and"):
        Grammar("regex", "x" * (MAX_SOURCE + 1))


CLOSED: list[tuple[Callable[[], Grammar], str, str]] = [
    (lambda: Grammar.json_object(), "", "{}"),
    (lambda: Grammar.json_object(), '{"a": [1, {"b": "x\\', '""}]}'),
    (lambda: Grammar.json_object(), '{"a": "é', '"}'),
    (lambda: Grammar("regex", "[a-z]+(-[0-9]{2})*;"), "ab-1", "0;"),
    (lambda: Grammar("regex", "a*"), "aaa", ""),
    (lambda: Grammar.choice(["yes", "no"]), "y", "es"),
    (
        lambda: Grammar.json_schema(
            {
                "type": "object",
                "properties": {"when": {"type": "string", "format": "date"}, "n": {"type": "integer"}},
                "required": ["when", "n"],
                "additionalProperties": False,
            }
        ),
        '{"when":"20',
        '00-01-01","n":0}',
    ),
]


@pytest.mark.parametrize("case", range(len(CLOSED)))
def test_an_ending_is_found_from_anywhere(case: int) -> None:
    make, begun, ending = CLOSED[case]
    matcher = Compiler(VOCABULARY, plain_bytes).compile(make())
    assert matcher.consume_tokens(plain_bytes(begun))
    path = Closer(VOCABULARY).path(matcher)
    assert path is not None
    closed = b"".join(TOKENS[i] for i in path).decode()
    assert closed == ending
    if make() == Grammar.json_object():
        json.loads(begun + closed)
