"""The ways into the compiled code: kept on disk, under a key that covers all they are made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

from numba import njit

from myserve.core.compiled import draw_kernel
from myserve.core.compiled.fingerprint import fingerprint

__all__ = ["COMPILED", "SOURCES", "Kernel", "best_rows", "draw_rows", "kept", "mask_rows", "normalise_rows"]

COMPILED = Path(__file__).parent
CORE = COMPILED.parent
SOURCES = (
    COMPILED,
    CORE / "mersenne",
    *(CORE / f"{module}.py" for module in ("noise", "numerics", "transfer")),
)

Kernel = Callable[..., None]  # (start, stop, *arrays): rows `start` to `stop`


def kept(function: Kernel) -> Kernel:
    """Compile on first call, without the interpreter's lock, or read what was compiled from disk."""
    try:
        return cast("Kernel", njit(nogil=True, cache=True, error_model="numpy")(function))
    except RuntimeError:
        # there is no place on this machine that Numba may write its cache to
        return cast("Kernel", njit(nogil=True, error_model="numpy")(function))


@cache
def normalise_rows() -> Kernel:
    """`draw_kernel.normalise_rows`."""
    source = fingerprint(*SOURCES)

    @kept
    def normalise(start: int, stop: int, scores: Any, largest: Any, masses: Any, work: Any) -> None:
        if source >= 0:
            draw_kernel.normalise_rows(start, stop, scores, largest, masses, work)

    return normalise


@cache
def mask_rows() -> Kernel:
    """`draw_kernel.mask_rows`."""
    source = fingerprint(*SOURCES)

    @kept
    def mask(start: int, stop: int, masks: Any, scores: Any, rows: Any) -> None:
        if source >= 0:
            draw_kernel.mask_rows(start, stop, masks, scores, rows)

    return mask


@cache
def best_rows() -> Kernel:
    """`draw_kernel.best_rows`."""
    source = fingerprint(*SOURCES)

    @kept
    def best(start: int, stop: int, scores: Any, wanted: Any, ids: Any, values: Any, work: Any) -> None:
        if source >= 0:
            draw_kernel.best_rows(start, stop, scores, wanted, ids, values, work)

    return best


@cache
def draw_rows() -> Kernel:
    """`draw_kernel.draw_rows`."""
    source = fingerprint(*SOURCES)

    @kept
    def draw(
        start: int,
        stop: int,
        places: Any,
        halves: Any,
        raw: Any,
        edited: Any,
        numbers: Any,
        top_k: Any,
        keys: Any,
        tokens: Any,
        floats: Any,
        masses: Any,
        work: Any,
    ) -> None:
        if source >= 0:
            draw_kernel.draw_rows(
                start, stop, places, halves, raw, edited, numbers, top_k, keys, tokens, floats, masses, work
            )

    return draw
