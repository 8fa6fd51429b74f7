"""OpenVINO GenAI with continuous batching: the best of the peers at most loads. No server, so it pays for no HTTP."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers import Launch, Peer, make_venv, run

# Their own scheduler, their own converter. `--weight-format fp16` keeps a bf16 checkpoint's 16 bits: bf16 inference.
REQUIREMENTS = ("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0")


def install(folder: Path, model: Path) -> None:
    make_venv(folder, "torch==2.13.0")  # first: pip would otherwise settle on one for CUDA
    make_venv(folder, "torch==2.13.0", *REQUIREMENTS)
    # It comes with them, built for another torch; and where it cannot be imported, transformers cannot either.
    run(folder / "bin" / "pip", "uninstall", "--yes", "--quiet", "torchvision")
    export = (folder / "bin" / "optimum-cli", "export", "openvino", "--model", model)
    run(*export, "--task", "text-generation-with-past", "--weight-format", "fp16", folder / "model")


def launch(folder: Path, model: Path, port: int) -> Launch:
    runner = Path(__file__).with_name("openvino_runner.py")
    # -P: this file stands beside the runner, and would be what `import openvino` finds.
    return Launch([str(folder / "bin" / "python"), "-P", str(runner), str(folder / "model")])


PEER = Peer("openvino", install, launch, prompts="stdin")
