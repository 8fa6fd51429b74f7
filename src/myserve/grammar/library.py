"""Compiled grammars of one model: each is checked, compiled once on a thread of its own, and kept while in use."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from llguidance import LLMatcher

from myserve.core.grammar import Grammar
from myserve.errors import RequestError
from myserve.grammar.closing import Closer
from myserve.grammar.compiler import Compiler, Vocabulary
from myserve.grammar.guard import Guard

__all__ = ["KEPT", "Compiled", "Library"]

KEPT = 256  # grammars; an ordinary one takes about 100 kB


@dataclass(frozen=True, slots=True, eq=False)
class Compiled:
    """A grammar that is ready: `matcher` stands before the first token and is copied, never moved."""

    matcher: LLMatcher
    closer: Closer
    shortest: int | None  # tokens of the shortest text that was found; None: none was


class Library:
    """Compiles on a thread of its own, one at a time; asking again is free. Any thread may call it."""

    def __init__(self, vocabulary: Vocabulary, encode: Callable[[str], list[int]]) -> None:
        self._vocabulary = vocabulary
        self._encode = encode
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="myserve-grammar")
        self._lock = threading.RLock()
        # the least recently asked for first
        self._futures: OrderedDict[Grammar, Future[Compiled]] = OrderedDict()
        self._tools: tuple[Guard, Compiler, Closer] | None = None  # the worker thread's

    async def prepare(self, grammar: Grammar) -> Compiled:
        """The compiled grammar, without holding up the event loop. Raises RequestError with the reason."""
        # shielded: a client that leaves must not cancel the work for those who wait with it
        return await asyncio.shield(asyncio.wrap_future(self._future(grammar)))

    def get(self, grammar: Grammar) -> Compiled:
        """Return the compiled grammar, waiting for it; at once where it has been prepared."""
        return self._future(grammar).result()

    def close(self) -> None:
        """End the worker thread and its process."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        if self._tools is not None:
            self._tools[0].close()

    def _future(self, grammar: Grammar) -> Future[Compiled]:
        with self._lock:  # reentrant: a future that is done at once calls back inside
            future = self._futures.get(grammar)
            if future is None:
                future = self._futures[grammar] = self._worker.submit(self._compile, grammar)
                future.add_done_callback(lambda done: self._forget_accident(grammar, done))
            self._futures.move_to_end(grammar)
            while len(self._futures) > KEPT:
                self._futures.popitem(last=False)  # a caller that waits for it holds its future
            return future

    def _forget_accident(self, grammar: Grammar, done: Future[Compiled]) -> None:
        """A refused grammar is refused again at once; what failed for another reason may be tried again."""
        if done.cancelled() or not isinstance(done.exception(), RequestError | None):
            self._futures.pop(grammar, None)

    def _compile(self, grammar: Grammar) -> Compiled:
        if self._tools is None:
            self._tools = (
                Guard(self._vocabulary),
                Compiler(self._vocabulary, self._encode),
                Closer(self._vocabulary),
            )
        guard, compiler, closer = self._tools
        guard.check(grammar)
        matcher = compiler.compile(grammar)
        path = closer.path(matcher.deep_copy())
        return Compiled(matcher, closer, None if path is None else len(path))
