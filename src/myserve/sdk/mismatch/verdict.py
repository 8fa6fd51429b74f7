"""Names the cause of a mismatch by its trace: each known cause leaves one of its own. Pure. Needs numpy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Evidence", "Kind", "Verdict", "judge"]

Floats = NDArray[np.float64]
Kind = Literal[
    "exact", "off by one", "temperature", "truncation", "misaligned", "stale weights", "rounding", "precision",
    "unclear",
]  # fmt: skip

# A cause explains a mismatch if taking it away leaves less than this share of it. Not nothing, for a trainer that
# forgot the temperature may compute in bfloat16 too.
EXPLAINED = 0.25
# Mean |d| in nats. Float32 in another order of sums gives 1e-6, bfloat16 a hundredth; the steps of a training run
# that was left behind give more than that, or do no harm yet. Up to twice PRECISION it may be either.
ROUNDING, PRECISION = 1e-4, 3e-2
UNSURE = -0.1  # a logprob that other weights or roundings move
BY_CHANCE = 0.05  # share of short samples that a coarse precision may leave as they are
# Tokens below which only a trace that fits to rounding is believed: chance makes all the others.
FEW = 16
# Correlation of trainer's and sampler's logprobs below which no policy near the sampler's is being scored: weights that
# lag behind still find likely what was likely.
RELATED = 0.5


@dataclass(frozen=True, slots=True)
class Verdict:
    """Hold a cause, and what it means in words."""

    kind: Kind
    words: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.words}"

    @property
    def title(self) -> str:
        return f"{self.kind}: {self.words.split(';')[0]}"


@dataclass(frozen=True, slots=True)
class Evidence:
    """Hold d = trainer - sampler of N tokens, and d against what else the trainer may have computed. All [N]."""

    d: Floats
    sampler: Floats = field(default_factory=lambda: np.zeros(0))
    versions: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # -1: untold
    trainer_version: int | None = None
    others: Mapping[str, Floats] = field(default_factory=dict)  # "inference", "sampling", "untruncated"
    shifted: Mapping[str, tuple[Floats, Floats]] = field(default_factory=dict)  # moved by one, and unmoved
    against: str = "inference"
    # which one a token is of
    samples: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def size(self) -> float:
        return _size(self.d)


def judge(evidence: Evidence) -> Verdict:
    """Return the first cause, in the order below, whose trace is there.

    >>> judge(Evidence(d=np.array([0.01, -0.02, 0.0] * 9))).kind
    'precision'
    >>> judge(Evidence(d=np.array([0.01, -0.02, 0.0]))).kind
    'unclear'
    """
    return next(_verdicts(evidence))


def _verdicts(e: Evidence) -> Iterator[Verdict]:
    if e.size == 0:
        yield Verdict("exact", f"on-policy to the last bit; all {len(e.d):,} tokens are equal")
    if e.size <= ROUNDING:
        yield Verdict("rounding", f"{_typical(e)}; the same numbers added in another order")
    yield from _other_column(e)
    yield from _off_by_one(e)
    yield from _stale_by_version(e)
    yield from _by_size(e)


def _by_size(e: Evidence) -> Iterator[Verdict]:
    """Yield the verdicts that go by size alone, for a mismatch without any other trace."""
    if len(e.d) < FEW:
        yield Verdict("unclear", f"{_typical(e)}; {len(e.d)} tokens are too few to name a cause")
    fit, unfit = _samples_that_fit(e)
    if fit and unfit:
        yield Verdict(
            "unclear",
            f"{fit} samples fit to rounding and {unfit} do not: other weights drew those (ask the server for their "
            "versions), or their tokens are not the ones that were drawn",
        )
    if e.size <= PRECISION:
        untold = (
            ""
            if e.trainer_version is not None
            else "; weights an update old look the same: pass trainer_version"
        )
        yield Verdict(
            "precision",
            f"{_typical(e)}; what bfloat16 (or another kernel) in the trainer gives: compute its logprobs as the "
            f"sampler does (exact_forward), or correct for it{untold}",
        )
    if _correlation(e.sampler, e.sampler + e.d) < RELATED:
        yield Verdict(
            "misaligned",
            f"the trainer's logprobs have nothing to do with the sampler's ({-e.d.mean():+.1f} nats lost a token); "
            "it scores other tokens than were drawn: labels off by one token, another prompt, or text that was "
            "tokenized again",
        )
    if e.size <= 2 * PRECISION:
        yield Verdict(
            "unclear",
            f"{_typical(e)}; a coarse precision or weights a few updates old: pass trainer_version to tell them apart",
        )
    yield Verdict(
        "stale weights",
        f"{_typical(e)}, more than rounding gives; the sampler's weights are not the trainer's: was the last "
        "update loaded, and which version drew these samples?",
    )


def _off_by_one(e: Evidence) -> Iterator[Verdict]:
    for name, (moved, unmoved) in e.shifted.items():
        if _explains(moved, unmoved):
            yield Verdict(
                "off by one",
                f"the trainer's logprobs are one token {name}; moved by one they fit {_times(unmoved, moved)} better",
            )


def _other_column(e: Evidence) -> Iterator[Verdict]:
    """Yield a verdict where the trainer computed the sampler's other distribution: no temperature, or no truncation."""
    fitting = {name: left for name, left in e.others.items() if _is_column(e.d, left)}
    if not fitting:
        return
    best = min(fitting, key=lambda name: _size(fitting[name]))
    if e.against == "sampling" and _is_truncation(e, fitting, best):
        yield Verdict(
            "truncation",
            "the trainer's logprobs lack the draw's truncation (top-p, top-k, min-p); the kept mass is missing from "
            "the ratio",
        )
    elif e.against == "sampling":
        yield Verdict(
            "temperature",
            "the trainer's logprobs are those at temperature 1; the draw's temperature was forgotten",
        )
    else:
        yield Verdict(
            "temperature",
            "the trainer's logprobs are the behaviour's, with its temperature; these samples are compared at "
            "temperature 1",
        )


