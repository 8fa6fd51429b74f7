"""What people do on the page, step by step. Waiting asks from outside: the page evaluates nothing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

__all__ = ["fill", "open_journal", "run", "until"]


def until(page: Any, condition: str) -> None:
    """Wait until a JavaScript expression holds; a minute is never, even on a busy machine."""
    deadline = time.monotonic() + 60
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"it never held: {condition}"
        page.wait_for_timeout(20)


def fill(page: Any, **fields: Any) -> None:
    """Type into controls of parameters, whose groups are opened first."""
    page.evaluate("document.querySelectorAll('details.group').forEach(group => { group.open = true; })")
    for name, value in fields.items():
        control = page.locator(f'[data-parameter="{name}"]').first
        if isinstance(value, bool):
            control.set_checked(value)
        else:
            control.fill(str(value))


def run(page: Any) -> None:
    """Draw samples, and wait for their ends."""
    page.get_by_role("button", name="Run").click()
    until(page, "document.querySelector('.samples').getAttribute('aria-busy') === 'false'")


def open_journal(page: Any, path: Path) -> None:
    """Open a journal in the rollouts, and wait for its first sample."""
    page.get_by_role("link", name="Rollouts").click()
    page.get_by_label("A journal").set_input_files(path)
    page.wait_for_selector(".roll-detail .tok")
