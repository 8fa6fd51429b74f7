"""Random requests over all fields at once, in batches, against a plain loop: no fault, no difference, no dead engine.

    python -m benchmarks.combine                          # a minute
    python -m benchmarks.combine --seconds 3600 --seed 7

Serves two tiny random models, dense and mixture of experts, on a socket. Each round sends a handful of requests at
once, some streamed, and each of them again alone and the other way; then a plain loop over a trainer's `exact_forward`
model draws them. Held: a number outside its declared range is a 400 that names the field; no answer is a 5xx; alone
as in company, streamed as whole; ids, logprobs and sampling logprobs are the plain loop's, bit for bit; greedy ids are
transformers' argmax; what the original specification knows is what its `sample_generate` draws; the engines live.
Ends with status 1, and prints each request that breaks one of these.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.combine.fuzzer import fuzz


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.combine", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=6, help="requests of a round")
    parser.add_argument("--most", type=int, default=20, help="stop after so many findings")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = asyncio.run(
            fuzz(Path(folder), seconds=asked.seconds, seed=asked.seed, at_once=asked.at_once, most=asked.most)
        )
    for finding in report.findings:
        print(f"\n{finding.words}\n{json.dumps(finding.body)}")
    print(f"\n{report.summary}")
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
