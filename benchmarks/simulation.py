"""Plays a load through the scheduler on a machine whose costs are given: what a policy does, without a machine's noise.

    python -m benchmarks.simulation            # a prompt beside streams, and Poisson arrivals at three rates
    python -m benchmarks.simulation --fixed    # the same with chunks of a fixed number of tokens

The costs are those of the 0.6B shape on two Zen 4 cores. With fixed chunks the simulation gives what was measured there
over HTTP: gaps of 0.8 s beside a prompt of 2,048 tokens, nearly 7 s to its first token. It is for choosing between
policies and for tests; it measures nothing.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.roofline import RANDOM, SHAPE
from benchmarks.scenarios import (
    Planned,
    beside_streams_figures,
    poisson,
    poisson_figures,
    prompt_beside_streams,
)
from myserve.bench.figures import RequestTimes
from myserve.engine.config import MOST_SEQS, NUM_SEQS_AT_ANY_PACE, EngineConfig
from myserve.engine.scheduling.batch import Batch, Limits
from myserve.engine.scheduling.blocks import BlockPool
from myserve.engine.scheduling.request import Request
from myserve.engine.scheduling.scheduler import Scheduler
from myserve.engine.scheduling.step_costs import AttentionCost, padded_rows

BLOCKS, BLOCK_SIZE, LONGEST = 1400, 32, 40_960
READS_OF_A_KEY = (
    1.3
    * 2
    * SHAPE["head_dim"]
    * SHAPE["num_attention_heads"]
    * SHAPE["num_hidden_layers"]
    / RANDOM.body_weights
)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of a step's parts on one machine."""

    row: float = 0.0021  # of the body's products
    body: float = 0.031  # to read its weights, which many rows hide
    output_row: float = 0.00074
    output: float = 0.011  # to read the output layer
    key: float = 0.72e-6  # read by a query, in all layers
    step: float = 0.004
    stream: float = 0.0002
    jitter: float = 0.06

    def of(self, batch: Batch, draw: random.Random) -> float:
        """Return the seconds of one step."""
        prompts = [part for part in batch.scheduled if not part.is_decode]
        decodes = len(batch.scheduled) - len(prompts)
        rows = padded_rows(batch.num_tokens) if prompts else batch.num_tokens
        output = max(self.output, self.output_row * len(batch.draws)) if batch.draws else 0.0
        keys = sum(part.count * (part.start + part.count / 2) for part in batch.scheduled)
        seconds = (
            max(self.body, self.row * rows) + output + self.key * keys + self.step + self.stream * decodes
        )
        return seconds * draw.uniform(1 - self.jitter / 2, 1 + self.jitter)


def play(
    planned: Sequence[Planned], *, times: StepTimes = StepTimes(), learns: bool = True, seed: int = 0
) -> list[RequestTimes]:
    """Return when each request's tokens came. Without `learns` no cost is ever known: chunks have a fixed size."""
    config, draw = EngineConfig(), random.Random(seed)
    limits = Limits(
        MOST_SEQS,
        config.max_num_batched_tokens,
        config.prefill_chunk,
        LONGEST,
        attention=(AttentionCost(0, READS_OF_A_KEY),),
        num_seqs_at_any_pace=NUM_SEQS_AT_ANY_PACE,
    )
    scheduler = Scheduler(BlockPool(BLOCKS, BLOCK_SIZE), limits)
    if not learns:
        scheduler.step_costs.observe = lambda *_: None  # type: ignore[method-assign]
    requests = [
        Request(
            id=str(number),
            prompt_token_ids=[5] * one.prompt_len,
            max_tokens=one.output_len,
            arrival=number,
            cache_root=number,
        )
        for number, one in enumerate(planned)
    ]
    came: dict[Request, list[float]] = {request: [] for request in requests}
    coming = sorted(zip(planned, requests, strict=True), key=lambda pair: pair[0].at)
    now, left = 0.0, len(requests)
    while left:
        while coming and coming[0][0].at <= now:
            one, request = coming.pop(0)
            request.times.arrived = one.at
            scheduler.add(request)
        batch = scheduler.schedule(now)
        if not batch.scheduled:
            now = coming[0][0].at
            continue
        now += times.of(batch, draw)
        for request, _ in batch.draws:
            came[request].append(now)
        left -= len(scheduler.update(batch, [[5]] * len(batch.draws), now))
    return [
        RequestTimes(one.at, tuple(came[request]), one.output_len, one.prompt_len)
        for one, request in zip(planned, requests, strict=True)
    ]


def main() -> None:
    """Print the figures of each load."""
    learns = "--fixed" not in sys.argv
    loads = {"beside streams": beside_streams_figures(play(prompt_beside_streams(), learns=learns))}
    for rate in (0.6, 0.8, 1.0):
        traces = play(poisson(0, rate, requests=400), learns=learns)
        loads[f"poisson {rate}/s"] = poisson_figures(traces)
    for name, figures in loads.items():
        print(f"{name:16}", ", ".join(f"{figure} {value:.3g}" for figure, value in figures.items()))


if __name__ == "__main__":
    main()
