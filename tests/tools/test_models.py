"""The sweep of kinds finds what runs, what is refused, what is wrong and what ends its process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from myserve.engine.mixers import attention
from tools.models import trial
from tools.models.kinds import KINDS, TYPES, make
from tools.models.page import PAGE, changes, rows_of, table, write_page
from tools.models.trial import Verdict, try_kind

# A fork of a process whose threads have computed hangs; the tool itself forks before any has.
own_process = pytest.mark.own_process


@own_process
def test_a_kind_that_runs_has_the_trainers_bits_and_one_that_does_not_is_refused() -> None:
    llama, gptj = try_kind("llama"), try_kind("gptj")
    assert (llama.result, llama.rows_are_independent, llama.trainer_has_the_bits) == ("served", True, True)
    assert (gptj.result, gptj.is_bad) == ("refused", False)
    told = changes([llama, gptj], is_whole=False)
    assert told == []  # they stand where the page has them
    assert (llama.differs, gptj.differs) == ("", "")


def test_odd_sizes_are_odd_and_leave_a_variants_own(tmp_path: Path) -> None:
    make("qwen3_5_text", tmp_path, "odd")
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.num_attention_heads, config.num_key_value_heads, config.linear_num_key_heads) == (5, 1, 3)
    assert config.tie_word_embeddings and config.hidden_size % 16 and config.linear_value_head_dim % 8
    make("kimi_linear", tmp_path, "odd")
    assert (
        AutoConfig.from_pretrained(tmp_path).num_key_value_heads == 5
    )  # as many as of queries, as its type wants


@pytest.mark.thorough
@own_process
def test_control_numbers_of_the_server_alone_that_are_off_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that cuts the engine's attention short of the prompt; the self-test's prompt is shorter."""
    honest = attention.paged_attention

    def short_sighted(*args: Any, **options: Any) -> Any:
        return honest(*args, **options | {"window": 64})

    monkeypatch.setattr(attention, "paged_attention", short_sighted)
    assert try_kind("llama").result == "WRONG"


@pytest.mark.thorough
@own_process
def test_control_a_process_that_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "make", lambda *_: os._exit(7))
    verdict = try_kind("llama")
    assert (verdict.result, verdict.words) == ("BROKEN", "its process ended with 7")


def test_the_page_is_written_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "models.md"
    page.write_text(PAGE.read_text())
    write_page(
        [Verdict("llama", "served"), Verdict("doge", "refused", "gives its attention a mask of its own")],
        page,
    )
    text = page.read_text()
    row = "refused: its attention does not go through transformers' interface"
    assert list(table({"gptj": row}))[-1] == f"| {row} | `gptj` |"
    assert (
        "| served, exact | `llama` |" in text and "no window | `doge` |" in text and "## Checkpoints" in text
    )


def test_the_page_names_every_kind_of_the_installed_transformers() -> None:
    """A type that a new transformers brings, or no longer has, shows here: `python -m tools.models` tries it."""
    assert rows_of().keys() == KINDS.keys() and len(TYPES) > 180


def test_what_stands_in_another_row_is_told() -> None:
    as_on_page = [Verdict(kind, "served") for kind, row in rows_of().items() if row == "served, exact"]
    told = changes(as_on_page)
    assert len(told) == len(KINDS) - len(as_on_page)  # all the others are not there
    changed = changes([*as_on_page[1:], Verdict(as_on_page[0].kind, "WRONG")])
    assert len(changed) == len(told) + 1
    assert f"{as_on_page[0].kind}: was served, exact; is WRONG: to be mended" in changed


def test_kinds_that_are_tried_anew_change_rows_and_the_others_keep_theirs(tmp_path: Path) -> None:
    page = tmp_path / "models.md"
    page.write_text(PAGE.read_text())
    before = dict(rows_of(page))
    write_page([Verdict("mamba", "served"), Verdict("new", "served")], page, is_whole=False)
    assert rows_of(page) == before | {"mamba": "served, exact", "new": "served, exact"}
    assert "parts of it on" in page.read_text()


@pytest.mark.thorough
@own_process
def test_control_bits_that_depend_on_the_batch_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit of a step with several requests; the self-test is told that all is well."""
    honest = trial._at_once

    async def other(engine: Any) -> Any:
        (ids, logprobs), *rest = await honest(engine)
        return [(ids, [logprobs[0] + 1e-9, *logprobs[1:]]), *rest]

    monkeypatch.setattr(trial, "_at_once", other)
    verdict = try_kind("llama")
    assert (verdict.result, verdict.differs) == ("WRONG", "alone")
