"""The server's greedy and seeded tokens against `transformers.generate` on the same folder, both in float32."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from benchmarks.mixed.server import Server

__all__ = ["Parity", "compare_with_transformers"]

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a king who had three daughters, and the youngest of them",
    "def fibonacci(n):\n    ",
    "Die Würde des Menschen ist",
    "Solve: 12 + 30 = 42. Solve: 7 + 5 =",
)
MIXES: tuple[Mapping[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 50},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.5, "min_p": 0.05},
)
# Nats by which two float32 forward passes of one model may differ, and still be one: near a tie either token is right.
HAIR = 1e-3


@dataclass
class Parity:
    """What came of the comparison."""

    sequences: int = 0
    tokens: int = 0
    ties: list[str] = field(default_factory=list)  # sequences that part at a tie within HAIR
    differences: list[str] = field(default_factory=list)
    largest: float = 0.0  # difference of a logprob, over the tokens that both have

    def lines(self) -> Iterator[str]:
        """Say it."""
        yield from self.ties
        yield from self.differences
        yield (
            f"{self.sequences} sequences beside transformers, {self.tokens} tokens: {len(self.differences)} differ, "
            f"{len(self.ties)} part at a tie; logprobs differ by {self.largest:.2g} nats at most"
        )


def compare_with_transformers(server: Server, folder: Path, *, max_tokens: int = 64) -> Parity:
    """Draw each prompt in each way on both; the server's noise is PyTorch's, so that equal seeds draw equal tokens."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer, parity = AutoTokenizer.from_pretrained(folder), Parity()
    for number, prompt in enumerate(PROMPTS):
        for mix in MIXES:
            seed = 1000 + number
            ids: list[int] = tokenizer(prompt)["input_ids"]
            ours, logprobs = _ours(server, ids, dict(mix), seed, max_tokens)
            theirs = _generated(model, ids, dict(mix), seed, max_tokens)
            what = f"{prompt!r} with {dict(mix)}"
            _judge(parity, what, model, ids, dict(mix), seed, ours, logprobs, theirs)
    return parity


def _ours(
    server: Server, ids: list[int], mix: dict[str, Any], seed: int, max_tokens: int
) -> tuple[list[int], list[float]]:
    body = {
        "model": server.model,
        "prompt": ids,
        "max_tokens": max_tokens,
        "seed": seed,
        "noise": "torch",
        "logprobs": 0,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        server.url + "/v1/completions",
        json.dumps(body | mix).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as reply:
        [choice] = json.load(reply)["choices"]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def _generated(model: Any, ids: list[int], mix: dict[str, Any], seed: int, max_tokens: int) -> list[int]:
    """The tokens of `transformers.generate` after `set_seed`."""
    draws = mix["temperature"] > 0
    settings = {"top_k": 0} | mix if draws else {k: v for k, v in mix.items() if k != "temperature"}
    set_seed(seed)
    prompt = torch.tensor([ids])
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_tokens, do_sample=draws, **settings
    )
    drawn: list[int] = out[0, len(ids) :].tolist()
    return drawn


def _judge(
    parity: Parity, what: str, model: Any, ids: list[int], mix: dict[str, Any], seed: int, ours: list[int],
    logprobs: list[float], theirs: list[int],
) -> None:  # fmt: skip
    """Count one pair of sequences; where they part, find out whether it is at a tie."""
    parity.sequences += 1
    same = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    same = min(len(ours), len(theirs)) if same is None else same
    parity.tokens += same
    with torch.inference_mode():
        own = (
            model(torch.tensor([ids + ours[:-1]]), use_cache=False).logits[0, len(ids) - 1 :].log_softmax(-1)
        )
    for position in range(min(same + 1, len(ours))):
        gap = abs(float(own[position, ours[position]]) - logprobs[position])
        parity.largest = max(parity.largest, gap)
    if ours == theirs:
        return
    if same == min(len(ours), len(theirs)):
        parity.differences.append(f"{what}: {len(ours)} tokens, of transformers {len(theirs)}")
        return
    words = f"{what}: token {same} is {ours[same]}, of transformers {theirs[same]}"
    gap = _lead(own[same], ours[same], theirs[same], mix, seed, same, ids + ours[:same])
    kind = parity.ties if gap <= HAIR else parity.differences
    kind.append(f"{words}; {gap:.2g} nats apart")


def _lead(
    own: torch.Tensor,
    ours: int,
    theirs: int,
    mix: dict[str, Any],
    seed: int,
    position: int,
    before: list[int],
) -> float:
    """By how much transformers' own scores, with the noise that it draws there, tell the two tokens apart."""
    scores = own / (mix["temperature"] or 1.0)
    if (penalty := mix.get("repetition_penalty")) is not None:
        seen = torch.tensor(sorted(set(before)))
        scores[seen] = torch.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    if mix["temperature"] > 0:
        set_seed(seed)
        for _ in range(position + 1):
            noise = torch.empty(1, len(own)).exponential_()[0]
        scores = scores - noise.log()
    return abs(float(scores[ours] - scores[theirs]))
