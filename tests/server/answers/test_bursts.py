"""A step's events: in one burst, the same bytes whether made from a template or by the writer, whatever fails."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from myserve.engine.outputs import Delta
from myserve.errors import NonFiniteLogitsError
from myserve.server.answers import bursts
from myserve.server.answers.bursts import bursts_of
from myserve.server.answers.streaming import to_json
from myserve.server.answers.writer import AnswerWriter
from myserve.wire.sse import SSEDecoder

PROMPT = [5, 6, 7, 8, 9, 40, 41, 42]
COMPLETION = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "seed": 3, "temperature": 1.5}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 24, "seed": 3}
WITH_USAGE = {"stream_options": {"include_usage": True}}
PLAIN: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", COMPLETION),
    ("/v1/completions", COMPLETION | WITH_USAGE | {"n": 3, "stop": ["e", "\n"]}),
    ("/v1/completions", COMPLETION | {"prompt": [PROMPT, PROMPT[:3]], "echo": True}),
    ("/v1/completions", COMPLETION | {"stream_interval": 3, "skip_special_tokens": False}),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CHAT | WITH_USAGE | {"n": 2, "logit_bias": {"7": 5}}),
]
USAGE_SO_FAR = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
FULL: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", COMPLETION | {"logprobs": 2}),
    ("/v1/completions", COMPLETION | {"return_token_ids": True}),
    ("/v1/completions", COMPLETION | {"token_arrays": True, "logprobs": 1}),
    ("/v1/completions", COMPLETION | USAGE_SO_FAR),
    ("/v1/completions", COMPLETION | {"return_drafters": True}),
    ("/v1/chat/completions", CHAT | {"logprobs": True, "delta_logprobs": True}),
    ("/v1/chat/completions", CHAT | USAGE_SO_FAR),
]


def events_of(server: Any, path: str, body: dict[str, Any]) -> list[bytes]:
    """A stream's events, choice by choice, without what no two answers share."""
    answer = httpx.post(server.url + path, json=body | {"stream": True}, timeout=60)
    assert answer.status_code == 200, answer.text
    raw = re.sub(rb'"id":"[^"]*"|"created":\d+', b"", answer.content)
    events = SSEDecoder().feed_data(raw)
    return sorted(events, key=lambda data: (re.search(rb'"index":(\d+)', data) or [b"", b"999"])[1])


