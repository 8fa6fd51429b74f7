"""Shows a run to a person or a machine: a table, a page, JSON, and JUnit's XML for continuous integration."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree as ET

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from myserve.verify.results import CheckResult
from myserve.verify.run import VerifyRun

__all__ = ["summary", "table", "write_html", "write_json", "write_junit"]

_COLOURS: Mapping[str, str] = {"passed": "green", "failed": "bold red", "skipped": "yellow"}
# no script, nothing fetched; evidence is a server's words, and is escaped
_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid #8885; }
td.evidence { overflow-wrap: anywhere; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.passed { color: light-dark(#1a6b2d, #7fd693); } .failed { color: light-dark(#a80f1c, #ff9aa2); font-weight: bold; }
.skipped { color: light-dark(#6b5200, #e3c567); }
"""


def table(run: VerifyRun) -> Table:
    """Return a table with a row for each check."""
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("")
    shown.add_column("check", no_wrap=True)
    shown.add_column("draws", justify="right")
    shown.add_column("what was found", overflow="fold")
    for result in run.results:
        status = Text(result.status, style=_COLOURS[result.status])
        draws = f"{result.num_draws:,}" if result.num_draws else ""
        shown.add_row(status, result.id, draws, Text(result.evidence))
    return shown


def summary(run: VerifyRun) -> str:
    """Return the run in a sentence, with its rate of false alarms."""
    return (
        f"{run.count('passed')} passed, {run.count('failed')} failed, {run.count('skipped')} skipped. "
        f"The chance that any check of a run fails without a fault is at most {run.error_rate:g}. Seed {run.run_seed}."
    )


def write_json(run: VerifyRun, path: Path) -> None:
    """Write all of it."""
    path.write_text(json.dumps(run.as_dict(), indent=1, ensure_ascii=False) + "\n", "utf-8")


def write_junit(run: VerifyRun, path: Path) -> None:
    """Write the run as a test suite: a failed check is a failure, with its evidence."""
    suite = ET.Element(
        "testsuite",
        name=f"myserve verify {run.url}",
        tests=str(len(run.results)),
        failures=str(run.count("failed")),
        skipped=str(run.count("skipped")),
        errors="0",
        time=f"{sum(result.seconds for result in run.results):.2f}",
    )
    for result in run.results:
        case = ET.SubElement(
            suite, "testcase", classname="myserve.verify", name=result.id, time=f"{result.seconds:.2f}"
        )
        if result.status != "passed":
            tag = "failure" if result.status == "failed" else "skipped"
            ET.SubElement(case, tag, message=_printable(result.evidence))
        else:
            ET.SubElement(case, "system-out").text = _printable(result.evidence)
    ET.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)


def _printable(text: str) -> str:
    """Return a text without the control characters that XML cannot hold: evidence has a server's own words."""
    return "".join(c if c in "\t\n" or (c >= " " and c not in "\ufffe\uffff") else "?" for c in text)


def write_html(run: VerifyRun, path: Path) -> None:
    """Write a page that needs nothing else: no script, no style sheet, no font."""
    rows = "".join(map(_row, run.results))
    facts = "".join(
        f"<tr><th scope=row>{name}</th><td class=evidence>{html.escape(json.dumps(value))}</td></tr>"
        for name, value in run.traits.as_dict().items()
    )
    title = f"{run.model} at {run.url}"
    path.write_text(
        f"""<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<meta http-equiv=Content-Security-Policy content="default-src 'none'; style-src 'unsafe-inline'">
<title>{html.escape(title)}</title><style>{_STYLE}</style>
<h1>{html.escape(title)}</h1><p>{html.escape(summary(run))}</p>
<table><thead><tr><th>result<th>check<th>draws<th>error rate<th>what was found</tr></thead><tbody>{rows}</tbody></table>
<h2>The server</h2><table>{facts}</table></html>
""",
        "utf-8",
    )


def _row(result: CheckResult) -> str:
    rate = f"{result.error_rate:.1g}" if result.error_rate else ""
    draws = f"{result.num_draws:,}" if result.num_draws else ""
    return (
        f"<tr><td class={result.status}>{result.status}</td><td><b>{result.id}</b><br>{html.escape(result.does)}</td>"
        f"<td class=number>{draws}</td><td class=number>{rate}</td>"
        f"<td class=evidence>{html.escape(result.evidence)}</td></tr>"
    )
