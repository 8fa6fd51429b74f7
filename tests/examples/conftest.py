"""The examples as modules, and one server of the embedded model for those that only sample."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session", autouse=True)
def examples_are_importable() -> Iterator[None]:
    """As `python examples/grpo.py` makes them."""
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="session")
def weights_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="session")
def embedded_url(weights_dir: Path) -> Iterator[str]:
    """`myserve serve` on the embedded model, in float32, taking weights from `weights_dir`."""
    from support.serving import Server

    from myserve.embedded import embedded_model_path

    with Server(str(embedded_model_path()), weights_dir) as server:
        yield server.url
