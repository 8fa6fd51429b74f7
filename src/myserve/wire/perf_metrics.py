"""A request's costs, under the names that Fireworks' client reads, in the body and in the headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

__all__ = ["PerfMetrics"]

HEADER_PREFIX = "fireworks-"


@dataclass(frozen=True, slots=True, kw_only=True)
class PerfMetrics:
    """Durations in seconds, the rest counts or names. None means "not measured" and is left out on the wire.

    >>> metrics = PerfMetrics(prompt_tokens=12, prefill_queue_duration=0.25)
    >>> metrics.to_dict()
    {'prompt-tokens': 12, 'prefill-queue-duration': 0.25}
    >>> metrics.to_headers()
    {'fireworks-prompt-tokens': '12', 'fireworks-prefill-queue-duration': '0.25'}
    >>> PerfMetrics.from_mapping(metrics.to_headers()) == metrics
    True
    """

    prompt_tokens: int | None = None
    cached_prompt_tokens: int | None = None
    server_time_to_first_token: float | None = None
    server_processing_time: float | None = None
    num_concurrent_requests: int | None = None
    prefill_queue_duration: float | None = None
    prefill_duration: float | None = None
    generation_queue_duration: float | None = None
    generation_duration: float | None = None
    tokenizer_queue_duration: float | None = None
    tokenizer_duration: float | None = None
    kv_cache_usage: float | None = None  # fraction of the KV cache's blocks in use; beyond Fireworks' names
    # tokens that were drafted and verified, and those of them that were drawn: of all choices
    speculation_generated_tokens: int | None = None
    speculation_accepted_tokens: int | None = None
    backend_host: str | None = None
    deployment: str | None = None

    def to_dict(self) -> dict[str, int | float | str]:
        """The body's `perf_metrics`: hyphenated names without the prefix."""
        values = ((name, getattr(self, name)) for name in _TYPES)
        return {name.replace("_", "-"): value for name, value in values if value is not None}

    def to_headers(self) -> dict[str, str]:
        """Return the metrics as response headers, with the prefix."""
        return {HEADER_PREFIX + name: str(value) for name, value in self.to_dict().items()}

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, object]) -> PerfMetrics:
        """From a body's `perf_metrics` or from response headers, prefix or not; any other key is ignored.

        A value that is no number where one belongs counts as not measured: metrics never fail a request.

        >>> PerfMetrics.from_mapping({"Fireworks-Prompt-Tokens": "7", "date": "today"}).prompt_tokens
        7
        """
        values: dict[str, int | float | str] = {}
        for key, value in mapping.items():
            name = key.lower().removeprefix(HEADER_PREFIX).replace("-", "_")
            parsed = _parse(_TYPES[name], value) if name in _TYPES else None
            if parsed is not None:
                values[name] = parsed
        return cls(**values)  # type: ignore[arg-type]  # _parse made each value of its field's type


_TYPES: dict[str, type[int] | type[float] | type[str]] = {
    field.name: {"int | None": int, "float | None": float, "str | None": str}[str(field.type)]
    for field in fields(PerfMetrics)
}


def _parse(kind: type[int] | type[float] | type[str], value: object) -> int | float | str | None:
    if kind is str:
        return str(value)
    try:
        number = float(str(value))
        return int(number) if kind is int else number
    except (ValueError, OverflowError):
        return None
