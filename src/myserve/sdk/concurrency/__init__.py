"""Concurrency: controllers, the arithmetic of the adaptive one, and the semaphore whose limit they move."""

from myserve.sdk.concurrency.aimd import AIMD, Observed
from myserve.sdk.concurrency.controllers import (
    AdaptiveConcurrencyController,
    FixedConcurrencyController,
    StepSummary,
)
from myserve.sdk.concurrency.semaphore import Permit, ResizableSemaphore, Waiter

__all__ = [
    "AIMD",
    "AdaptiveConcurrencyController",
    "FixedConcurrencyController",
    "Observed",
    "Permit",
    "ResizableSemaphore",
    "StepSummary",
    "Waiter",
]
