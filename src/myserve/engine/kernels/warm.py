"""Every kernel is read from Numba's cache or compiled into it: `python -m myserve.engine.kernels.warm`.

Half of the compiling is the sampler's, and a process of its own does it meanwhile: in one process Numba compiles one
function at a time.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch

from myserve.core.compiled import fast_path
from myserve.engine.kernels import cache_folder, pointwise
from myserve.engine.kernels.activations import activation_kernel
from myserve.engine.kernels.attend import attend_kernel
from myserve.engine.kernels.gemm import linear_kernel
from myserve.engine.kernels.replay import replay_kernel
from myserve.engine.kernels.store import store_kernel
from myserve.engine.progress import phase

__all__ = ["warm"]

_SAMPLER = "the sampler"


def warm(*dtypes: torch.dtype) -> None:
    """Make every kernel for these types ready: half a second from the cache, half a minute where they are compiled."""
    types = "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    is_warm = cache_folder.is_complete(types)
    folder = cache_folder.cache_folder()
    note = "" if is_warm or folder is None else f"once: they are kept in {folder}"
    with phase("reading compiled kernels" if is_warm else "compiling kernels", note) as running:
        compiles_beside = (
            folder is not None and (os.cpu_count() or 1) > 1 and not cache_folder.is_complete("sampler")
        )
        beside = _compile_sampler_beside() if compiles_beside else None
        try:
            work = _work(dtypes)
            for number, (what, make) in enumerate(work, 1):
                running.detail = f"{number} of {len(work)}: {what}"
                if what == _SAMPLER and beside is not None:
                    # where it failed, the next line compiles here
                    beside.wait()
                make()
        finally:
            if beside is not None:
                beside.kill()
                beside.wait()
    cache_folder.mark_complete("sampler")
    cache_folder.mark_complete(types)


def _work(dtypes: tuple[torch.dtype, ...]) -> list[tuple[str, Callable[[], object]]]:
    """Return what is to be made ready, by its name; the sampler last."""
    work: list[tuple[str, Callable[[], object]]] = [("replay", replay_kernel)]
    for dtype in dtypes:
        work += [
            ("attention", partial(attend_kernel, dtype)),
            ("KV store", partial(store_kernel, dtype)),
            ("GEMM", partial(linear_kernel, dtype)),
            ("norms and RoPE", partial(pointwise.warm, dtype)),
            # The others are compiled when a model has them, half a second each.
            ("SwiGLU", partial(activation_kernel, "silu", dtype)),
        ]
    return [*work, (_SAMPLER, fast_path.warm_up)]


def _compile_sampler_beside() -> subprocess.Popen[bytes] | None:
    """Start a process that compiles the sampler into the cache; None where none can be started."""
    command = [sys.executable, "-m", "myserve.engine.kernels.warm", "--sampler"]
    # it finds the package where this process does
    paths = os.pathsep.join(path for path in sys.path if path)
    try:
        return subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return None


def _main() -> None:
    if sys.argv[1:] == ["--sampler"]:
        fast_path.warm_up()
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warm(torch.bfloat16)
    warm(torch.float32)


if __name__ == "__main__":
    _main()
