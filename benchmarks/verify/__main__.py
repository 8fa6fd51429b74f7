"""Runs `myserve verify` many times against our own server: with each fault planted, and with none; and replays.

python -m benchmarks.verify --runs 200    # no check may fail
python -m benchmarks.verify --faults      # each fault is found by its check, and by no other
python -m benchmarks.verify --replays 1000    # recorded samples of every mode are identical, edited ones are caught
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from benchmarks.verify.faulty import FAULTS, FaultySampler
from benchmarks.verify.replays import replay_modes
from myserve.embedded import embedded_model_path
from myserve.server.app import create_app
from myserve.server.settings import Settings
from myserve.verify.run import verify

__all__ = ["serving"]


@contextmanager
def serving(settings: Settings | None = None) -> Iterator[tuple[str, FaultySampler]]:
    """Serve our app, the embedded model by default, behind a layer of faults; give its URL and the layer."""
    demo = Settings(models={"myserve-demo": str(embedded_model_path())}, tool_style="hermes")
    faulty = FaultySampler(create_app(settings or demo))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(faulty, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", faulty
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=0, help="runs without a fault")
    parser.add_argument("--faults", action="store_true", help="a whole run for each fault")
    parser.add_argument("--draws", type=int, default=600)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--replays", type=int, default=0, help="recorded choices that are replayed")
    options = parser.parse_args()
    with serving() as (url, faulty):
        wrong = _with_faults(url, faulty, options.draws) if options.faults else 0
        faulty.fault = None
        wrong += replay_modes(url, options.replays) if options.replays else 0
        wrong += _without(url, options.runs, options.first_seed, options.draws)
    sys.exit(wrong > 0)


def _with_faults(url: str, faulty: FaultySampler, draws: int) -> int:
    wrong = 0
    for name, planted in FAULTS.items():
        faulty.fault = name
        run = asyncio.run(verify(url, draws=draws, seed=1))
        found = [result.id for result in run.results if result.status == "failed"]
        wrong += found != [planted.check]
        print(f"{'ok   ' if found == [planted.check] else 'WRONG'} {name}: found by {found}", flush=True)
    return wrong


def _without(url: str, runs: int, first_seed: int, draws: int) -> int:
    alarms: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    for number in range(runs):
        run = asyncio.run(verify(url, draws=draws, seed=first_seed + number))
        for result in run.results:
            alarms[result.id] += result.status == "failed"
            skipped[result.id] += result.status == "skipped"
            if result.status == "failed":
                print(f"seed {first_seed + number}: {result.id}: {result.evidence}", flush=True)
        if (number + 1) % 10 == 0:
            print(f"{number + 1} runs, {alarms.total()} false alarms, {skipped.total()} skipped", flush=True)
    return alarms.total()


if __name__ == "__main__":
    main()
