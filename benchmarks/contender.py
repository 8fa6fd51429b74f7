"""A peer, or ours, running in a process of its own: started, asked for one run of a workload at a time, stopped."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import string
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import ROOT, Peer
from benchmarks.scenarios import Planned
from myserve.bench.figures import Figures, RequestTimes, figures
from myserve.bench.load import Arrival, BenchError, ServerFeatures, Target
from myserve.bench.workload import SAMPLING, Prompt, Workload, id_prompts

_LETTERS = string.ascii_lowercase  # of which the benchmark's tokenizer makes a token each
_RICHEST = ServerFeatures(True, {"ignore_eos": True, "stream_options": {"include_usage": True}})
START_TIMEOUT_S = 900.0  # vLLM compiles for two minutes on a quiet machine


def prompt_ids(vocab_size: int) -> range:
    """Return ids above a tokenizer's bytes and its special tokens, and below those that follow a vocabulary.

    >>> prompt_ids(151_936), prompt_ids(2048)
    (range(1000, 150000), range(512, 2048))
    """
    return range(min(1000, vocab_size // 4), min(150_000, vocab_size))


class Contender:
    """One peer in one process. Its output goes to `.bench/<name>.log`, which is shown when it dies."""

    def __init__(self, peer: Peer, model: Path) -> None:
        self.name = peer.name
        self._peer = peer
        self._model = str(model)  # what all of them call it: some take no other name
        self._ids = prompt_ids(json.loads((model / "config.json").read_text("utf-8"))["vocab_size"])
        self._log = ROOT / f"{peer.name}.log"
        port = _free_port()
        self._url = f"http://127.0.0.1:{port}"
        launch = peer.launch(peer.folder, model, port)
        ROOT.mkdir(exist_ok=True)
        self._started = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                launch.command,
                env=_environment() | dict(launch.env),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if peer.prompts == "stdin" else log,
                stderr=log,
                start_new_session=True,  # its workers end with it
            )

    def wait_until_ready(self) -> float:
        """Seconds from the command to the first answer."""
        if self._peer.prompts == "stdin":
            self._read_line()
        else:
            while not self._answers():
                if self._process.poll() is not None or time.perf_counter() - self._started > START_TIMEOUT_S:
                    raise self._died()
                time.sleep(0.05)
        return time.perf_counter() - self._started

    def run(self, workload: Workload, seed: int) -> Figures:
        """Run once. One seed gives every contender the same prompts, as ids or as text of as many tokens."""
        try:
            if self._peer.prompts == "stdin":
                return self._run_on_stdin(workload, id_prompts(workload, self._ids, seed))
            return asyncio.run(self._run_over_http(workload, seed))
        except BenchError:
            if self._process.poll() is not None:
                raise self._died() from None
            raise

    def play(self, planned: Sequence[Planned], seed: int) -> list[RequestTimes]:
        """Send each request at its moment; return their times in the same order. Greedy."""
        draw = random.Random(seed)
        arrivals = [
            Arrival(one.at, draw.choices(self._ids, k=one.prompt_len), one.output_len) for one in planned
        ]
        if self._peer.prompts == "stdin":
            return self._traces_from_stdin(arrivals, n=1, sampling="greedy")
        if self._peer.prompts != "ids":
            raise BenchError(f"{self.name} takes text alone")
        return asyncio.run(self._play_over_http(arrivals))

    def sampling_seconds(self) -> tuple[float, float] | None:
        """Return the seconds that ours has spent in steps so far, and of those in the sampler; None for a peer."""
        if not self.name.startswith("ours"):
            return None
        with urllib.request.urlopen(self._url + "/metrics", timeout=60) as answer:
            lines = [line.rpartition(" ") for line in answer.read().decode().splitlines()]
        values = {
            name.partition("{")[0]: float(value) for name, _, value in lines if not name.startswith("#")
        }
        return values["myserve:step_seconds_total"], values["myserve:sampling_seconds_total"]

    def peak_memory_gib(self) -> float | None:
        """Return the largest resident size so far, of all its processes together; None where it is not known."""
        peaks = [_peak_kib(pid) for pid in _family(self._process.pid)]
        known = [peak for peak in peaks if peak is not None]
        return sum(known) / 2**20 if known else None

    def stop(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    async def _run_over_http(self, workload: Workload, seed: int) -> Figures:
        target = Target(self._url, self._model)
        try:
            if self._peer.prompts == "ids":
                return await target.run(workload, id_prompts(workload, self._ids, seed), _RICHEST)
            if workload.sampling == "logprobs":
                raise BenchError(f"{self.name} gives no logprobs")
            # Without `n` and `ignore_eos`: n requests then, and an end token once in 150,000.
            alone = Workload(workload.choices, workload.prompt_len, workload.output_len, workload.sampling)
            texts = [text for text in _texts(workload, seed) for _ in range(workload.n)]
            return await target.run(alone, texts, ServerFeatures(False, {}, takes_filters=False))
        finally:
            await target.aclose()

    async def _play_over_http(self, arrivals: Sequence[Arrival]) -> list[RequestTimes]:
        target = Target(self._url, self._model)
        try:
            return await target.play(arrivals, _RICHEST)
        finally:
            await target.aclose()

    def _run_on_stdin(self, workload: Workload, prompts: Sequence[Prompt]) -> Figures:
        arrivals = [Arrival(0.0, prompt, workload.output_len) for prompt in prompts]
        traces = self._traces_from_stdin(arrivals, n=workload.n, sampling=workload.sampling)
        return figures(traces, requests=workload.streams)

    def _traces_from_stdin(self, arrivals: Sequence[Arrival], *, n: int, sampling: str) -> list[RequestTimes]:
        assert self._process.stdin is not None
        asked = {
            "prompts": [arrival.prompt for arrival in arrivals],
            "output_lens": [arrival.output_len for arrival in arrivals],
            "at": [arrival.at for arrival in arrivals],
            "n": n,
            "sampling": SAMPLING[sampling],
        }
        try:
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        return [
            RequestTimes(**{**trace, "times": tuple(trace["times"])}) for trace in self._read_line()["traces"]
        ]

    def _read_line(self) -> dict[str, Any]:
        """Return the next line that is JSON: libraries print lines of their own."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(b"{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise self._died()

    def _answers(self) -> bool:
        """Return whether a token comes back: a server that listens need not have loaded its model."""
        dialect = ServerFeatures(self._peer.prompts == "ids", {}, takes_filters=False)
        prompt: Prompt = [1000, 1001] if self._peer.prompts == "ids" else "ab"
        body = dialect.body(self._model, Workload(1, 2, 1), prompt) | {"stream": False}
        request = urllib.request.Request(
            self._url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return bool(json.loads(answer.read())["choices"])
        except (OSError, urllib.error.URLError, ValueError, KeyError):
            return False

    def _died(self) -> BenchError:
        tail = self._log.read_text("utf-8", "replace").splitlines()[-8:] if self._log.exists() else []
        return BenchError("\n  ".join([f"{self.name} is not running; the end of {self._log}:", *tail]))


def _texts(workload: Workload, seed: int) -> list[str]:
    """Return as many letters as tokens are asked for."""
    draw = random.Random(seed)
    return ["".join(draw.choices(_LETTERS, k=workload.prompt_len)) for _ in range(workload.streams)]


def _environment() -> dict[str, str]:
    """Return our environment without our Makefile's settings: peers run as their own users run them."""
    return {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _family(pid: int) -> list[int]:
    import psutil

    try:
        process = psutil.Process(pid)
        return [pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def _peak_kib(pid: int) -> int | None:
    status = Path(f"/proc/{pid}/status")
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
