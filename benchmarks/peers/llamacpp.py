"""llama.cpp's own server, built for this CPU from the sources that llama-cpp-python ships; GGUF in bf16 and Q8_0."""

from __future__ import annotations

import os
import sys
import tarfile
from pathlib import Path

from benchmarks.peers import ROOT, Launch, Peer, run, suffix

VERSION = "0.3.36"
CMAKE = (
    *("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_BUILD_SERVER=ON"),
    *("-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF"),
)
# The converter knows tokenizers by a hash, and ours is made here; which splitter is named is all the same to ids.
CONVERT = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
conversion.base.TextModel._set_vocab_sentencepiece = conversion.base.TextModel._set_vocab_gpt2  # it tries that first
conversion.base.ModelBase.no_mtp = True  # layers that predict several tokens, which models made here have not
import convert_hf_to_gguf
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[2:]]
convert_hf_to_gguf.main()
"""


def install(folder: Path, model: Path) -> None:
    source = folder / "source" / "vendor" / "llama.cpp"
    if not source.exists():
        download = ("--no-deps", "--no-binary", "llama-cpp-python", f"llama-cpp-python=={VERSION}")
        run(sys.executable, "-m", "pip", "download", "--quiet", "--dest", folder, *download)
        (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        (folder / archive.name.removesuffix(".tar.gz")).rename(folder / "source")
    run("cmake", "-S", source, "-B", folder / "build", *CMAKE)
    jobs = str(os.cpu_count())
    run("cmake", "--build", folder / "build", "--target", "llama-server", "--parallel", jobs)
    _convert(source, model, folder / f"model{suffix(model)}.gguf", "bf16")


def install_q8(folder: Path, model: Path) -> None:
    """Convert for the server of the first, which is built where it is not there."""
    if not PEER.is_installed(model):
        PEER.install_into_folder(model)
    source = PEER.folder / "source" / "vendor" / "llama.cpp"
    _convert(source, model, folder / f"model{suffix(model)}.gguf", "q8_0")


def _convert(source: Path, model: Path, out: Path, kind: str) -> None:
    run(sys.executable, "-c", CONVERT, source, model, "--outtype", kind, "--outfile", out)


def launch(folder: Path, model: Path, port: int) -> Launch:
    server = str(ROOT / "llamacpp" / "build" / "bin" / "llama-server")
    # One pool of KV for all slots; no reuse of prompts, which differ anyhow.
    slots = ["--parallel", "64", "--ctx-size", "24576", "--kv-unified", "--no-cache-prompt"]
    threads = ["--threads", str(os.cpu_count())]
    command = [
        server,
        "--model",
        str(folder / f"model{suffix(model)}.gguf"),
        "--alias",
        str(model),
        "--no-webui",
    ]
    return Launch([*command, "--host", "127.0.0.1", "--port", str(port), *slots, *threads])


PEER = Peer("llamacpp", install, launch)
Q8 = Peer("llamacpp-q8", install_q8, launch)
