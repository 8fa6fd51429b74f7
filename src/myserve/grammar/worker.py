"""The process that tries a grammar first: what crashes, or never ends, does so here and not in the server.

A compiler of grammars is a parser of strangers' programs in native code: a chain of 20,000 references overflows its
stack, and no exception comes back from that. Reads a vocabulary, then a grammar a line, from standard input; answers
each with a line, its error or null. Started by `guard`.
"""

from __future__ import annotations

import json
import pickle
import resource
import sys
import time
from typing import BinaryIO

from myserve.core.grammar import Grammar
from myserve.errors import RequestError
from myserve.grammar.closing import Closer
from myserve.grammar.compiler import Compiler, Vocabulary, refusal

__all__ = ["main"]

CPU_SECONDS = 2  # for one grammar; common schemas take a few milliseconds
MEMORY = 2 << 30  # bytes of address space


def main(requests: BinaryIO, answers: BinaryIO) -> None:
    """Serve until standard input ends."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if hard < 0 else min(MEMORY, hard), hard))
    vocabulary: Vocabulary = pickle.load(requests)
    bytes_of = {data: token_id for token_id, data in enumerate(vocabulary.tokens) if len(data) == 1}
    # the real tokenizer stays where it is: here only how long the work takes counts, not which tokens come of it
    compiler = Compiler(vocabulary, lambda text: [bytes_of.get(bytes([byte]), 0) for byte in text.encode()])
    closer = Closer(vocabulary)
    for line in requests:
        _allow_more_time()
        answers.write(json.dumps(_error_of(Grammar(*json.loads(line)), compiler, closer)).encode() + b"\n")
        answers.flush()


def _error_of(grammar: Grammar, compiler: Compiler, closer: Closer) -> str | None:
    try:
        matcher = compiler.compile(grammar)
        closer.path(matcher)  # the first steps too: some grammars are too wide from the second token on
        if matcher.is_error():
            raise refusal(grammar, matcher.get_error())
    except RequestError as error:
        return str(error)
    return None


def _allow_more_time() -> None:
    """The kernel ends a process that passes its limit: by CPU time, which a busy machine does not use up."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + CPU_SECONDS, hard))


if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout.buffer)
