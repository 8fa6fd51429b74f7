"""Charts: real files with the words on them, the same bytes for the same numbers, and an error without matplotlib."""

from __future__ import annotations

import subprocess
import sys
from xml.etree import ElementTree

import pytest

from myserve.sdk.display.plotting import PlottingError, check_chart_path, line_plot

SERIES = {"reward": [(0, 0.1), (1, 0.4)], "held out": [(0, 0.2), (1, 0.3)]}
WORDS = {"title": "GRPO", "x": "step", "y": "share right"}


def test_a_chart_has_its_title_axes_ticks_and_legend_and_is_the_same_twice(tmp_path):
    for name in ("one.svg", "two.svg"):
        line_plot(tmp_path / name, SERIES, **WORDS, percent=True)
    text = (tmp_path / "one.svg").read_text()
    assert ElementTree.fromstring(text).tag.endswith("svg")
    for words in ("GRPO", "step", "share right", "reward", "held out", "20%", "0.0"):
        assert f">{words}<" in text.replace("0.00", "0.0"), words
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_the_files_ending_is_its_format(tmp_path):
    line_plot(tmp_path / "chart.png", SERIES, **WORDS)
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    line_plot(tmp_path / "chart.pdf", SERIES, **WORDS)
    assert (tmp_path / "chart.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(PlottingError, match=r"ends with \.svg, \.png, \.pdf, not 'chart\.txt'"):
        check_chart_path("chart.txt")


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [(0, float("nan"))]}, {"a": [(float("inf"), 0)]}])
def test_no_points_or_endless_ones_are_refused(tmp_path, series):
    with pytest.raises(ValueError, match="finite"):
        line_plot(tmp_path / "chart.svg", series, **WORDS)


def test_without_matplotlib_it_says_how_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlottingError, match=r"pip install 'myserve\[plot\]'"):
        check_chart_path("chart.svg")


def test_matplotlib_is_imported_for_a_chart_alone():
    code = "import sys, myserve.sdk.mismatch, myserve.bench.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
