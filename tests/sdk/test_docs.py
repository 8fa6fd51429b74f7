"""The page's blocks run in order, on a real server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "sdk.md"


def test_every_block_runs(server_url, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 7
    here = {
        '"http://localhost:8000"': repr(server_url),
        '"Qwen/Qwen3-8B"': repr(str(tiny_model("qwen3"))),
        '"my-model"': repr("tiny"),
    }
    namespace: dict[str, object] = {}
    for block in blocks:
        for theirs, ours in here.items():
            block = block.replace(theirs, ours)
        exec(compile(block, str(PAGE), "exec"), namespace)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) >= 4 * 2 + 1 + 9 + 1 + 1 + 1  # samples, sync, batch, summary, drift, columns
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == 1 + 9 * 2


@pytest.mark.parametrize(
    "option", ["max_seq_len", "on_error", "seed", "timeout", "echo", "include_routing_matrix"]
)
def test_every_option_is_on_the_page(option):
    assert f"`{option}`" in PAGE.read_text()
