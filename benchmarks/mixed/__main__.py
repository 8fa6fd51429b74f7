"""Mixed requests alone, at once, staggered and after a restart, on several numbers of threads: equal bits.

    python -m benchmarks.mixed MODEL --threads 1,2,3,5,6 --dtype float32
    python -m benchmarks.mixed MODEL --dtype bfloat16 -- --max-num-batched-tokens 65 --prefill-chunk 13
    python -m benchmarks.mixed MODEL --dtype float32 --parity          # and transformers' own tokens
    python -m benchmarks.mixed --kinds                                 # six tiny hybrids, in float32 and bfloat16
    python -m benchmarks.mixed --kinds bamba,lfm3 --dtype bfloat16     # these kinds of `tools.models`

MODEL is a folder. What stands behind `--` goes to `myserve serve` as it is. The first number of threads sends the
requests one after another, whole or streamed as it comes; every other pass must give the same ids, text, logprobs,
alternatives, behaviour logprobs, scored prompts and finish reasons. `--kept FILE` keeps the first answers, so that a
later run, of another commit or with other options, is compared with them. `--kinds` sends the requests to tiny random
models in other ways: in pieces, preempted and drafted, each on a server of its own. Ends with status 1, and says each
difference; and where a server does not start or ends too soon, how it ended and what it said.
`-- --exact off` is the control: it must find some. (Without drafts: a server that is not exact refuses them.)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.mixed.hybrids import HYBRIDS, made, ways_with
from benchmarks.mixed.parity import compare_with_transformers
from benchmarks.mixed.passes import Way, compare_all, ways_of_threads
from benchmarks.mixed.requests import MixedRequest, mixed_requests
from benchmarks.mixed.server import Server, serving
from myserve.bench.load import BenchError


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a time limit's end ends the servers too
    ours, passed_on = _split(sys.argv[1:])
    parser = argparse.ArgumentParser(prog="benchmarks.mixed", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, nargs="?", help="a folder")
    parser.add_argument(
        "--kinds", nargs="?", const=",".join(HYBRIDS), help="tiny models; default: six hybrids"
    )
    parser.add_argument("--threads", default="1,2,3", help="numbers, with commas; the first is compared with")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=16, help="of most requests")
    parser.add_argument("--longest", type=int, default=300, help="tokens of the longest prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone-everywhere", action="store_true", help="one after another on each server")
    parser.add_argument("--kept", type=Path, help="answers to compare with; written where there are none")
    parser.add_argument(
        "--parity", action="store_true", help="compare with transformers.generate, in float32"
    )
    asked = parser.parse_args(ours)
    if (asked.model is None) == (asked.kinds is None):
        parser.error("give a folder or --kinds")
    if asked.model is not None:
        return int(
            _compared(asked, asked.model, ways_of_threads(_numbers(asked.threads)), asked.dtype, passed_on)
        )
    failed = False
    for kind in asked.kinds.split(","):
        with made(kind) as folder:
            for dtype in ("float32", "bfloat16") if asked.dtype == "auto" else (asked.dtype,):
                print(f"{kind}, {dtype}", flush=True)
                failed = _compared(asked, folder, ways_with(passed_on), dtype, passed_on) or failed
    return int(failed)


def _compared(
    asked: argparse.Namespace, model: Path, ways: Sequence[Way], dtype: str, passed_on: Sequence[str]
) -> bool:
    """Run all passes over one model and say what came of them; return whether something differs or did not run."""
    began, options = time.monotonic(), ["--dtype", dtype, *passed_on]
    try:
        failed = _all_passes(asked, model, ways, options)
    except BenchError as error:
        failed = True
        print(error, flush=True)
    print(f"{model} {' '.join(options)}: {time.monotonic() - began:.0f} s", flush=True)
    return failed


def _all_passes(asked: argparse.Namespace, model: Path, ways: Sequence[Way], options: Sequence[str]) -> bool:
    failed = False
    if asked.parity:
        with serving(model, [*options, "--dtype", "float32"]) as server:
            parity = compare_with_transformers(server, model)
        print("\n".join(parity.lines()), flush=True)
        failed = bool(parity.differences)
    if ways:
        vocab_size = _vocab_size(model)

        def requests(server: Server) -> list[MixedRequest]:
            return mixed_requests(
                server.model,
                count=asked.requests,
                seed=asked.seed,
                vocab_size=vocab_size,
                max_tokens=asked.max_tokens,
                longest=asked.longest,
            )

        report = asyncio.run(
            compare_all(
                model,
                requests,
                ways=ways,
                options=options,
                seed=asked.seed,
                alone_everywhere=asked.alone_everywhere,
                kept=asked.kept,
            )
        )
        print("\n".join(report.lines()))
        failed = failed or bool(report.differences)
    return failed


def _numbers(threads: str) -> list[int]:
    return [int(count) for count in threads.split(",") if count]


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What is ours, and what stands behind `--`."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def _vocab_size(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text())
    size: int = config.get("text_config", config)["vocab_size"]
    return size


if __name__ == "__main__":
    sys.exit(main())
