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
from myserve.engine.kernels import cache_folder
from myserve.engine.kernels.attend import attend_kernel
from myserve.engine.kernels.elements import pointwise
from myserve.engine.kernels.elements.activations import activation_kernel
from myserve.engine.kernels.elements.elementwise import elementwise_kernel
from myserve.engine.kernels.gemm import linear_kernel
from myserve.engine.kernels.int8.gemm import linear_int8_kernel
from myserve.engine.kernels.int8.rounding import quantize_kernel
from myserve.engine.kernels.replay import replay_kernel
from myserve.engine.kernels.store import store_kernel
from myserve.engine.progress import StartPhase, phase

__all__ = ["warm"]

_SAMPLER = "the sampler"
_Work = list[tuple[str, Callable[[], object]]]  # what is to be made ready, by its name


def warm(*dtypes: torch.dtype, int8: bool = False) -> None:
    """Make every kernel for these types ready: half a second from the cache, half a minute where they are compiled.

    `int8`: those of quantised layers as well.
    """
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    types = "-".join([*names, "int8"] if int8 else names)
    work = _work(dtypes, int8=int8)
    if cache_folder.is_complete(types):
        with phase("reading compiled kernels") as running:
            _make_ready(work, running, beside=None)
        return
    folder = cache_folder.cache_folder()
    note = "" if folder is None else f"once: they are kept in {folder}"
    with phase("compiling kernels", note) as running:
        running.detail = "waiting for another that compiles them"
        with cache_folder.compiling_alone():
            _compile(work, running)
            cache_folder.mark_complete("sampler")
            cache_folder.mark_complete("-".join(names))
            cache_folder.mark_complete(types)


def _compile(work: _Work, running: StartPhase) -> None:
    pays = cache_folder.cache_folder() is not None and (os.cpu_count() or 1) > 1
    beside = _compile_sampler_beside() if pays and not cache_folder.is_complete("sampler") else None
    try:
        _make_ready(work, running, beside)
    finally:
        if beside is not None:
            beside.kill()
            beside.wait()


def _make_ready(work: _Work, running: StartPhase, beside: subprocess.Popen[bytes] | None) -> None:
    """Read each kernel, or compile it; the sampler's after `beside` has them."""
    for number, (what, make) in enumerate(work, 1):
        running.detail = f"{number} of {len(work)}: {what}"
        if what == _SAMPLER and beside is not None:
            # where it failed, the next line compiles here
            beside.wait()
        make()


def _work(dtypes: tuple[torch.dtype, ...], *, int8: bool = False) -> _Work:
    """Return what is to be made ready, by its name; the sampler last."""
    work: _Work = [("replay", replay_kernel), ("tensor operations", elementwise_kernel)]
    for dtype in dtypes:
        work += [
            ("attention", partial(attend_kernel, dtype)),
            ("KV store", partial(store_kernel, dtype)),
            ("GEMM", partial(linear_kernel, dtype)),
            ("norms and RoPE", partial(pointwise.warm, dtype)),
            # The others are compiled when a model has them, half a second each.
            ("SwiGLU", partial(activation_kernel, "silu", dtype)),
        ]
        if int8:
            work += [
                ("int8 rounding", partial(quantize_kernel, dtype)),
                ("int8 GEMM", partial(linear_int8_kernel, dtype)),
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
    warm(torch.bfloat16, int8=True)
    warm(torch.float32, int8=True)


if __name__ == "__main__":
    _main()
