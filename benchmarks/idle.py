"""Waits until the machine is idle, so that a contender is not slowed by the one before it.

vLLM's reader of its engine's messages spins for a second after the last one, on a core that the next contender needs.
"""

from __future__ import annotations

import time

import psutil

PAUSE_S = 1.5
IDLE = 0.10  # share of all cores in use, at most
PATIENCE_S = 15.0
_INTERVAL_S = 0.3


def wait_until_idle(pause: float = PAUSE_S, idle: float = IDLE, patience: float = PATIENCE_S) -> float:
    """Wait `pause` seconds, then until at most `idle` of the CPU is in use or `patience` seconds have passed.

    Returns the share in use at the end, 0 to 1: what a run that begins now shares the machine with.
    """
    time.sleep(pause)
    end = time.monotonic() + patience
    while (busy := psutil.cpu_percent(_INTERVAL_S) / 100) > idle and time.monotonic() < end:
        pass
    return busy
