"""`make demo ONCE=1`, less make: the embedded model answers the original specification's prompts over HTTP."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys


def test_the_demo_answers_and_ends_cleanly():
    with socket.socket() as usual:
        usual.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            usual.bind(("127.0.0.1", 8000))  # taken, by us or by another: the demo finds a port of its own
            usual.listen()
        except OSError:
            usual.close()
        done = subprocess.run(
            [sys.executable, "-m", "myserve.cli.demo", "--once"],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
            env={**os.environ, "COLUMNS": "160"},
        )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    count, color, solve = re.split(
        r"Say a color:.*\n|Solve: 2\+2=.*\n", done.stdout.partition("Count to three:")[2]
    )
    assert "three" in count.lower() and "probability" in count
    assert color.strip()
    answers = [line for line in solve.splitlines() if "logprob" in line and line.endswith("stop")]
    assert len(answers) == 4 and sum("4" in answer.split("  ")[0] for answer in answers) >= 3
    (url,) = re.findall(r"listening at (http://127\.0\.0\.1:\d+)", done.stdout)
    assert not url.endswith(":8000")
    with socket.socket() as probe:  # it ended, and its server with it
        assert probe.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) != 0
