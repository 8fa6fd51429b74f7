"""All checks, in the order in which they run: what others build on comes first."""

from __future__ import annotations

from myserve.verify.checks.distribution import DISTRIBUTION
from myserve.verify.checks.independence import INDEPENDENCE
from myserve.verify.checks.penalties import PENALTIES
from myserve.verify.checks.refusals import REFUSALS
from myserve.verify.checks.reports import REPORTS
from myserve.verify.checks.seeds import SEEDS
from myserve.verify.checks.text import TEXT
from myserve.verify.results import Check

__all__ = ["CHECKS"]

CHECKS: tuple[Check, ...] = (*SEEDS, *DISTRIBUTION, *PENALTIES, *TEXT, *REPORTS, *INDEPENDENCE, *REFUSALS)
