"""OpenVINO GenAI with continuous batching: the best of the peers at most loads. No server, so it pays for no HTTP.

Once with 16-bit weights and once with 8-bit ones, by its own converter: one scale a channel, as ours have.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers import ROOT, Launch, Peer, make_venv, run, suffix

# Their own scheduler, their own converter. `--weight-format fp16` keeps a bf16 checkpoint's 16 bits: bf16 inference.
REQUIREMENTS = ("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0")


def install(folder: Path, model: Path) -> None:
    make_venv(folder, "torch==2.13.0")  # first: pip would otherwise settle on one for CUDA
    make_venv(folder, "torch==2.13.0", *REQUIREMENTS)
    # It comes with them, built for another torch; and where it cannot be imported, transformers cannot either.
    run(folder / "bin" / "pip", "uninstall", "--yes", "--quiet", "torchvision")
    _export(folder, model, folder / f"model{suffix(model)}", "fp16")


def install_int8(folder: Path, model: Path) -> None:
    """Export for the environment of the first, which is installed where it is not there."""
    if not PEER.is_installed(model):
        PEER.install_into_folder(model)
    _export(PEER.folder, model, folder / f"model{suffix(model)}", "int8")


def _export(environment: Path, model: Path, out: Path, weights: str) -> None:
    export = (environment / "bin" / "optimum-cli", "export", "openvino", "--model", model)
    run(*export, "--task", "text-generation-with-past", "--weight-format", weights, out)


def launch(folder: Path, model: Path, port: int) -> Launch:
    runner = Path(__file__).with_name("openvino_runner.py")
    # -P: this file stands beside the runner, and would be what `import openvino` finds.
    python = str(ROOT / "openvino" / "bin" / "python")
    return Launch([python, "-P", str(runner), str(folder / f"model{suffix(model)}")])


PEER = Peer("openvino", install, launch, prompts="stdin")
INT8 = Peer("openvino-int8", install_int8, launch, prompts="stdin")
