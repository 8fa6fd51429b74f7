"""Computes TTFT, inter-token time and throughput from the moments at which tokens came. Pure; seconds in, ms out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from statistics import mean, median

__all__ = ["Figures", "RequestTimes", "figures", "median_of", "ms_per_step", "percentile"]


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """Hold one completion as the client saw it. Times are seconds of one monotonic clock.

    `times` are those of the events that brought tokens. A server may hold tokens back (half a character) or send
    two at once, so there may be fewer events than `tokens`.
    """

    started: float
    times: tuple[float, ...]
    tokens: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Figures:
    """Hold the figures of one run of a workload. Times in ms; None where the workload has no such thing."""

    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    inter_token_p50: float | None
    inter_token_p90: float | None
    inter_token_p99: float | None
    ms_per_step: float | None
    tokens_per_s: float  # completion tokens over the whole run, prefill included
    prefill_tokens_per_s: float  # prompt tokens until the last first token
    requests_per_s: float
    wall_s: float

    def as_dict(self) -> dict[str, float | None]:
        """Return the figures by name, rounded to six digits."""
        return {name: None if value is None else round(value, 6) for name, value in asdict(self).items()}


def percentile(values: Sequence[float], q: float) -> float:
    """Return the q-th percentile (0 to 100), linear between neighbours: numpy's default, without numpy.

    >>> percentile([4.0, 1.0, 3.0, 2.0], 50), percentile([1.0, 2.0], 90)
    (2.5, 1.9)
    """
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def figures(traces: Sequence[RequestTimes], *, requests: int) -> Figures:
    """Return the figures of one run. `requests`: HTTP requests, of which each may have brought several traces.

    >>> traces = [RequestTimes(0.0, (0.5, 0.6, 0.7), 3, 10), RequestTimes(0.0, (0.5, 0.6, 0.7), 3, 10)]
    >>> run = figures(traces, requests=2)
    >>> round(run.ttft_p50), round(run.inter_token_p50), round(run.ms_per_step), round(run.prefill_tokens_per_s)
    (500, 100, 100, 40)
    """
    start = min(trace.started for trace in traces)
    wall = max(trace.times[-1] for trace in traces) - start
    firsts = [trace.times[0] - trace.started for trace in traces]
    gaps = [after - before for trace in traces for before, after in pairwise(trace.times)]
    # The n choices of a request share its prompt: it counts once.
    prompt_tokens = sum(trace.prompt_tokens for trace in traces) * requests / len(traces)
    between = (None, None, None) if not gaps else tuple(1e3 * percentile(gaps, q) for q in (50, 90, 99))
    return Figures(
        ttft_p50=1e3 * percentile(firsts, 50),
        ttft_p90=1e3 * percentile(firsts, 90),
        ttft_p99=1e3 * percentile(firsts, 99),
        inter_token_p50=between[0],
        inter_token_p90=between[1],
        inter_token_p99=between[2],
        ms_per_step=ms_per_step(traces),
        tokens_per_s=sum(trace.tokens for trace in traces) / wall,
        prefill_tokens_per_s=prompt_tokens / (max(trace.times[0] for trace in traces) - start),
        requests_per_s=requests / wall,
        wall_s=wall,
    )


def ms_per_step(traces: Sequence[RequestTimes]) -> float | None:
    """Return how long one token of every stream takes while all streams decode and none prefills.

    The window goes from the last stream's first token to the first stream's last one; the step is the streams' mean
    pace inside it. Gaps between events would say the same only if every token came alone; steps mixed with prefill
    are what TTFT and the inter-token percentiles show. None when a stream has no two events in the window.

    >>> ms_per_step([RequestTimes(0, (1.0, 1.5, 2.0, 2.1), 4, 1), RequestTimes(0, (1.9, 2.0, 2.1), 3, 1)])
    100.0
    """
    begin = max(trace.times[0] for trace in traces)
    end = min(trace.times[-1] for trace in traces)
    paces = [_pace(trace, begin, end) for trace in traces]
    known = [pace for pace in paces if pace is not None]
    return round(1e3 * mean(known), 6) if len(known) == len(traces) else None


def _pace(trace: RequestTimes, begin: float, end: float) -> float | None:
    """Return the seconds a token between the first and the last event of the window."""
    inside = [moment for moment in trace.times if begin <= moment <= end]
    if len(inside) < 2:
        return None
    tokens_per_event = trace.tokens / len(trace.times)
    return (inside[-1] - inside[0]) / ((len(inside) - 1) * tokens_per_event)


def median_of(runs: Sequence[Figures]) -> Figures:
    """Return, field by field, the median of several runs of one workload.

    >>> runs = [figures([RequestTimes(0.0, (t,), 1, 8)], requests=1) for t in (0.1, 0.9, 0.2)]
    >>> round(median_of(runs).ttft_p50), median_of(runs).ms_per_step
    (200, None)
    """

    def middle(name: str) -> float | None:
        values = [value for run in runs if (value := getattr(run, name)) is not None]
        return median(values) if values else None

    return Figures(**{field.name: middle(field.name) for field in fields(Figures)})  # type: ignore[arg-type]  # None only where each run had None
