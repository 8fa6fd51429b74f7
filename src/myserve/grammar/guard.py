"""The server's end of the worker process: asks it about a grammar, and outlives it."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading

from myserve.core.grammar import Grammar
from myserve.errors import RequestError
from myserve.grammar.compiler import Vocabulary, refusal

__all__ = ["Guard"]

DEADLINE = 60.0  # seconds; CPU time is what bounds the work, this only a process that hangs


class Guard:
    """One worker, started with the first grammar and again after each that it did not survive. For one thread."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, grammar: Grammar) -> None:
        """Raises RequestError for a grammar that does not compile, or not within the worker's bounds."""
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        deadline = threading.Timer(DEADLINE, process.kill)
        deadline.daemon = True
        deadline.start()
        try:
            process.stdin.write(json.dumps([grammar.kind, grammar.source]).encode() + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        finally:
            deadline.cancel()
        if not answer.endswith(b"\n"):
            self.close()
            raise refusal(grammar, "compiling it takes too much time or memory; make it smaller")
        error = json.loads(answer)
        if error is not None:
            raise RequestError(error, param="grammar", code="invalid_grammar")

    def close(self) -> None:
        """End the worker."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()  # closes the pipes and takes the exit status
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "myserve.grammar.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._process.stdin is not None
        pickle.dump(self._vocabulary, self._process.stdin)
        return self._process
