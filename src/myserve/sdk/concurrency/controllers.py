"""Controllers: they decide how many samples may be in flight, from what finished samples report."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypedDict

from myserve.sdk.concurrency.aimd import AIMD, Observed
from myserve.sdk.concurrency.semaphore import ResizableSemaphore
from myserve.wire.perf_metrics import PerfMetrics

__all__ = ["AdaptiveConcurrencyController", "FixedConcurrencyController", "StepSummary"]


class StepSummary(TypedDict):
    """The result of `step_completed`. Averages and rates are None where no sample reports them."""

    window: int  # samples in flight that the next step may have
    previous_window: int  # as it was when the step began
    avg_pq: float | None  # seconds of prefill queue, over the step's samples
    cache_hit_rate: float | None  # cached prompt tokens / prompt tokens
    kv_usage: float | None  # fraction of the server's KV cache in use, over the step's samples
    samples: int
    refused: int  # answers of 429 and 503
    peak_in_flight: int


@dataclass(slots=True)
class _Tally:
    """Sum up the samples of a period."""

    samples: int = 0
    queue_samples: int = 0
    queue_seconds: float = 0.0
    service_samples: int = 0
    service_seconds: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    refused: int = 0
    kv_samples: int = 0
    kv_sum: float = 0.0

    def add(self, metrics: PerfMetrics, samples: int) -> None:
        self.samples += samples
        if metrics.prefill_queue_duration is not None:
            self.queue_samples += samples
            self.queue_seconds += samples * metrics.prefill_queue_duration
        if metrics.generation_duration is not None:
            self.service_samples += samples
            self.service_seconds += samples * (
                metrics.generation_duration + (metrics.prefill_duration or 0.0)
            )
        if metrics.prompt_tokens is not None and metrics.cached_prompt_tokens is not None:
            self.prompt_tokens += metrics.prompt_tokens
            self.cached_tokens += metrics.cached_prompt_tokens
        # our server reports it; Fireworks and vLLM do not
        if metrics.kv_cache_usage is not None:
            self.kv_samples += samples
            self.kv_sum += samples * metrics.kv_cache_usage

    @property
    def avg_queue(self) -> float | None:
        return self.queue_seconds / self.queue_samples if self.queue_samples else None

    @property
    def avg_service(self) -> float | None:
        return self.service_seconds / self.service_samples if self.service_samples else None

    @property
    def kv_usage(self) -> float | None:
        return self.kv_sum / self.kv_samples if self.kv_samples else None


class FixedConcurrencyController:
    """Allow at most `max_concurrency` samples in flight. Raises ValueError for less than one.

    >>> FixedConcurrencyController(32).window
    32
    """

    def __init__(self, max_concurrency: int) -> None:
        if max_concurrency < 1:
            raise ValueError(f"max_concurrency must be at least 1, got {max_concurrency}")
        self.semaphore = ResizableSemaphore(max_concurrency)
        self._step = _Tally()
        self._window_at_start = max_concurrency

    @property
    def window(self) -> int:
        """Return how many samples may be in flight now."""
        assert self.semaphore.limit is not None
        return self.semaphore.limit

    @property
    def in_flight(self) -> int:
        """Return how many samples are in flight now."""
        return self.semaphore.in_flight

    def observe(self, metrics: PerfMetrics, *, samples: int, limit_version: int) -> None:
        """Take in one answered request: its metrics, its samples, and the version of the limit that admitted it."""
        self._step.add(metrics, samples)

    def refused(self, *, limit_version: int) -> None:
        """Take in a 429 or a 503."""
        self._step.refused += 1

    def step_completed(self) -> StepSummary:
        """Close the period of one training step and return its summary. Call it between steps."""
        step = self._step
        summary = StepSummary(
            window=self.window,
            previous_window=self._window_at_start,
            avg_pq=step.avg_queue,
            cache_hit_rate=step.cached_tokens / step.prompt_tokens if step.prompt_tokens else None,
            kv_usage=step.kv_usage,
            samples=step.samples,
            refused=step.refused,
            peak_in_flight=self.semaphore.peak_in_flight,
        )
        self._step, self._window_at_start = _Tally(), self.window
        self.semaphore.restart_peak()
        return summary


class AdaptiveConcurrencyController(FixedConcurrencyController):
    """Move the window with the server's prefill queue: it grows below the target and shrinks above it.

    Between steps `step_completed` moves it, and halves it above the target. Inside a step it moves too
    (`adapt_within_step`), at most once per window of samples, judged by those alone that were admitted after the
    last move: so one burst of queueing shrinks it once. That is its cooldown, and why it needs no clock. These
    moves take away what queues and no more; a step that had any ends with such a one instead of a halving.

    >>> controller = AdaptiveConcurrencyController(initial_window=16)
    >>> limit_version = controller.semaphore.limit_version
    >>> controller.observe(PerfMetrics(prefill_queue_duration=2.0), samples=1, limit_version=limit_version)
    >>> controller.step_completed()["window"]
    8
    """

    def __init__(
        self,
        initial_window: int = 16,
        min_window: int = 1,
        max_window: int = 256,
        prefill_queue_target: float = 0.5,
        *,
        adapt_within_step: bool = True,
    ) -> None:
        if not 1 <= min_window <= initial_window <= max_window:
            raise ValueError(
                "windows must be 1 <= min_window <= initial_window <= max_window, "
                f"got {min_window}, {initial_window}, {max_window}"
            )
        if prefill_queue_target <= 0:
            raise ValueError(f"prefill_queue_target must be above 0 seconds, got {prefill_queue_target}")
        super().__init__(initial_window)
        self.law = AIMD(min_window=min_window, max_window=max_window, target=prefill_queue_target)
        self._within_step = adapt_within_step
        self._fresh = _Tally()  # of what was admitted since the last move
        # Until the first pressure a step's window doubles, as TCP's does: from 16 to 128 in three moves, not ten.
        self._slow_start = replace(self.law, growth=1.0)
        self._was_pressed = False
        self._has_moved = False  # within this step

    def observe(self, metrics: PerfMetrics, *, samples: int, limit_version: int) -> None:
        super().observe(metrics, samples=samples, limit_version=limit_version)
        if limit_version != self.semaphore.limit_version:
            # it queued under an older window, and tells nothing of this one
            return
        self._fresh.add(metrics, samples)
        if self._within_step and self._fresh.samples >= self.window:
            self._move(gentle=True)

    def refused(self, *, limit_version: int) -> None:
        super().refused(limit_version=limit_version)
        if limit_version != self.semaphore.limit_version:
            return
        self._fresh.refused += 1
        if self._within_step:
            self._move(gentle=True)

    def step_completed(self) -> StepSummary:
        """Move the window, close the period and return its summary."""
        self._move(gentle=self._has_moved)
        self._has_moved = False
        return super().step_completed()

    def _move(self, *, gentle: bool) -> None:
        fresh, self._fresh = self._fresh, _Tally()
        if not fresh.samples and not fresh.refused:
            return
        seen = Observed(
            fresh.avg_queue,
            fresh.avg_service,
            fresh.refused > 0,
            self.semaphore.peak_in_flight,
            fresh.kv_usage,
        )
        self._was_pressed |= self.law.is_pressed(seen)
        law = self._slow_start if gentle and not self._was_pressed else self.law
        self._has_moved = True
        self.semaphore.limit = law.next_window(self.window, seen, gentle=gentle)  # also a new limit_version
