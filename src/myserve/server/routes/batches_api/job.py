"""One batch's life as a table, and what of it outlives the process."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from myserve.server.errors import NotFoundError
from myserve.server.routes.batches_api.file_store import KEPT_SECONDS, write_json
from myserve.wire.batches_api.objects import BatchFault, BatchObject, BatchStatus
from myserve.wire.batches_api.usage import BatchUsage

__all__ = ["ENDED", "BatchJob", "JobStore"]

# expired is entered when the files are written, as completed is
TRANSITIONS: dict[BatchStatus, frozenset[BatchStatus]] = {
    "validating": frozenset({"in_progress", "failed", "cancelling", "expired"}),
    "in_progress": frozenset({"finalizing", "cancelling", "expired", "failed"}),
    "finalizing": frozenset({"completed", "failed"}),
    "cancelling": frozenset({"cancelled", "failed"}),
}
ENDED: frozenset[BatchStatus] = frozenset({"completed", "failed", "expired", "cancelled"})


@dataclass(slots=True, eq=False)
class BatchJob:
    """One batch. `times` has by name, as `failed_at`, when a status began, in unix seconds.

    >>> job = BatchJob("batch_1", "", "/v1/completions", "file-1", "24h", created_at=0, expires_at=86400)
    >>> job.become("in_progress", 5); job.status, job.times
    ('in_progress', {'in_progress_at': 5})
    >>> job.become("completed", 6)
    Traceback (most recent call last):
    ...
    AssertionError: batch_1: no way from in_progress to completed
    """

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    metadata: dict[str, str] | None = None
    output_seconds: int = KEPT_SECONDS
    status: BatchStatus = "validating"
    times: dict[str, int] = field(default_factory=dict)
    faults: list[BatchFault] = field(default_factory=list)
    output_file_id: str | None = None
    error_file_id: str | None = None
    num_lines: int = 0
    num_completed: int = 0
    num_failed: int = 0
    usage: BatchUsage | None = None  # known when it has ended

    def become(self, status: BatchStatus, now: float) -> None:
        """Enter a status."""
        assert status in TRANSITIONS.get(self.status, ()), f"{self.id}: no way from {self.status} to {status}"
        self.status = status
        self.times[f"{status}_at"] = int(now)

    @property
    def has_ended(self) -> bool:
        """Return whether nothing of it will change."""
        return self.status in ENDED

    def body(self, warnings: list[str]) -> BatchObject:
        """Return it as OpenAI's object."""
        at = self.times.get
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": self.faults} if self.faults else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "in_progress_at": at("in_progress_at"),
            "expires_at": self.expires_at,
            "finalizing_at": at("finalizing_at"),
            "completed_at": at("completed_at"),
            "failed_at": at("failed_at"),
            "expired_at": at("expired_at"),
            "cancelling_at": at("cancelling_at"),
            "cancelled_at": at("cancelled_at"),
            "request_counts": {
                "total": self.num_lines,
                "completed": self.num_completed,
                "failed": self.num_failed,
            },
            "usage": self.usage,
            "metadata": self.metadata,
            "warnings": warnings,
        }


class JobStore:
    """Keep batches in a folder: `<id>.json`, and `<id>.answers` while it runs. Used on the event loop alone."""

    def __init__(self, folder: Path, now: Callable[[], float] = time.time) -> None:
        self._folder, self.now = folder, now
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        jobs = [BatchJob(**json.loads(path.read_text("utf-8"))) for path in folder.glob("*.json")]
        self._jobs = {job.id: job for job in sorted(jobs, key=lambda job: job.created_at)}

    def make(self, **fields: object) -> BatchJob:
        """Make a batch and save it."""
        self._forget_old()
        job = BatchJob(id=f"batch_{uuid.uuid4().hex}", **fields)  # type: ignore[arg-type]  # BatchJob's fields
        self.save(job)
        self._jobs[job.id] = job
        return job

    def save(self, job: BatchJob) -> None:
        """Bring a batch to the disk. Raises OSError."""
        write_json(self._folder / f"{job.id}.json", asdict(job))

    def get(self, owner: str, batch_id: str) -> BatchJob:
        """Return an owner's batch. Raises NotFoundError."""
        job = self._jobs.get(batch_id)
        if job is None or job.owner != owner:
            raise NotFoundError(f"no batch {batch_id[:80]!r} is kept here", param="batch_id")
        return job

    def of(self, owner: str) -> list[BatchJob]:
        """Return an owner's batches, the newest first, as OpenAI lists them."""
        self._forget_old()
        return [job for job in reversed(self._jobs.values()) if job.owner == owner]

    def unfinished(self) -> list[BatchJob]:
        """Return the batches that are to go on, the oldest first."""
        return [job for job in self._jobs.values() if not job.has_ended]

    def journal_path(self, job: BatchJob) -> Path:
        """Return where a batch's answers are while it runs."""
        return self._folder / f"{job.id}.answers"

    def _forget_old(self) -> None:
        """Forget what has ended when its files are gone."""
        now = self.now()
        for job in [job for job in self._jobs.values() if job.has_ended]:
            if job.times[f"{job.status}_at"] + max(job.output_seconds, KEPT_SECONDS) < now:
                del self._jobs[job.id]
                (self._folder / f"{job.id}.json").unlink(missing_ok=True)
