"""`python -m benchmarks.peers openvino`: installs a peer beside the repository's code, under `.bench/`."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.model import model_folder
from benchmarks.peers.registry import PEERS

parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
parser.add_argument("peer", nargs="+", choices=PEERS)
parser.add_argument("--model", type=Path, help="a folder; default: the model that is made here")
asked = parser.parse_args()
for name in asked.peer:
    PEERS[name].install_into_folder(asked.model or model_folder())
    print(f"{name}: installed in {PEERS[name].folder}; python -m benchmarks --peer {name}")
