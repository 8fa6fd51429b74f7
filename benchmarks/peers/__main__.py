"""`python -m benchmarks.peers openvino`: installs a peer beside the repository's code, under `.bench/`."""

from __future__ import annotations

import argparse

from benchmarks.model import model_folder
from benchmarks.peers.registry import PEERS

parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
parser.add_argument("peer", nargs="+", choices=PEERS)
for name in parser.parse_args().peer:
    PEERS[name].install_into_folder(model_folder())
    print(f"{name}: installed in {PEERS[name].folder}; python -m benchmarks --peer {name}")
