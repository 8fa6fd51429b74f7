"""The clients that are not installed with us: their tests, in the environment that `make clients` made."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
PYTHON = FOLDER.parents[1] / ".venv-clients" / "bin" / "python"


@pytest.mark.skipif(not PYTHON.exists(), reason="`make clients` makes the environment that this runs in")
@pytest.mark.skipif("MYSERVE_TEST_URL" in os.environ, reason="this is that environment")
@pytest.mark.timeout(600)
def test_the_clients_own_packages(served: Any) -> None:
    """None is skipped: what is in that environment is what the tests want."""
    command = [
        str(PYTHON),
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-W",
        "ignore",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
    ]
    command += ["--rootdir", str(FOLDER), "--confcutdir", str(FOLDER), str(FOLDER)]
    command += ["--ignore", str(Path(__file__))]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "MYSERVE_TEST_URL": served.base_url.removesuffix("/v1"),
        "MYSERVE_TEST_MODEL": served.model,
    }
    run = subprocess.run(command, env=environment, cwd=FOLDER, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout[-2000:]
