"""A self-test that was passed is kept for the next start of the same weights, by the same code, on the same CPU.

What it proves follows from these alone: the sums of a step are those of the first start, to the bit. A start that finds
it kept says so, and when it was passed; on a GPU, and with `--self-test always`, it runs at every start.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from myserve.core.compiled.fingerprint import fingerprint
from myserve.engine.kernels.cache_folder import cache_folder
from myserve.engine.progress import phase
from myserve.engine.runner.self_test import choose_batch_invariant_mode

if TYPE_CHECKING:
    from myserve.engine.config import EngineConfig
    from myserve.engine.runner.model_runner import ModelRunner
    from myserve.engine.weights.loader import LoadedModel

__all__ = ["Passed", "check", "keep", "kept", "key_of"]

log = logging.getLogger("myserve.start")

MOST_KEPT = 64
SAMPLED = 256  # numbers of each weight that its fingerprint reads: what is proved is how sums are made, not their terms
PACKAGES = ("torch", "transformers", "numba", "llvmlite", "numpy")
# What chooses the instructions, or the number of threads, of libraries.
VARIABLES = ("OMP_", "KMP_", "GOMP_", "MKL_", "DNNL_", "ONEDNN_", "ATEN_", "NUMBA_CPU_", "TORCH_")
# Options that no sum of a step depends on. One that is not named counts; the cache's size is how long a test it holds.
WITHOUT_EFFECT = frozenset(
    {
        "trust_remote_code", "self_test", "max_queue", "target_inter_token_latency", "draft_model",
        "prefix_caching", "share_prefix_cache",
    }
)  # fmt: skip
CPU_FACTS = ("vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "flags", "Features")


@dataclasses.dataclass(frozen=True, slots=True)
class Passed:
    """The findings of a passed self-test: the mode that is batch-invariant (`ModelRunner.settings`), and its time."""

    mode: int
    at: str


def key_of(loaded: LoadedModel, config: EngineConfig) -> str | None:
    """Return the name of all that a self-test's result follows from, in hex digits; None where it is not kept."""
    if loaded.device.type != "cpu" or config.self_test == "always":
        return None
    options = dataclasses.asdict(config).items()
    facts = {
        "model": loaded.model.config.to_dict() | {"class": type(loaded.model).__name__},
        "weights": [_fingerprint(name, weight) for name, weight in _weights(loaded.model)],
        "options": [option for option in options if option[0] not in WITHOUT_EFFECT],
        "threads": torch.get_num_threads(),
        "code": fingerprint(Path(__file__).parents[2]),
        "packages": [version(each) for each in PACKAGES],
        "variables": sorted(each for each in os.environ.items() if each[0].startswith(VARIABLES)),
        "machine": [platform.machine(), platform.python_version(), *_cpu()],
    }
    return sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def check(runner: ModelRunner, key: str | None, vocab_size: int) -> bool:
    """Run the self-test, or take the mode that an earlier start found; return whether rows are batch-invariant.

    Raises UnsupportedModelError for a model whose steps do not give its own logits.
    """
    if (passed := kept(key)) is not None:
        log.info(
            "a request's tokens do not depend on its batch: checked at %s with these weights, this code and CPU",
            passed.at,
        )
        runner.use_rows(passed.mode)
        return True
    with phase("checking that a request's tokens do not depend on its batch"):
        is_invariant = choose_batch_invariant_mode(runner, vocab_size)
    if is_invariant:
        keep(key, runner.exact_report.fixed_rows)
    return is_invariant


def kept(key: str | None) -> Passed | None:
    """Return what was found at an earlier start; None where there was none, or where it cannot be read."""
    folder = _folder()
    if key is None or folder is None:
        return None
    try:
        return Passed(**json.loads((folder / f"{key}.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def keep(key: str | None, mode: int) -> None:
    """Keep a passed self-test; the oldest of more than `MOST_KEPT` go, and where nothing can be written nothing is."""
    folder = _folder()
    if key is None or folder is None:
        return
    passed = Passed(mode, datetime.now(UTC).isoformat(timespec="seconds"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # a server that starts beside this one reads all of the file or none
        unfinished = folder / f"{key}.{os.getpid()}"
        unfinished.write_text(json.dumps(dataclasses.asdict(passed)))
        unfinished.replace(folder / f"{key}.json")
        oldest_first = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime)
        for file in oldest_first[:-MOST_KEPT]:
            file.unlink(missing_ok=True)
    except OSError:
        log.debug("the passed self-test was not kept", exc_info=True)


def _folder() -> Path | None:
    above = cache_folder()
    return None if above is None else above / "self-tests"


def _weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _fingerprint(name: str, weight: torch.Tensor) -> tuple[str, str, list[int], int]:
    flat = weight.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // SAMPLED)].contiguous().view(torch.uint8)
    return name, str(weight.dtype), list(weight.shape), zlib.crc32(sample.numpy().tobytes())


def _cpu() -> list[str]:
    """The facts of the first CPU that choose instructions: its model, stepping, microcode and flags."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return [platform.processor()]
    named = (line.partition(":") for line in first.splitlines())
    return [f"{name.strip()}={value.strip()}" for name, _, value in named if name.strip() in CPU_FACTS]
