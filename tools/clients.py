"""Other clients' own packages, in an environment of their own, against our server: `python -m tools.clients`.

They want other versions than ours of packages that we have too, so they are not installed with us. The environment is
made once for each version of its list, in about a minute. With `--optional` packages that cannot be had are said, and
are no failure.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import venv
from pathlib import Path

__all__ = ["EnvironmentNotMadeError", "main", "make_environment"]

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venv-clients"
LIST = ROOT / "tests" / "clients" / "requirements.txt"
# without what they bring, which is torch, transformers and more
ALONE = ("trl==1.16.0", "tinker==0.38.0")
INSTALL_SECONDS = 600
TEST_SECONDS = 900


class EnvironmentNotMadeError(Exception):
    """The packages cannot be had: no registry, or not within the time."""


def make_environment(folder: Path, requirements: Path, *, index_url: str | None = None) -> Path:
    """Return the Python of an environment with `requirements`; make it where there is none, or an older one.

    Raises EnvironmentNotMadeError.
    """
    wanted = hashlib.sha256(requirements.read_bytes() + repr(ALONE).encode()).hexdigest()
    stamp, python = folder / "made-of", folder / "bin" / "python"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    venv.create(folder, clear=True, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    pip += ["--retries", "1", "--timeout", "30"] + (["--index-url", index_url] if index_url else [])
    for packages in (["--requirement", str(requirements)], ["--no-deps", *ALONE]):
        try:
            run = subprocess.run(
                [*pip, *packages], capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise EnvironmentNotMadeError(f"pip was not done after {INSTALL_SECONDS} s") from None
        if run.returncode:
            lines = (run.stderr or run.stdout).strip().splitlines()
            raise EnvironmentNotMadeError(lines[-1] if lines else f"pip ended with {run.returncode}")
    stamp.write_text(wanted)
    return python


def main(arguments: list[str] | None = None) -> int:
    """Make the environment and run tests/clients in it, against a server of this one. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.clients", description=__doc__)
    parser.add_argument("--optional", action="store_true", help="no failure where the packages cannot be had")
    options = parser.parse_args(arguments)
    try:
        make_environment(FOLDER, LIST)
    except EnvironmentNotMadeError as error:
        print(f"THE CLIENTS' TESTS DO NOT RUN: their packages cannot be installed: {error}", flush=True)
        return 0 if options.optional else 1
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:xdist",
        "tests/clients/test_in_their_own_environment.py",
    ]
    try:
        return subprocess.run(tests, cwd=ROOT, timeout=TEST_SECONDS, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"the clients' tests were not done after {TEST_SECONDS} s", flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
