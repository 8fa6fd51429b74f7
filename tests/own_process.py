"""Tests marked `own_process`, which measure memory or fork: a fresh process a file, and a fork of it a test.

The fresh process collects and computes nothing, so that its forks have no threads to lose. A process for each test was
rejected: its imports are eight seconds of CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

_INSIDE = "MYSERVE_OWN_PROCESS"


def _is_marked(item: pytest.Item) -> bool:
    return item.get_closest_marker("own_process") is not None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Run it in a process of its own, and report what was reported there."""
    if not _is_marked(item):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    if _INSIDE in os.environ:
        _write(item, _of_a_fork(item))
    else:
        marked = tuple(
            each.nodeid for each in item.session.items if _is_marked(each) and each.path == item.path
        )
        said, reports = _of_a_fresh_process(marked, item.config.rootpath)
        for report in _read(item, reports.get(item.nodeid) or _of_none(item, said)):
            item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


@cache
def _of_a_fresh_process(nodeids: tuple[str, ...], root: Path) -> tuple[str, dict[str, list[Any]]]:
    """Return what it said, and the reports by test: none of one that did not come to an end."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "reports"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:xdist",
            "-p",
            "no:cacheprovider",
            "-m",
            "",
            *nodeids,
        ]
        environment = os.environ | {_INSIDE: str(out)}
        run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        lines = out.read_text().splitlines() if out.exists() else []
        return run.stdout[-4000:] + run.stderr[-2000:], dict(json.loads(line) for line in lines)


def _of_none(item: pytest.Item, said: str) -> list[Any]:
    """Return the reports of a test whose process did not come to it: it failed."""
    call = pytest.CallInfo.from_call(lambda: pytest.fail(f"its process ended before it did:\n{said}"), "call")
    report = pytest.TestReport.from_item_and_call(item, call)
    return [item.config.hook.pytest_report_to_serializable(config=item.config, report=report)]


def _write(item: pytest.Item, reports: list[Any]) -> None:
    with Path(os.environ[_INSIDE]).open("a") as out:
        out.write(json.dumps((item.nodeid, reports)) + "\n")


def _read(item: pytest.Item, reports: list[Any]) -> list[Any]:
    hook = item.config.hook
    return [hook.pytest_report_from_serializable(config=item.config, data=report) for report in reports]


def _of_a_fork(item: pytest.Item) -> list[Any]:
    """Return the reports of a test that runs in a fork of this process; one that dies of it has failed."""
    end, begin = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(end)
        with os.fdopen(begin, "w") as out:
            json.dump(_reports(item), out)
        # no exit handlers: they are the parent's
        os._exit(0)
    os.close(begin)
    with os.fdopen(end) as told:
        text = told.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    reports: list[Any] = json.loads(text) if status == 0 else _of_none(item, f"status {status}")
    return reports


def _reports(item: pytest.Item) -> list[Any]:
    hook = item.config.hook
    reports = runtestprotocol(item, log=False, nextitem=None)
    return [hook.pytest_report_to_serializable(config=item.config, report=report) for report in reports]
