"""A fleet under fire: streams of every shape while replicas are killed and weights change; each answer is compared.

Starts a single server and a fleet, has the single one say what is right, and prints what was lost (nothing may be) and
what was moved.

    python -m benchmarks.fleet                                                # the embedded model, two replicas
    python -m benchmarks.fleet --model tiny --hang-every 60 --controller-every 45
    python -m benchmarks.fleet --replicas 1 --max-replicas 4 --wave 60        # replicas come and go with the load
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import aiohttp
import psutil

from benchmarks.combine.tiny import write_model
from benchmarks.fleet.requests import Asked, Told, ask, requests
from benchmarks.fleet.serving import MODEL, Serving, is_well, replicas_of, serving
from myserve.embedded import embedded_model_path


async def right_answers(server: Serving, asked: list[Asked]) -> list[Told]:
    async with aiohttp.ClientSession() as session:
        await is_well(session, server)
        told = [await ask(session, server.url, request) for request in asked]
        strange = {t.status for t in told} - {200}
        if strange:
            raise SystemExit(f"the single server answered {strange}")
        return told


class Soak:
    """What happened."""

    def __init__(
        self, fleet: Serving, asked: list[Asked], want: list[Told], args: argparse.Namespace
    ) -> None:
        self.fleet, self.asked, self.want, self.args = fleet, asked, want, args
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.versions: Counter[int] = Counter()
        # how many replicas took requests, second by second
        self.seen: Counter[int] = Counter()
        self.end = time.monotonic() + args.seconds

    async def run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=600)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            await is_well(session, self.fleet, self.args.replicas)
            work = [self._stream(session, number) for number in range(self.args.streams)]
            faults = [self._kill(), self._hang(), self._kill_controller(), self._load(session)]
            faults.append(self._count(session))
            others = [asyncio.ensure_future(fault) for fault in faults]
            await asyncio.gather(*work)
            for other in others:
                other.cancel()
            async with session.get(self.fleet.url + "/metrics") as response:
                for line in (await response.text()).splitlines():
                    if line.startswith(("myserve:moved", "myserve:routed")):
                        print(line)

    async def _stream(self, session: aiohttp.ClientSession, number: int) -> None:
        rng = random.Random(number)
        while (now := time.monotonic()) < self.end:
            # three of four streams rest in every second wave
            if number % 4 and self.args.wave and int((self.end - now) / self.args.wave) % 2:
                await asyncio.sleep(1.0)
                continue
            at = rng.randrange(len(self.asked))
            try:
                told = await ask(session, self.fleet.url, self.asked[at])
            except Exception as error:
                self.counts["lost"] += 1
                self.wrong.append(f"{self.asked[at].name}: {error!r}"[:300])
                continue
            self._judge(self.asked[at], told, self.want[at])
            if told.status == 503:
                await asyncio.sleep(1.0)

    def _judge(self, asked: Asked, told: Told, want: Told) -> None:
        """Versions are of the same weights here, so an answer is right whatever drew it; its number may differ."""
        self.versions.update(told.weight_versions)
        if told.status != 200:
            self.counts[f"status {told.status}"] += 1
            return
        mixed = any(b'"weight_version_spans"' in choice for choice in told.choices)
        self.counts["of two versions, told by spans" if mixed else "of one version"] += 1
        if [_unversioned(c) for c in told.choices] != [_unversioned(c) for c in want.choices]:
            self.counts["wrong"] += 1
            self.wrong.append(asked.name)

    async def _count(self, session: aiohttp.ClientSession) -> None:
        while True:
            await asyncio.sleep(1.0)
            self.seen[len(await replicas_of(session, self.fleet))] += 1

    async def _kill(self) -> None:
        while self.args.kill_every:
            await asyncio.sleep(self.args.kill_every)
            replicas = self.fleet.processes("FleetReplica")
            if len(replicas) > 1:
                os.kill(random.choice(replicas).pid, signal.SIGKILL)
                self.counts["killed"] += 1

    async def _hang(self) -> None:
        """Stop a replica for longer than a link waits; it finds its streams gone elsewhere when it goes on."""
        while self.args.hang_every:
            await asyncio.sleep(self.args.hang_every)
            replicas = self.fleet.processes("FleetReplica")
            if len(replicas) > 1:
                hung = random.choice(replicas)
                with suppress(psutil.Error):
                    hung.suspend()
                    self.counts["hung"] += 1
                    await asyncio.sleep(15)
                    hung.resume()

    async def _kill_controller(self) -> None:
        while self.args.controller_every:
            await asyncio.sleep(self.args.controller_every)
            for process in self.fleet.processes("FleetController"):
                os.kill(process.pid, signal.SIGKILL)
                self.counts["controllers killed"] += 1

    async def _load(self, session: aiohttp.ClientSession) -> None:
        while self.args.load_every:
            await asyncio.sleep(self.args.load_every)
            mode = random.choice(["keep", "drain"])
            body = {"path": "step", "mode": mode}
            async with session.post(self.fleet.url + "/v1/weights", json=body) as response:
                self.counts[f"weights, {mode}: {response.status}"] += 1
                if response.status != 200:
                    print((await response.text())[:300])


def _unversioned(choice: bytes) -> bytes:
    choice = re.sub(
        rb'"weight_version":\d+|"system_fingerprint":"\w+"|"weight_versions":\[[^\]]*\]', b"", choice
    )
    return re.sub(rb',?"(weight_version_spans|recomputed_at|recomputed)":(\[[^\]]*\]|\w+)', b"", choice)


def main() -> None:
    """Read the command line, soak, print; exit status 1 where anything was lost or wrong."""
    args = options().parse_args()
    asked = [request for seed in range(8) for request in requests(MODEL, seed)]
    with tempfile.TemporaryDirectory() as folder:
        model = model_in(Path(folder), args.model)
        named = [str(model), "--served-model-name", MODEL]
        with serving(*named) as alone:
            want = asyncio.run(right_answers(alone, asked))
        step = Path(folder) / "weights" / "step"
        step.mkdir(parents=True)
        for file in model.glob("*.safetensors"):
            shutil.copy(file, step)
        fleet_options = ["--replicas", str(args.replicas), "--replica-cpus", str(args.replica_cpus)]
        if args.max_replicas:
            fleet_options += ["--max-replicas", str(args.max_replicas), "--target-ongoing-requests", "24"]
        with serving(*named, *fleet_options, "--weights-dir", str(step.parent)) as fleet:
            soak = Soak(fleet, asked, want, args)
            asyncio.run(soak.run())
    print(dict(soak.counts), "versions", dict(sorted(soak.versions.items())))
    print("seconds with so many replicas:", dict(sorted(soak.seen.items())))
    for line in soak.wrong[:10]:
        print("  ", line)
    raise SystemExit(1 if soak.counts["lost"] + soak.counts["wrong"] else 0)


def options() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder, or tiny: a random Qwen3; default: the embedded model")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--streams", type=int, default=128)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--max-replicas", type=int, default=0, help="0: none are added")
    parser.add_argument(
        "--wave", type=float, default=0, help="seconds of full load, then of a quarter; 0: always full"
    )
    parser.add_argument("--replica-cpus", type=float, default=0.5)
    parser.add_argument("--kill-every", type=float, default=20, help="0: none is killed")
    parser.add_argument("--load-every", type=float, default=30, help="0: no weights are loaded")
    parser.add_argument("--hang-every", type=float, default=0, help="0: none hangs")
    parser.add_argument("--controller-every", type=float, default=0, help="0: the controller lives")
    return parser


def model_in(folder: Path, name: str | None) -> Path:
    """Return the folder of the model that `--model` names; a tiny one is made in `folder`."""
    if name != "tiny":
        return Path(name) if name else embedded_model_path()
    return write_model(folder / "tiny", "qwen3", max_position_embeddings=1024)


if __name__ == "__main__":
    main()
