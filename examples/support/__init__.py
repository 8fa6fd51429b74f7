"""Shared parts of the examples: the server, the task, the trainer's model, the table that grows."""

import sys
from pathlib import Path

# `tools`, which no wheel has: the exam that the embedded model was trained for
sys.path.append(str(Path(__file__).parents[2]))
