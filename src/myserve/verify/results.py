"""A check is a small object: its name, what it does, what it needs; its result is passed, failed or skipped."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from myserve.verify.trial import Trial

__all__ = ["Check", "CheckResult", "Status"]

Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True, slots=True)
class Check:
    """Describe one check. `needs`: checks that must not have failed before, for this one builds on them."""

    id: str
    does: str
    run: Callable[[Trial], Awaitable[str]]  # the evidence; raises FaultError or LackingError
    needs: tuple[str, ...] = ()
    is_statistical: bool = False


@dataclass(frozen=True, slots=True)
class CheckResult:
    """Hold what came of one check."""

    id: str
    does: str
    status: Status
    evidence: str
    num_requests: int = 0
    num_draws: int = 0
    error_rate: float = 0.0  # of a failure without a fault; 0: the check compares, and cannot be unlucky
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}
