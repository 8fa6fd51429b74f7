"""A start is never silent: a line for each phase, and one each second while it lasts."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from myserve.engine.progress import phase


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "myserve.start"]


def test_a_short_phase_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "myserve.start"), phase("packing", "once"):
        pass
    assert lines(caplog) == ["packing (once)"]


def test_a_long_phase_says_each_second_what_it_does(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "myserve.start"), phase("compiling", "once") as running:
        running.detail = "1 of 2: attention"
        time.sleep(1.5)
        running.detail = "2 of 2: GEMM"
        time.sleep(1.2)
    first, *middle, last = lines(caplog)
    assert (first, middle[0]) == ("compiling (once)", "compiling (1 of 2: attention): 1 s so far")
    assert "2 of 2: GEMM" in middle[-1] and last.startswith("compiling: done in ")


def test_a_phase_that_fails_ends_its_reports(caplog: pytest.LogCaptureFixture) -> None:
    before = threading.active_count()
    with (
        caplog.at_level(logging.INFO, "myserve.start"),
        pytest.raises(ValueError, match="no"),
        phase("reading"),
    ):
        raise ValueError("no")
    assert threading.active_count() == before
    assert lines(caplog) == ["reading"]


def test_where_it_is_not_shown_no_thread_reports(caplog: pytest.LogCaptureFixture) -> None:
    before = threading.active_count()
    with caplog.at_level(logging.WARNING, "myserve.start"), phase("reading") as running:
        assert threading.active_count() == before
        running.detail = "something"
    assert lines(caplog) == []


def test_a_phase_that_waits_for_another_leaves_the_lines_to_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "myserve.start"), phase("packing"):
        with phase("compiling") as compiling:
            compiling.detail = "1 of 1: GEMM"
            time.sleep(1.5)
        time.sleep(1.2)
    told = lines(caplog)
    assert told[:3] == ["packing", "compiling", "compiling (1 of 1: GEMM): 1 s so far"]
    assert [line for line in told[3:] if line.startswith("packing: ") and "so far" in line]