@pytest.fixture
def templates_made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every event that a template has made."""
    made: list[Any] = []
    original = AnswerWriter.text_event

    def counted(self: Any, choice: Any, delta: Any) -> Any:
        event = original(self, choice, delta)
        made.extend(event or ())
        return event

    monkeypatch.setattr(AnswerWriter, "text_event", counted)
    return made


@pytest.mark.parametrize(("path", "body"), PLAIN)
def test_events_from_a_template_are_those_of_the_writer(
    server: Any, path: str, body: dict[str, Any], templates_made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from_templates = events_of(server, path, body)
    assert len(templates_made) > 3
    monkeypatch.setattr(AnswerWriter, "text_event", lambda *_: None)
    assert from_templates == events_of(server, path, body)


@pytest.mark.parametrize(("path", "body"), FULL)
def test_what_differs_in_more_than_its_text_has_no_template(
    server: Any, path: str, body: dict[str, Any], templates_made: list[Any]
) -> None:
    assert events_of(server, path, body) and not templates_made


class Writer(AnswerWriter[Any]):
    """Says the index, the text and the fingerprint."""

    def whole(self, choices: Any) -> Any:
        raise NotImplementedError

    def gained(self, choice: Any, delta: Delta) -> Iterator[Any]:
        yield {"i": choice.index, "fp": self.answer.fingerprint, "text": delta.text}

    def ended(self, choices: Any) -> Iterator[Any]:
        yield {"end": len(choices)}


class Templated(Writer):
    def is_text_alone(self, choice: Any) -> bool:
        return True


def answer_of(weight_version: int = 0) -> Any:
    return SimpleNamespace(
        request=SimpleNamespace(perf_metrics_in_response=None),
        fingerprint=f"fp_{weight_version}",
        keep=lambda choice, said: None,
    )


class Listing(Templated):
    """Has a field of tokens that it did not declare."""

    def gained(self, choice: Any, delta: Delta) -> Iterator[Any]:
        for event in super().gained(choice, delta):
            yield event | {"ids": [token.token_id for token in delta.tokens]}


def test_a_field_of_tokens_that_was_not_declared_makes_no_template() -> None:
    assert Templated(answer_of()).text_event(SimpleNamespace(index=0), Delta(0, "a")) is not None  # type: ignore[arg-type]
    assert Listing(answer_of()).text_event(SimpleNamespace(index=0), Delta(0, "a")) is None  # type: ignore[arg-type]


def test_a_template_is_made_anew_for_new_weights() -> None:
    writer, choice = Templated(answer := answer_of()), SimpleNamespace(index=4)
    for version, text in ((0, "a"), (0, '\u20ac"'), (1, "b\n"), (1, ""), (0, "c")):
        answer.fingerprint = f"fp_{version}"
        made = writer.text_event(choice, Delta(4, text))  # type: ignore[arg-type]
        (body,) = writer.gained(choice, Delta(4, text))
        assert made == (writer.encode(to_json(body)),)
    assert writer.text_event(choice, Delta(4, "d", finish_reason="stop")) is None  # type: ignore[arg-type]


class Steps:
    """A generation of two choices whose steps are given; an exception among the deltas is raised in its place."""

    def __init__(self, *steps: list[Delta | Exception]) -> None:
        self.choices = [SimpleNamespace(index=0), SimpleNamespace(index=1)]
        self._steps = steps

    async def steps(self) -> AsyncGenerator[Iterator[tuple[Any, Delta]], None]:
        for step in self._steps:
            await asyncio.sleep(0)
            yield self._taken(step)

    def _taken(self, step: list[Delta | Exception]) -> Iterator[tuple[Any, Delta]]:
        for delta in step:
            if isinstance(delta, Exception):
                raise delta
            yield self.choices[delta.index], delta


LAST = [Delta(0, "e", finish_reason="stop"), Delta(1, "f", finish_reason="stop")]


async def read(generation: Any, into: list[bytes], writer: type[Writer] = Writer) -> None:
    answer = answer_of()
    async for burst in bursts_of(answer, writer(answer), generation):
        into.append(burst)  # noqa: PERF401 -- what came before a failure stays


@pytest.mark.parametrize("writer", [Writer, Templated])
def test_a_step_is_one_burst_and_the_end_goes_with_the_last(writer: type[Writer]) -> None:
    got: list[bytes] = []
    asyncio.run(read(Steps([Delta(0, "a"), Delta(1, "b")], [Delta(0, "c")], [], LAST), got, writer))
    assert [burst.count(b"data: ") for burst in got] == [2, 1, 4]
    assert got[-1].endswith(b'data: {"end":2}\n\ndata: [DONE]\n\n')


def test_what_came_before_a_failure_is_told_and_nothing_behind_it() -> None:
    got: list[bytes] = []
    failing = Steps([Delta(0, "a")], [Delta(0, "b"), NonFiniteLogitsError("NaN"), Delta(1, "c")])
    with pytest.raises(NonFiniteLogitsError):
        asyncio.run(read(failing, got))
    assert [event[-3:-1] for burst in got for event in SSEDecoder().feed_data(burst)] == [b'a"', b'b"']


def test_the_choices_of_a_step_do_not_keep_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events that are all there at once give the loop back in between."""
    monkeypatch.setattr(bursts, "LOOP_SECONDS", 0.0)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def run() -> list[bytes]:
        got: list[bytes] = []
        other = asyncio.ensure_future(others())
        await read(Steps([Delta(0, str(i)) for i in range(100)], LAST), got)
        other.cancel()
        return got

    got = asyncio.run(run())
    assert turns >= 99
    assert sum(burst.count(b"data: ") for burst in got) == 104
