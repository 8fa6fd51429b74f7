"""`transformers serve --continuous-batching`: what the library that we build upon serves with. It takes text alone."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers import Launch, Peer, make_venv


def install(folder: Path, model: Path) -> None:
    make_venv(folder, "torch==2.13.0")
    make_venv(folder, "torch==2.13.0", "transformers[serving]==5.23.0", "accelerate")


def launch(folder: Path, model: Path, port: int) -> Launch:
    command = [str(folder / "bin" / "transformers"), "serve", str(model), "--continuous-batching"]
    # Its default is a share of all memory: it would take what the others beside it need.
    cache = ["--cb-num-blocks", "512", "--cb-block-size", "32", "--cb-max-batch-tokens", "512"]
    return Launch([*command, "--device", "cpu", "--host", "127.0.0.1", "--port", str(port), *cache])


PEER = Peer("transformers", install, launch, prompts="text")
