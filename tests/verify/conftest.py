"""Our server with the embedded model, behind a layer that can break one thing at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.verify.__main__ import serving
from benchmarks.verify.faulty import FaultySampler


@pytest.fixture(scope="session")
def sampler() -> Iterator[tuple[str, FaultySampler]]:
    """The URL of a server, and its layer of faults: none until a test sets one."""
    with serving() as running:
        yield running
