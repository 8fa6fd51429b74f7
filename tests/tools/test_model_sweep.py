"""The sweep of kinds finds what runs, what is refused, what is wrong and what ends its process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from myserve.engine.mixers import attention
from tools import model_sweep
from tools.model_sweep import KINDS, Verdict, table, try_kind, write_page

PAGE = Path(model_sweep.__file__).parents[1] / "docs" / "models.md"

# A fork of a process whose threads have computed hangs; the tool itself forks before any has.
own_process = pytest.mark.own_process


@own_process
def test_a_kind_that_runs_has_the_trainers_bits_and_one_that_does_not_is_refused() -> None:
    llama, gptj = try_kind("llama"), try_kind("gptj")
    assert (llama.result, llama.rows_are_independent, llama.trainer_has_the_bits) == ("runs", True, True)
    assert (gptj.result, gptj.is_bad) == ("refused", False)
    page = "\n".join(table([llama, gptj]))
    assert "| runs | `llama` |" in page and "interface | `gptj` |" in page


@own_process
def test_control_numbers_of_the_server_alone_that_are_off_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that cuts the engine's attention short of the prompt; the self-test's prompt is shorter."""
    honest = attention.paged_attention

    def short_sighted(*args: Any, **options: Any) -> Any:
        return honest(*args, **options | {"window": 64})

    monkeypatch.setattr(attention, "paged_attention", short_sighted)
    assert try_kind("llama").result == "WRONG"


@own_process
def test_control_a_process_that_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_sweep, "make", lambda *_: os._exit(7))
    verdict = try_kind("llama")
    assert (verdict.result, verdict.words) == ("BROKEN", "its process ended with 7")


def test_the_page_is_written_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "models.md"
    page.write_text(PAGE.read_text())
    write_page(
        [Verdict("llama", "runs"), Verdict("doge", "refused", "gives its attention a mask of its own")], page
    )
    text = page.read_text()
    assert "| runs | `llama` |" in text and "no window | `doge` |" in text and "## Checkpoints" in text


def test_the_page_names_every_kind_once() -> None:
    table_of_page = PAGE.read_text().split(model_sweep.BEGIN)[1].split(model_sweep.END)[0].splitlines()
    rows = [line for line in table_of_page if line.startswith("| ")]
    named = [word.strip("`") for row in rows for word in row.split("|")[2].split() if word.startswith("`")]
    assert len(named) == len(set(named)) and set(named) <= KINDS.keys() and len(named) > 200
