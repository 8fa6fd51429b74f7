"""What a request's trace is told, by whoever answers it; without one nothing happens. `otel` makes traces."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Protocol

from starlette.types import Scope

from myserve.engine.outputs import RequestMetrics
from myserve.server.choice import Choice
from myserve.wire.fields import GenerationRequest


class Trace(Protocol):
    """One request's, while it is answered."""

    @property
    def trace_id(self) -> str: ...
    def record(
        self,
        request: GenerationRequest,
        response_id: str,
        choices: Sequence[Choice],
        costs: Sequence[RequestMetrics],
    ) -> None:
        """What was asked of the engine and what came of it; `costs` of each choice, ended or not."""

    def fail(self, error: Exception) -> None: ...
    def end(self, route: str, status: int, *, cut: bool) -> None: ...


class Traces(Protocol):
    """Makes them; None for a request that is not worth one."""

    def begin(self, scope: Scope, request_id: str) -> Trace | None: ...
    def close(self) -> None: ...


_current: ContextVar[Trace | None] = ContextVar("myserve_trace", default=None)


def follow(trace: Trace | None) -> None:
    """What the current task is told from here on is that trace's."""
    _current.set(trace)


def record(
    request: GenerationRequest, response_id: str, choices: Sequence[Choice], costs: Sequence[RequestMetrics]
) -> None:
    """`Trace.record`, if the current request is traced."""
    if (trace := _current.get()) is not None:
        trace.record(request, response_id, choices, costs)


def fail(error: Exception) -> None:
    """`Trace.fail`, likewise."""
    if (trace := _current.get()) is not None:
        trace.fail(error)
