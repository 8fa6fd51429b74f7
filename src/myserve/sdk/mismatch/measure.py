"""Measures how far a trainer's logprobs are from the sampler's, token by token, and names the cause. Needs numpy.

Off-policy error is measured here and never hoped away: on-policy is an exact zero, or it is not on-policy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from myserve.sdk.mismatch.verdict import Evidence, Verdict, judge
from myserve.sdk.types import SampledCompletion

__all__ = ["Against", "Gap", "Mismatch", "measure"]

Against = Literal["inference", "sampling"]
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Gap:
    """Summarise the differences d = trainer - sampler of N tokens that the sampler drew: logs of importance ratios."""

    tokens: int  # N
    equal: float  # share with d = 0, to the last bit
    kl_k1: float  # mean of -d: an unbiased estimate of KL(sampler || trainer), in nats a token
    kl_k3: float  # mean of exp(d) - 1 - d: the same estimate, never negative, with less variance
    median: float  # of |d|
    p99: float
    max: float
    ess: float  # effective sample size of the ratios exp(d), as a share of N: (sum w)^2 / (N sum w^2)
    outside: float  # share of ratios out of the band

    @classmethod
    def of(cls, d: Floats, band: tuple[float, float]) -> Gap:
        """Return the summary of d [N]; ratios outside of `band` are counted.

        >>> Gap.of(np.zeros(4), (0.5, 2.0))
        Gap(tokens=4, equal=1.0, kl_k1=0.0, kl_k3=0.0, median=0.0, p99=0.0, max=0.0, ess=1.0, outside=0.0)
        """
        size = np.abs(d)
        ratio = np.exp(np.clip(d, -700.0, 700.0))  # what a float64 holds
        scaled = ratio / ratio.max()
        median, p99 = np.quantile(size, (0.5, 0.99))
        return cls(
            tokens=len(d),
            equal=float((d == 0).mean()),
            kl_k1=float(0.0 - d.mean()),
            kl_k3=float((ratio - 1.0 - d).mean()),
            median=float(median),
            p99=float(p99),
            max=float(size.max()),
            ess=float(scaled.sum() ** 2 / (len(d) * (scaled**2).sum())),
            outside=float(((ratio < band[0]) | (ratio > band[1])).mean()),
        )


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The result of `measure`. `print` it for a table and the verdict; `plot_mismatch(found, path)` draws it."""

    all: Gap
    by_version: dict[int, Gap]  # weight version of each token, where the server says it
    # by place in the completion: 0, 1, 2-3, 4-7, 8-15, ... under the first of them
    by_position: dict[int, Gap]
    verdict: Verdict

    def __str__(self) -> str:
        rows = {"all": self.all, **{f"version {v}": gap for v, gap in self.by_version.items()}}
        rows |= {f"from token {p}": gap for p, gap in self.by_position.items()}
        names = [field.name for field in fields(Gap)]
        lines = [" " * 16 + "".join(f"{name:>10}" for name in names)]
        lines += [f"{title:16}" + _numbers(gap, names) for title, gap in rows.items()]
        return "\n".join([*lines, str(self.verdict)])


def measure(
    samples: Sequence[SampledCompletion],
    trainer_logprobs: Sequence[Sequence[float]],
    *,
    against: Against = "inference",
    band: tuple[float, float] = (0.5, 2.0),
    trainer_version: int | None = None,
) -> Mismatch:
    """Compare a trainer's logprobs of each sample's completion tokens [C] with the sampler's.

    `against`: "inference" for logprobs at temperature 1, "sampling" for those of the distribution that was drawn from
    (a trainer that divides by the temperature). `band`: ratios within it are what a trainer would use unclipped.
    `trainer_version`: the weight version that the trainer believes it has. Raises ValueError for what does not fit.

    >>> sample = SampledCompletion(text="", full_tokens=[1, 2, 3], prompt_len=1, finish_reason="stop",
    ...     completion_len=2, inference_logprobs=[-0.5, -0.25])
    >>> print(measure([sample], [[-0.5, -0.25]]).verdict)
    exact: on-policy to the last bit; all 2 tokens are equal
    """
    rows = [_Row.of(i, s, p, against) for i, (s, p) in enumerate(zip(samples, trainer_logprobs, strict=True))]
    rows = [row for row in rows if len(row.sampler)]
    if not rows:
        raise ValueError("there are no tokens to compare")
    d = np.concatenate([row.trainer - row.sampler for row in rows])
    position = np.concatenate([np.arange(len(row.sampler)) for row in rows])
    octave = np.where(position > 0, 2 ** np.floor(np.log2(np.maximum(position, 1))), 0).astype(np.int64)
    versions = np.concatenate([row.versions for row in rows])
    by_version = _by(versions, d, band)
    by_version.pop(-1, None)
    evidence = Evidence(
        d=d,
        versions=versions,
        trainer_version=trainer_version,
        sampler=np.concatenate([row.sampler for row in rows]),
        others={
            name: _difference(rows, name) for name in rows[0].others if all(name in r.others for r in rows)
        },
        shifted=_shifted(rows),
        against=against,
        samples=np.repeat(np.arange(len(rows)), [len(row.sampler) for row in rows]),
    )
    return Mismatch(Gap.of(d, band), by_version, _by(octave, d, band), judge(evidence))


