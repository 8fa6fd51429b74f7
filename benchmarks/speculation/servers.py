"""One server with drafts, or without them: started as its users start it, and asked for completions over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.idle import wait_until_idle
from benchmarks.peers import ROOT, Launch, llamacpp, vllm

__all__ = ["CONTENDERS", "Answer", "Contender", "Server", "running"]

START_TIMEOUT_S = 900.0  # vLLM compiles for two minutes on a quiet machine


@dataclass(frozen=True)
class Answer:
    """What one request gave: each choice's ids, or its text where a server tells no ids."""

    choices: list[Any]
    num_tokens: int
    drafted: int | None  # None: the server does not say
    accepted: int | None


@dataclass(frozen=True)
class Contender:
    """`launch(model, port, drafts)` starts it; `extra` is what its requests say beside what all of them say."""

    launch: Callable[[Path, int, str], Launch]
    extra: Mapping[str, Any] = field(default_factory=dict)
    takes_ids_and_n: bool = True


def _launch_ours(model: Path, port: int, drafts: str) -> Launch:
    command = [sys.executable, "-m", "myserve", "serve", str(model), "--port", str(port)]
    command += ["--served-model-name", "default", "--kv-cache-bytes", "512MiB", "--max-model-len", "4096"]
    return Launch([*command, "--speculation", drafts])


def _launch_vllm(model: Path, port: int, drafts: str) -> Launch:
    launch = vllm.PEER.launch(vllm.PEER.folder, model, port)
    # its documentation's example for n-grams, with the longest and the shortest that ours looks for
    wanted = {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    options = [] if drafts == "off" else ["--speculative-config", json.dumps(wanted)]
    return Launch([*launch.command, "--served-model-name", "default", *options], launch.env)


def _launch_llamacpp(model: Path, port: int, drafts: str) -> Launch:
    launch = llamacpp.PEER.launch(llamacpp.PEER.folder, model, port)
    # it draws n requests at once in as many slots; the first of its drafters that needs no model
    options = [] if drafts == "off" else ["--spec-type", "ngram-simple"]
    return Launch([*launch.command, "--alias", "default", *options], launch.env)


CONTENDERS: Mapping[str, Contender] = {
    "ours": Contender(_launch_ours, {"return_token_ids": True, "perf_metrics_in_response": True}),
    "vllm": Contender(_launch_vllm, {"return_token_ids": True}),
    "llamacpp": Contender(_launch_llamacpp, {"cache_prompt": False}, takes_ids_and_n=False),
}


class Server:
    """One contender in a process of its own, with the drafts of that name; its output goes to `.bench/`."""

    def __init__(self, contender: str, model: Path, drafts: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._contender = CONTENDERS[contender]
        launch = self._contender.launch(model, port, drafts)
        ROOT.mkdir(exist_ok=True)
        self._log = ROOT / f"{contender}-{drafts}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                launch.command,
                env=os.environ | dict(launch.env),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Return when it answers. Raises SystemExit with the end of its log when it does not."""
        until = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < until and self._process.poll() is None:
            try:
                if httpx.get(self.url + "/health").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        tail = self._log.read_text("utf-8", "replace").splitlines()[-8:]
        raise SystemExit("\n".join(["the server did not start:", *tail]))

    def stop(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
        self._process.wait()

    async def ask(self, client: httpx.AsyncClient, body: Mapping[str, Any], salt: str) -> Answer:
        """Send a completion; `salt` keeps ours from finding what an earlier round left."""
        extra = {"cache_salt": salt} if self._contender is CONTENDERS["ours"] else {}
        body = {"model": "default", **body, **self._contender.extra, **extra}
        response = await client.post(self.url + "/v1/completions", json=body)
        response.raise_for_status()
        answer = response.json()
        metrics = answer.get("perf_metrics") or {}
        return Answer(
            [choice.get("token_ids") or choice["text"] for choice in answer["choices"]],
            answer["usage"]["completion_tokens"],
            metrics.get("speculation-generated-tokens"),
            metrics.get("speculation-accepted-tokens"),
        )


@contextmanager
def running(contender: str, model: Path, drafts: Sequence[str]) -> Iterator[dict[str, Server]]:
    servers: dict[str, Server] = {}
    try:
        for name in drafts:
            # one after the other: two that compile at once take each other's cores
            servers[name] = Server(contender, model, name)
            servers[name].wait_until_ready()
        wait_until_idle(patience=40.0)  # ours record their steps ahead
        yield servers
    finally:
        for server in servers.values():
            server.stop()
