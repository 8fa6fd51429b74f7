"""`verify` finds each fault of a faulty server by the check that is there for it, and none in a sound one."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from benchmarks.verify.faulty import FAULTS, FaultySampler
from myserve.cli import app as command
from myserve.verify.checks import CHECKS
from myserve.verify.run import VerifyRun, verify
from myserve.verify.subject import VerifyError


def run(url: str, *only: str, seed: int = 1) -> VerifyRun:
    return asyncio.run(verify(url, seed=seed, draws=400, only=only))


def test_a_sound_server_passes_every_check(sampler: tuple[str, FaultySampler], tmp_path: Path) -> None:
    """Nothing is skipped: each check had something to look at. The reports say the same as the table."""
    url, faulty = sampler
    faulty.fault = None
    files = {ending: tmp_path / f"run.{ending}" for ending in ("html", "json", "xml")}
    options = ["--html", files["html"], "--json", files["json"], "--junit", files["xml"]]
    asked = ["verify", url, "--draws", "300", "--seed", "3", *map(str, options)]
    result = CliRunner().invoke(command, asked, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert f"{len(CHECKS)} passed, 0 failed, 0 skipped" in result.output
    record = json.loads(files["json"].read_text())
    assert [check["status"] for check in record["checks"]] == ["passed"] * len(CHECKS)
    assert record["false_alarm_rate"] == pytest.approx(sum(check["error_rate"] for check in record["checks"]))
    suite = ElementTree.parse(files["xml"]).getroot()
    assert (suite.get("tests"), suite.get("failures")) == (str(len(CHECKS)), "0")
    page = files["html"].read_text()
    assert all(check.id in page for check in CHECKS) and "<script" not in page and "http-equiv" in page


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_by_its_check(name: str, sampler: tuple[str, FaultySampler]) -> None:
    """And by none of those that it builds on. `python -m benchmarks.verify --faults` runs all checks on each."""
    url, faulty = sampler
    faulty.fault = name
    try:
        results = run(url, FAULTS[name].check).results
    finally:
        faulty.fault = None
    assert [result.id for result in results if result.status == "failed"] == [FAULTS[name].check]


def test_every_check_has_a_fault() -> None:
    assert {fault.check for fault in FAULTS.values()} == {check.id for check in CHECKS}


def test_what_builds_on_a_failed_check_is_skipped(sampler: tuple[str, FaultySampler]) -> None:
    url, faulty = sampler
    faulty.fault = "seeds are ignored"
    try:
        results = {result.id: result for result in run(url, "seed_under_load").results}
    finally:
        faulty.fault = None
    assert results["seed_under_load"].status == "skipped"
    assert "builds on seed_alone" in results["seed_under_load"].evidence


def test_a_check_that_does_not_exist_and_a_server_that_does_not_answer() -> None:
    with pytest.raises(VerifyError, match="there is no check top_q"):
        run("http://127.0.0.1:9", "top_q")
    with pytest.raises(VerifyError, match="no answer from"):
        run("http://127.0.0.1:9")
    assert CliRunner().invoke(command, ["verify", "http://127.0.0.1:9"]).exit_code == 1
