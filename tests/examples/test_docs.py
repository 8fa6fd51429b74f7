"""What docs/training.md shows works: its Python runs, its options exist, its pictures are there."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

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


def test_make_grpo_runs_the_script():
    assert "examples/grpo.py $(ARGS)" in (ROOT / "Makefile").read_text()
