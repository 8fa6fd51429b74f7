"""Runs all checks in their order, one after another; a check whose ground has failed is skipped, and says so."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from myserve.sdk.errors import AttemptFailed
from myserve.verify.checks import CHECKS
from myserve.verify.results import Check, CheckResult, Status
from myserve.verify.subject import RefusedError, Subject, VerifyError
from myserve.verify.traits import ServerTraits, find_traits
from myserve.verify.trial import FaultError, LackingError, Trial

__all__ = ["VerifyRun", "verify"]

DEFAULT_DRAWS = 2000
DEFAULT_ERROR_RATE = 1e-4


@dataclass(slots=True)
class VerifyRun:
    """Hold a whole run: of which server, with which numbers, and what came of each check."""

    url: str
    model: str
    run_seed: int
    draws: int
    error_rate: float  # the chance that any check of the run fails without a fault
    traits: ServerTraits
    results: list[CheckResult] = field(default_factory=list)

    @property
    def has_failed(self) -> bool:
        return any(result.status == "failed" for result in self.results)

    def count(self, status: Status) -> int:
        return sum(result.status == status for result in self.results)

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "url": self.url,
            "model": self.model,
            "seed": self.run_seed,
            "draws": self.draws,
            "false_alarm_rate": self.error_rate,
            "server": self.traits.as_dict(),
            "passed": self.count("passed"),
            "failed": self.count("failed"),
            "skipped": self.count("skipped"),
            "checks": [result.as_dict() for result in self.results],
        }


async def verify(
    url: str,
    *,
    model: str = "",
    api_key: str = "",
    seed: int | None = None,
    draws: int = DEFAULT_DRAWS,
    error_rate: float = DEFAULT_ERROR_RATE,
    only: Sequence[str] = (),
    on_result: Callable[[CheckResult], None] = lambda result: None,
) -> VerifyRun:
    """Test a server; return what came of each check.

    `draws`: of each statistical test. `error_rate`: the chance that any of them fails without a fault, over the whole
    run; each has an equal share. `only`: names of checks; those that they build on are run too. Raises VerifyError for
    a server that cannot be asked and for a check that does not exist.
    """
    checks = _chosen(only)
    subject = Subject(url, model, api_key)
    try:
        traits = await find_traits(subject)
        run_seed = secrets.randbits(32) if seed is None else seed
        share = error_rate / sum(check.is_statistical for check in CHECKS)
        run = VerifyRun(subject.url, subject.model, run_seed, draws, error_rate, traits)
        trial = Trial(subject, traits, run_seed, draws, share)
        for check in checks:
            result = await _run_one(check, trial, run.results)
            if check.id == "n_distinct":
                trial.choices_are_independent = result.status == "passed"
            run.results.append(result)
            on_result(result)
    except AttemptFailed as ended:
        raise VerifyError(f"no answer from {subject.url} ({ended.failure.message})") from ended
    finally:
        await subject.aclose()
    return run


async def _run_one(check: Check, trial: Trial, before: Sequence[CheckResult]) -> CheckResult:
    failed = [result.id for result in before if result.status == "failed" and result.id in check.needs]
    requests, draws, started = trial.subject.num_requests, trial.num_draws, time.perf_counter()
    status: Status
    if failed:
        status, evidence = "skipped", f"builds on {', '.join(failed)}, which failed"
    else:
        status, evidence = await _outcome(check, trial)
    return CheckResult(
        check.id,
        check.does,
        status,
        evidence,
        trial.subject.num_requests - requests,
        trial.num_draws - draws,
        trial.error_rate if check.is_statistical else 0.0,
        round(time.perf_counter() - started, 2),
    )


async def _outcome(check: Check, trial: Trial) -> tuple[Status, str]:
    try:
        return "passed", await check.run(trial)
    except LackingError as reason:
        return "skipped", str(reason)
    except FaultError as fault:
        return "failed", str(fault)
    except RefusedError as refused:
        if refused.answer.status in (400, 404, 405, 422, 501):
            return "skipped", f"refused with {refused}"
        return "failed", f"the server answered {refused}"
    except AttemptFailed as ended:
        return "failed", f"no answer: {ended.failure.message}"
    except (KeyError, TypeError, ValueError, IndexError) as error:
        return "failed", f"an answer cannot be read as OpenAI's: {type(error).__name__}: {error}"


def _chosen(only: Sequence[str]) -> list[Check]:
    by_id = {check.id: check for check in CHECKS}
    if unknown := set(only) - by_id.keys():
        raise VerifyError(f"there is no check {', '.join(sorted(unknown))}; there are {', '.join(by_id)}")
    wanted = set(only or by_id)
    for check in reversed(CHECKS):
        if check.id in wanted:
            wanted |= set(check.needs)
    return [check for check in CHECKS if check.id in wanted]
