"""Runs `myserve chat --probs` in a terminal of its own and draws what stood there: `python -m tools.docs.screenshot`.

Nothing is drawn by hand: the real command talks to a real server over a pseudo-terminal, and Rich turns the bytes that
came out of it into docs/chat-probs.svg.
"""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

from myserve.cli.demo import free_port

TARGET = Path(__file__).parents[2] / "docs" / "chat-probs.svg"
COLUMNS = 80
QUESTIONS = ("Count to five:", "Say a color:", "Tell me a story.", "Solve: 12+35=")


class Terminal:
    """A command on a pseudo-terminal: type lines, read what it shows."""

    def __init__(self, command: list[str]) -> None:
        self._master, slave = pty.openpty()
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": "40"}
        self._process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
        os.close(slave)
        self.shown = ""

    def wait_for(self, ending: str, seconds: float = 60.0) -> None:
        """Read until what is shown ends so, colours aside."""
        until = time.monotonic() + seconds
        while not re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.shown).endswith(ending):
            if time.monotonic() > until:
                raise TimeoutError(f"the terminal shows {self.shown[-200:]!r}")
            if select.select([self._master], [], [], 0.1)[0]:
                self.shown += os.read(self._master, 65536).decode()

    def type(self, line: str) -> None:
        """Type a line and the return key."""
        os.write(self._master, line.encode() + b"\n")
        self.wait_for(line + "\r\n")

    def close(self) -> None:
        """End the command as Ctrl-D does."""
        os.write(self._master, b"\x04")
        self._process.wait(timeout=30)
        os.close(self._master)


def conversation(url: str) -> str:
    """Return what the terminal showed of a whole conversation."""
    terminal = Terminal([sys.executable, "-m", "myserve", "chat", "--probs", "--seed", "7", "--url", url])
    terminal.wait_for("> ")
    for question in QUESTIONS:
        terminal.type(question)
        terminal.wait_for("> ")
    terminal.close()
    return terminal.shown.rpartition("\r\n")[0].replace(url, "http://localhost:8000")


def picture(shown: str) -> str:
    """Return a terminal's bytes as SVG text, with fonts that every system has.

    >>> "svg" in picture("\\x1b[32mgreen\\x1b[0m")
    True
    """
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(shown.replace("\r\n", "\n")))
    svg = console.export_svg(title="myserve chat --probs --seed 7", theme=SVG_EXPORT_THEME, unique_id="chat")
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # fetched from elsewhere, otherwise
    return svg.replace("Fira Code", "ui-monospace, DejaVu Sans Mono").replace(
        "<!-- Generated with Rich https://www.textualize.io -->", ""
    )


def main() -> None:
    """Serve the embedded model, talk to it, write the picture."""
    port = free_port()
    server = subprocess.Popen([sys.executable, "-m", "myserve", "serve", "--port", str(port)])
    try:
        url = f"http://localhost:{port}"
        subprocess.run(
            ["curl", "-sf", "--retry", "120", "--retry-delay", "1", "--retry-all-errors", f"{url}/health"],
            check=True,
            capture_output=True,
        )
        TARGET.write_text(picture(conversation(url)))
    finally:
        server.terminate()
        server.wait(timeout=30)


if __name__ == "__main__":
    main()
