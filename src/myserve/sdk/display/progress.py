"""The progress bar of a batch: samples done, tokens a second, in flight, failed. It writes to stderr alone."""

from __future__ import annotations

import time
from importlib.util import find_spec
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from myserve.sdk.transport.pool import ServerPool

__all__ = ["SampleProgress"]


class SampleProgress:
    """Show a rich progress bar over samples; it refreshes at rich's own pace."""

    def __init__(self, total: int, backend: ServerPool) -> None:
        self._backend = backend
        self._tokens_before = backend.stats.completion_tokens
        self._started = time.monotonic()
        self._progress = Progress(
            TextColumn("[bold]sampling"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("[dim]{task.fields[detail]}"),
            TimeRemainingColumn(),
            # In a notebook rich draws with ipywidgets alone, and warns where there are none: then as anywhere else.
            console=Console(stderr=True, force_jupyter=None if find_spec("ipywidgets") else False),
        )
        self._task = self._progress.add_task("sampling", total=total, detail="")

    def advance(self, samples: int) -> None:
        """Count `samples` more as done."""
        self._progress.update(self._task, advance=samples, detail=self._detail())

    def _detail(self) -> str:
        stats, semaphore = self._backend.stats, self._backend.semaphore
        tokens = stats.completion_tokens - self._tokens_before
        pace = tokens / max(1e-9, time.monotonic() - self._started)
        failed = f" · {stats.failed} failed" if stats.failed else ""
        window = "" if semaphore.limit is None else f"/{semaphore.limit}"
        return f"{pace:,.0f} tokens/s · {semaphore.in_flight}{window} in flight{failed}"

    def __enter__(self) -> SampleProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.update(self._task, detail=self._detail())
        self._progress.stop()
