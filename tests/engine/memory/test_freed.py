"""What was freed goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Small pieces, every other one kept: what is freed between them stays in the process. A process of its own, for others'
# memory would count too.
PROGRAM = """
import sys
from pathlib import Path
from myserve.engine.memory.freed import give_back_freed

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

pieces = [bytearray(16_000) for _ in range(20_000)]
full = resident()
kept = pieces[::100]
del pieces
before = resident()
assert give_back_freed()
print(full - before, before - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_memory_that_is_freed_between_what_stays_is_given_back() -> None:
    said = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    by_itself, given_back = map(int, said.split())
    # the control: of 320 MB that were freed, the C library has given back little by itself
    assert by_itself < 100e6
    assert given_back > 200e6
