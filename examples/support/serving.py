"""The server's side of the examples: started if need be, started again if it died, and given the weights of a step."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import httpx
from transformers import AutoTokenizer

from myserve.embedded import embedded_model_path
from myserve.sdk import AdaptiveConcurrencyController, DeploymentSampler, WeightUpdateError

START_TIMEOUT = 300.0  # seconds: of a machine that others use, too


class Server:
    """`myserve serve` in float32, as a process of its own; or, with a `url`, a server that somebody else runs."""

    def __init__(
        self, model: str, weights_dir: Path | None = None, url: str = "", options: Sequence[str] = ()
    ) -> None:
        self._command = [sys.executable, "-m", "myserve", "serve", model, "--served-model-name", "policy"]
        self._command += ["--dtype", "float32", *options]
        self.process: subprocess.Popen[bytes] | None = None
        self._is_ours = not url
        self._ends = threading.Event()
        self._watcher: threading.Thread | None = None
        if weights_dir is not None:
            weights_dir.mkdir(parents=True, exist_ok=True)
            self._command += ["--weights-dir", str(weights_dir)]
        if self._is_ours:
            with socket.create_server(("127.0.0.1", 0)) as free:
                url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.url = url.rstrip("/")

    def __enter__(self) -> Server:
        if self._is_ours:
            self._start()
        self._wait_until_ready()
        if self._is_ours:
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        self.name: str = self._get("/v1/models")["data"][0]["id"]
        version = self._weight_version()
        # a server that somebody used before has other weights
        self._first_version = version + 1 if version else 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends.set()
        if self._watcher is not None:
            self._watcher.join()
        if self.process is not None:
            self.process.terminate()
            self.process.wait(timeout=30)

    def version(self, step: int) -> int:
        """Return the weight version of `step` on the server."""
        return self._first_version + step

    async def load(
        self, sampler: DeploymentSampler, step: int, mode: Literal["drain", "keep"] = "drain"
    ) -> None:
        """Load the weights of `step`; return when they are in place, whether or not the server died meanwhile."""
        while True:
            self._wait_until_ready()
            try:
                if self._weight_version() == self.version(step):
                    return
                await sampler.update_weights(f"step-{step:04}", version=self.version(step), mode=mode)
            except httpx.TransportError:
                continue
            except WeightUpdateError as error:
                if error.status is not None:  # the server's word, not a broken connection
                    raise

    def _start(self) -> None:
        port = self.url.rsplit(":", 1)[1]
        environment = {**os.environ, "TQDM_DISABLE": "1"}
        self.process = subprocess.Popen([*self._command, "--port", port], env=environment)

    def _watch(self) -> None:
        """Starts a server of ours again whenever it dies; whoever asks it for samples retries meanwhile."""
        while not self._ends.wait(0.2):
            if self.process is not None and self.process.poll() is not None:
                self._start()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while not self._is_ready():
            if self._watcher is None and self.process is not None and self.process.poll() is not None:
                raise RuntimeError(
                    f"the server ended with status {self.process.returncode} before it was ready"
                )
            if time.monotonic() > deadline:
                raise RuntimeError(f"no server is ready at {self.url} after {START_TIMEOUT:.0f} s")
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    def _weight_version(self) -> int:
        return int(self._get("/v1/weights")["models"][self.name]["weight_version"])

    def _get(self, path: str) -> Any:
        answer = httpx.get(self.url + path, timeout=60)
        answer.raise_for_status()
        return answer.json()


@asynccontextmanager
async def sampler_for(
    url: str = "", options: Sequence[str] = (), model: str = ""
) -> AsyncIterator[DeploymentSampler]:
    """Give a sampler on the server at `url`, or on one of `model` (the embedded one) that ends with the block."""
    model = model or str(embedded_model_path())
    with Server(model, url=url, options=options) as server:
        tokenizer = AutoTokenizer.from_pretrained(model)
        window = AdaptiveConcurrencyController(initial_window=64)
        async with DeploymentSampler(server.url, server.name, "", tokenizer, window) as sampler:
            yield sampler
