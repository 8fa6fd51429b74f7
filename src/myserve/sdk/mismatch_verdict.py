"""What a mismatch looks like: each known cause leaves a trace of its own, and is named by it. Pure. Needs numpy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Kind = Literal[
    "exact", "off by one", "temperature", "truncation", "misaligned", "stale weights", "rounding", "precision",
    "another policy",
]  # fmt: skip

# A cause explains a mismatch if taking it away leaves less than this share of it. Not nothing, for a trainer that
# forgot the temperature may compute in bfloat16 too.
EXPLAINED = 0.25
# Mean |d| in nats. Float32 in another order of sums gives 1e-6, bfloat16 a hundredth; the steps of a training run
# that was left behind give more than that, or do no harm yet.
ROUNDING, PRECISION = 1e-4, 3e-2
# Correlation of trainer's and sampler's logprobs below which no policy near the sampler's is being scored: weights that
# lag behind still find likely what was likely.
RELATED = 0.5


@dataclass(frozen=True, slots=True)
class Verdict:
    """A cause, and what it means in words."""

    kind: Kind
    words: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.words}"

    @property
    def title(self) -> str:
        return f"{self.kind}: {self.words.split(';')[0]}"


@dataclass(frozen=True, slots=True)
class Evidence:
    """d = trainer - sampler of N tokens, and the same against what else the trainer may have computed. All [N]."""

    d: Floats
    sampler: Floats = field(default_factory=lambda: np.zeros(0))
    versions: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # -1: untold
    trainer_version: int | None = None
    others: Mapping[str, Floats] = field(default_factory=dict)  # "inference", "sampling", "untruncated"
    shifted: Mapping[str, tuple[Floats, Floats]] = field(default_factory=dict)  # moved by one, and unmoved
    against: str = "inference"

    @property
    def size(self) -> float:
        return _size(self.d)


def judge(evidence: Evidence) -> Verdict:
    """The first cause, in the order below, whose trace is there.

    >>> judge(Evidence(d=np.array([0.01, -0.02, 0.0]))).kind
    'precision'
    """
    return next(_verdicts(evidence))


def _verdicts(e: Evidence) -> Iterator[Verdict]:
    if e.size == 0:
        yield Verdict("exact", f"on-policy to the last bit; all {len(e.d):,} tokens are equal")
    if e.size > ROUNDING:
        yield from _off_by_one(e)
        yield from _temperature(e)
        yield from _stale_by_version(e)
        if e.size > PRECISION and _correlation(e.sampler, e.sampler + e.d) < RELATED:
            yield Verdict(
                "misaligned",
                f"the trainer's logprobs have nothing to do with the sampler's ({-e.d.mean():+.1f} nats lost a token); "
                "it scores other tokens than were drawn: labels off by one token, another prompt, or text that was "
                "tokenized again",
            )
    if e.size <= ROUNDING:
        yield Verdict("rounding", f"{_typical(e)}; the same numbers added in another order")
    elif e.size <= PRECISION:
        yield Verdict(
            "precision",
            f"{_typical(e)}; what bfloat16 (or another kernel) in the trainer gives: compute its logprobs as the "
            "sampler does (exact_forward), or correct for it",
        )
    else:
        yield Verdict(
            "stale weights",
            f"{_typical(e)}, more than rounding gives; the sampler's weights are not the trainer's: was the last "
            "update loaded, and which version drew these samples?",
        )


def _off_by_one(e: Evidence) -> Iterator[Verdict]:
    for name, (moved, unmoved) in e.shifted.items():
        if _size(moved) < EXPLAINED * _size(unmoved):
            yield Verdict(
                "off by one",
                f"the trainer's logprobs are one token {name}; moved by one they fit {_times(unmoved, moved)} better",
            )


def _temperature(e: Evidence) -> Iterator[Verdict]:
    named = {
        "inference": "the trainer's logprobs are those at temperature 1; the draw's temperature was forgotten",
        "sampling": "the trainer's logprobs are the behaviour's, with its temperature; these samples are compared at "
        "temperature 1",
    }
    whole = {name: left for name, left in e.others.items() if _size(left) < EXPLAINED * e.size}
    if not whole:
        return
    best = min(whole, key=lambda name: _size(whole[name]))
    if best == "untruncated" and e.against == "sampling":
        yield Verdict(
            "truncation",
            "the trainer's logprobs have the draw's temperature and not its truncation; the kept mass is missing from "
            "the ratio (top-p, top-k, min-p)",
        )
    yield Verdict("temperature", named["sampling" if best == "untruncated" else best])


def _stale_by_version(e: Evidence) -> Iterator[Verdict]:
    """Where some versions fit and others do not, or the trainer says that it has another one."""
    sizes = {int(v): _size(e.d[e.versions == v]) for v in np.unique(e.versions) if v >= 0}
    if not sizes:
        return
    best = min(sizes, key=lambda version: sizes[version])
    unfit = {v for v, size in sizes.items() if size > ROUNDING and sizes[best] < EXPLAINED * size}
    if e.trainer_version is not None:
        unfit |= {v for v in sizes if v != e.trainer_version and sizes[v] > ROUNDING}
    if unfit:
        has = e.trainer_version if e.trainer_version is not None else best
        names = ", ".join(map(str, sorted(unfit)))
        yield Verdict(
            "stale weights",
            f"the trainer has version {has}; samples of version {names} were drawn by other weights",
        )


def _correlation(x: Floats, y: Floats) -> float:
    """1 where one of them does not vary: then it says nothing."""
    x, y = x - x.mean(), y - y.mean()
    length = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum()) / length if len(x) > 1 and length else 1.0


def _size(d: Floats) -> float:
    return float(np.abs(d).mean())


def _times(unmoved: Floats, moved: Floats) -> str:
    return f"{_size(unmoved) / _size(moved):,.0f} times" if _size(moved) else "exactly and"


def _typical(e: Evidence) -> str:
    return f"|d| is {e.size:.1g} on average and {np.abs(e.d).max():.1g} at most"
