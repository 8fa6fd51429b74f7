"""Tiny random models of kinds that hold states, each in every way in which a state may come to be another's."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from benchmarks.mixed.passes import Way

__all__ = ["HYBRIDS", "WAYS", "made", "ways_with"]

# The gated delta rule and Kimi's; Mamba-2's scan alone, beside attention and shared; short convolutions.
HYBRIDS = ("qwen3_next", "kimi_linear", "nemotron_h", "falcon_h1", "zamba2", "lfm2")
# Each on its own process, so that all but the first are restarts; and on other numbers of threads.
WAYS = (
    Way("2 threads", ("--threads", "2")),
    Way(
        "in pieces",
        ("--threads", "1", "--prefill-chunk", "7", "--max-num-seqs", "8", "--max-num-batched-tokens", "23"),
    ),
    Way(
        "preempted",
        ("--threads", "3", "--num-blocks", "16", "--max-num-seqs", "16", "--speculation", "off"),
        "vllm:num_preemptions_total",
    ),
    Way("drafted", ("--threads", "2", "--speculation", "4"), "vllm:spec_decode_num_draft_tokens_total"),
)


def ways_with(passed_on: Sequence[str]) -> Sequence[Way]:
    """Return the ways of servers with more options: without exactness a server refuses drafts, as it should.

    >>> [way.name for way in ways_with(["--exact", "off"])]
    ['2 threads', 'in pieces', 'preempted']
    """
    is_exact = "off" not in _values("--exact", passed_on)
    return [way for way in WAYS if is_exact or not _drafts(way)]


def _drafts(way: Way) -> bool:
    return any(value != "off" for value in _values("--speculation", way.options))


def _values(flag: str, options: Sequence[str]) -> list[str]:
    """Return each value that a flag has among options, written with a space or with `=`."""
    apart = [value for name, value in pairwise(options) if name == flag]
    return apart + [option.partition("=")[2] for option in options if option.startswith(flag + "=")]


@contextmanager
def made(kind: str) -> Iterator[Path]:
    """Make a tiny model of a kind of `tools.models` in a folder of its own, in another process, which ends with it."""
    with tempfile.TemporaryDirectory() as folder:
        code = "import sys, pathlib; from tools.models.kinds import make; make(sys.argv[1], pathlib.Path(sys.argv[2]))"
        subprocess.run([sys.executable, "-c", code, kind, folder], check=True, capture_output=True)
        yield Path(folder)
