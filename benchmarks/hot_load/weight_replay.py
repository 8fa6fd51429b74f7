"""Computes an answer again, given which weights made which of its tokens: the judge of updates in mid-flight.

A plain reading of the marks: one sequence alone, its keys and values computed span by span, each by the weights that
the span names, and every token drawn again from the row before it. No scheduler, no prefix cache, no batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from myserve.core.params import SamplingParams
from myserve.core.rows import RowState
from myserve.core.sampling import Sampled, Sampler
from myserve.engine.engine import Engine
from myserve.engine.outputs import TokenOutput
from myserve.engine.scheduling.batch import Batch, ScheduledTokens
from myserve.engine.scheduling.request import Request

Numbers = tuple[int, float, float]  # token id, logprob, sampling_logprob
STEP = 100  # tokens of a forward


def numbers_of(tokens: Iterable[TokenOutput]) -> list[Numbers]:
    return [(token.token_id, token.logprob, token.sampling_logprob) for token in tokens]


@torch.inference_mode()
def replay(
    engine: Engine,
    install: Callable[[int], None],
    prompt: Sequence[int],
    token_ids: Sequence[int],
    spans: Sequence[Mapping[str, Any]],
    params: SamplingParams,
    sample_index: int = 0,
    routed: list[bytes | None] | None = None,
) -> list[Numbers]:
    """Return the numbers of a completion whose `weight_version_spans` are given. `routed` takes the experts used.

    `install(version)` puts that version's weights into the engine, which must run nothing else. `params.seed` is
    the answer's.
    """
    request = Request(id="replay", prompt_token_ids=[*prompt, *token_ids], max_tokens=1)
    size = engine.runner.kv_cache.block_size
    request.block_table = list(range(-(-len(request.token_ids) // size)))

    def row(count: int) -> RowState:
        """Return the state of the draw that comes after `count` tokens."""
        assert params.seed is not None
        return RowState(
            params,
            seed=params.seed,
            sample_index=sample_index,
            prompt_token_ids=list(prompt),
            completion_token_ids=list(token_ids[:count]),
            vocab_size=engine.vocab_size,
            eos_token_ids=engine.eos_token_ids,
            device=engine.runner.device,
        )

    sampler, drawn, computed = Sampler(), list[Numbers](), 0
    for span in spans:
        install(span["weight_version"])
        engine.runner.recorded_steps.clear()  # they were recorded with other weights
        if span.get("recomputed") or not computed:
            computed, request.state_slot, request.next_state_slot = 0, -1, 0
        wanted = range(len(prompt) + span["start"] - 1, len(prompt) + span["end"] - 1)
        for start in range(computed, wanted.stop, STEP):
            batch = Batch()
            batch.add(ScheduledTokens(request, start, min(STEP, wanted.stop - start)))
            rows = [i - start for i in wanted if start <= i < start + batch.num_tokens]
            with engine.runner.routed_experts.capturing(routed is not None) as captured:
                logits = engine.runner.forward(batch, rows or [0], replay=routed is None)[: len(rows)]
            if routed is not None:
                routed += captured.rows(rows)
            # of a model with recurrent layers; the others have no states
            request.state_slot, request.next_state_slot = request.next_state_slot, 1 - request.next_state_slot
            states = [row(count) for count in range(len(drawn), len(drawn) + len(rows))]
            for sampled in sampler.sample(logits, states) if rows else ():
                assert isinstance(sampled, Sampled)
                drawn.append((sampled.token_id, sampled.logprob, sampled.sampling_logprob))
        computed = wanted.stop
    return drawn