@dataclass(frozen=True, slots=True)
class _Row:
    """One sample's numbers, each [C]."""

    sampler: Floats
    trainer: Floats
    versions: Integers  # -1: untold
    others: dict[str, Floats]  # what the trainer may have computed instead

    @classmethod
    def of(cls, i: int, sample: SampledCompletion, trainer: Sequence[float], against: Against) -> _Row:
        count = sample.completion_len
        known = {
            "inference": _last(sample.inference_logprobs, count),
            "sampling": _last(sample.sampling_logprobs, count),
        }
        sampler, values = known.pop(against), np.asarray(trainer, np.float64)
        if sampler is None:
            raise ValueError(f"sample {i} has no {against}_logprobs: ask for logprobs=True")
        if values.shape != (count,):
            raise ValueError(
                f"sample {i} has {count} completion tokens, the trainer gave {values.shape} logprobs"
            )
        if not np.isfinite(values).all():
            raise ValueError(
                f"sample {i}: the trainer's logprob of token {int(np.argmin(np.isfinite(values)))} is not finite"
            )
        others = {name: other for name, other in known.items() if other is not None}
        sampling = _last(sample.sampling_logprobs, count)
        if sample.kept is not None and sampling is not None:
            # With the temperature and without the truncation: the draw's own distribution before it was cut.
            others["untruncated"] = sampling + np.log([entry["mass"] for entry in sample.kept])
        return cls(sampler, values, np.fromiter(_versions(sample), np.int64, count), others)


def _versions(sample: SampledCompletion) -> Iterator[int]:
    if sample.weight_version_spans:
        for span in sample.weight_version_spans:
            yield from [span["weight_version"]] * (span["end"] - span["start"])
    else:
        yield from [-1 if sample.weight_version is None else sample.weight_version] * sample.completion_len


def _last(values: Sequence[float] | None, count: int) -> Floats | None:
    """Return the completion's own [C] of P+C-1 or C values."""
    return None if values is None else np.asarray(values[len(values) - count :], np.float64)


def _by(keys: Integers, d: Floats, band: tuple[float, float]) -> dict[int, Gap]:
    return {int(key): Gap.of(d[keys == key], band) for key in np.unique(keys)}


def _difference(rows: Sequence[_Row], name: str) -> Floats:
    return np.concatenate([row.trainer - row.others[name] for row in rows])


def _shifted(rows: Sequence[_Row]) -> dict[str, tuple[Floats, Floats]]:
    """Differences when the trainer's rows are moved by one, with the unmoved ones of the same tokens."""
    long = [row for row in rows if len(row.sampler) > 1]
    if not long:
        return {}
    late = np.concatenate([row.trainer[1:] - row.sampler[:-1] for row in long])
    early = np.concatenate([row.trainer[:-1] - row.sampler[1:] for row in long])
    unmoved_late = np.concatenate([row.trainer[1:] - row.sampler[1:] for row in long])
    unmoved_early = np.concatenate([row.trainer[:-1] - row.sampler[:-1] for row in long])
    return {"late": (late, unmoved_late), "early": (early, unmoved_early)}


def _numbers(gap: Gap, names: Sequence[str]) -> str:
    values: list[Any] = [getattr(gap, name) for name in names]
    return "".join(f"{v:>10,}" if isinstance(v, int) else f"{v:>10.2g}" for v in values)