def _is_column(d: Floats, left: Floats) -> bool:
    """Return whether the differences d go away, but for noise of their own, when another column is taken: `left`.

    A regression of d on what lies between the columns: its slope is 1 there, and 0 for any cause that has nothing to
    do with the column. Comparing sizes alone was rejected: noise as large as a mild temperature hides it.
    """
    if _explains(left, d):
        return True
    between = d - left
    power = float((between**2).sum())
    if len(d) < FEW or not power:
        return False
    slope = float((d * between).sum()) / power
    error = float(np.sqrt(((d - slope * between) ** 2).mean() / power))
    return abs(slope - 1) < EXPLAINED and error < EXPLAINED / 4


def _is_truncation(e: Evidence, fitting: Mapping[str, Floats], best: str) -> bool:
    """Return whether a truncation explains it, where both columns fit at temperature 1.

    Without the kept mass, a truncation is told by making no token less likely.
    """
    if not e.sampler.any():
        return False  # greedy: that is a temperature
    if "untruncated" in e.others:
        return (
            "untruncated" in fitting and _size(fitting["untruncated"]) <= _size(fitting[best]) + ROUNDING / 10
        )
    gained = fitting[best] - e.d  # sampler's column less the other one
    return len(gained) >= FEW and bool((gained >= -ROUNDING).all()) and bool((gained > ROUNDING).any())


def _stale_by_version(e: Evidence) -> Iterator[Verdict]:
    """Yield a verdict where some versions fit and others do not, or the trainer has another one by its own account."""
    of = {int(v): e.d[e.versions == v] for v in np.unique(e.versions) if v >= 0}
    if not of:
        return
    best = min(of, key=lambda version: _size(of[version]))
    unfit = {v for v, d in of.items() if _size(d) > ROUNDING and _explains(of[best], d)}
    if e.trainer_version is not None:
        unfit |= {v for v, d in of.items() if v != e.trainer_version and _size(d) > ROUNDING}
    if unfit:
        has = e.trainer_version if e.trainer_version is not None else best
        names = ", ".join(map(str, sorted(unfit)))
        yield Verdict(
            "stale weights",
            f"the trainer has version {has}; samples of version {names} were drawn by other weights",
        )


def _samples_that_fit(e: Evidence) -> tuple[int, int]:
    """Return how many samples fit to rounding, and how many do not; a precision spares none, but for chance.

    Only tokens that the sampler was not sure of are asked: the others' logprobs are near 0 by any weights.
    """
    asked = e.sampler < UNSURE if len(e.samples) else np.zeros(len(e.d), bool)
    worst = np.full(int(e.samples.max(initial=-1)) + 1, -1.0)
    np.maximum.at(worst, e.samples[asked[: len(e.samples)]], np.abs(e.d[asked]))
    fit, unfit = int(((worst >= 0) & (worst <= ROUNDING / 5)).sum()), int((worst > ROUNDING).sum())
    return (fit, unfit) if fit > BY_CHANCE * (fit + unfit) else (0, unfit)


def _explains(left: Floats, whole: Floats) -> bool:
    """Return whether little of a mismatch is left; of a few tokens, no more than rounding."""
    enough = min(len(left), len(whole)) >= FEW
    return _size(left) < EXPLAINED * _size(whole) and (enough or _size(left) <= ROUNDING)


def _correlation(x: Floats, y: Floats) -> float:
    """Return the correlation; 1 where one of them does not vary, for then it tells nothing."""
    x, y = x - x.mean(), y - y.mean()
    length = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum()) / length if len(x) > 1 and length else 1.0


def _size(d: Floats) -> float:
    return float(np.abs(d).mean())


def _times(unmoved: Floats, moved: Floats) -> str:
    return f"{_size(unmoved) / _size(moved):,.0f} times" if _size(moved) else "exactly and"


def _typical(e: Evidence) -> str:
    return f"|d| is {e.size:.1g} on average and {np.abs(e.d).max():.1g} at most"
