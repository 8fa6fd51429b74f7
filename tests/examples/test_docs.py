"""What docs/training.md shows works: its Python runs, its options exist, its pictures are there."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from warm_python import warm_python

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text()


def test_every_python_block_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        exec(compile(block, "training.md", "exec"), namespace)
    assert "exact: on-policy" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "mismatch.svg").read_text()


def test_every_option_and_file_that_it_names_exists():
    from grpo_async import AsyncConfig

    options = {"--" + field.name.replace("_", "-") for field in fields(AsyncConfig)} | {"--dtype", "--seeds"}
    assert set(re.findall(r"--[a-z][a-z-]+", PAGE)) <= options
    for path in re.findall(r"(?:examples/[a-z_/]+\.py|(?<=\()\w+\.(?:svg|md)(?=\)))", PAGE):
        assert (ROOT / path).exists() or (ROOT / "docs" / path).exists(), path


SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_starts_as_its_page_says(script: Path, tmp_path: Path) -> None:
    """Elsewhere, and without what pytest adds to the path."""
    begun = f"import runpy, sys; sys.path.insert(0, {str(script.parent)!r}); runpy.run_path({str(script)!r})"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [*warm_python(), "-c", begun],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ran.returncode == 0, ran.stderr


def test_make_grpo_runs_the_script():
    assert "examples/grpo.py $(ARGS)" in (ROOT / "Makefile").read_text()
