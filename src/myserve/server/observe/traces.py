"""The interface of traces, and the current request's trace; without one, recording does nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Protocol

from starlette.types import Scope

from myserve.engine.outputs import RequestMetrics
from myserve.server.choice import Choice
from myserve.wire.fields import GenerationRequest

__all__ = ["Trace", "Traces", "fail", "follow", "record"]


class Trace(Protocol):
    """One request's trace, while it is answered."""

    @property
    def trace_id(self) -> str: ...
    def record(
        self,
        request: GenerationRequest,
        response_id: str,
        choices: Sequence[Choice],
        costs: Sequence[RequestMetrics],
    ) -> None:
        """Record the request's parameters and its choices; `costs` has each choice's, ended or not."""

    def fail(self, error: Exception) -> None: ...
    def end(self, route: str, status: int, *, cut: bool) -> None: ...


class Traces(Protocol):
    """Makes traces; None for a request that is not traced."""

    def begin(self, scope: Scope, request_id: str) -> Trace | None: ...
    def close(self) -> None: ...


_current: ContextVar[Trace | None] = ContextVar("myserve_trace", default=None)


def follow(trace: Trace | None) -> None:
    """Set the current task's trace."""
    _current.set(trace)


def record(
    request: GenerationRequest,
    response_id: str,
    choices: Sequence[Choice],
    costs: Callable[[], Sequence[RequestMetrics]],
) -> None:
    """Call `Trace.record` if the current request is traced; `costs` returns each choice's."""
    if (trace := _current.get()) is not None:
        trace.record(request, response_id, choices, costs())


def fail(error: Exception) -> None:
    """Call `Trace.fail` if the current request is traced."""
    if (trace := _current.get()) is not None:
        trace.fail(error)
