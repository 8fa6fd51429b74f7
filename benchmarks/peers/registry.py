"""All peers by name, and the ones that run from this environment."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.peers import Peer, llamacpp, openvino, ours, transformers_serve, vllm

PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        openvino.PEER,
        openvino.INT8,
        vllm.PEER,
        llamacpp.PEER,
        llamacpp.Q8,
        transformers_serve.PEER,
    )
}
OURS: Mapping[str, Peer] = {peer.name: peer for peer in (ours.PEER, ours.DRAFTING, ours.INT8, ours.INEXACT)}
