"""A server of the embedded model in a process of its own, and the snapshots that are loaded into it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from myserve.embedded import embedded_model_path

SNAPSHOTS = 4
MODES = ("keep", "drain", "keep", "abort")


def make_snapshots(root: Path) -> None:
    """Write folders 0 to 3 into `root`: the model, and the model with noise that changes its answers."""
    tensors = load_file(embedded_model_path() / "model.safetensors")
    shutil.copytree(embedded_model_path(), root / "0")
    for number in range(1, SNAPSHOTS):
        noise = torch.Generator().manual_seed(number)
        (root / str(number)).mkdir()
        changed = {
            name: (t.float() + 0.02 * torch.randn(t.shape, generator=noise)).to(t.dtype)
            for name, t in tensors.items()
        }
        save_file(changed, root / str(number) / "model.safetensors", metadata={"format": "pt"})


@contextmanager
def served(root: Path) -> Iterator[str]:
    """Run `myserve serve` on snapshot 0, with `root` as its weights directory; give its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "myserve", "serve", str(root / "0"), "--port", str(port)]
    process = subprocess.Popen([*command, "--served-model-name", "demo", "--weights-dir", str(root)])
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)
