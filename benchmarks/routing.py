"""Router replay: the mismatch of a trainer's mixture of experts with it and without; and the cost of capture.

    python -m benchmarks.routing            # both tables of docs/routing.md, as Markdown

Random Qwen3-MoE weights. Their routers are less sure of themselves than trained ones, so more choices flip than
there; what a flipped choice does to a logprob is the same.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.model import write_tokenizer
from myserve import exact_forward, replay_routing
from myserve.core.logprobs import prompt_logprobs
from myserve.core.params import SamplingParams
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.outputs import Delta
from myserve.engine.runner.routed_experts import RoutedExperts

COMMON: Mapping[str, Any] = {
    "vocab_size": 4096,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "initializer_range": 0.05,  # at 0.02 the logits of so narrow a model are nearly flat, and nothing shows
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "tiny: 4 layers, 2 of 8 experts, 1 M": {
        "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "intermediate_size": 64,
    },
    "mid: 12 layers, 4 of 32 experts, 95 M": {
        "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "num_key_value_heads": 2,
        "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 192, "intermediate_size": 384,
    },
}  # fmt: skip
REQUESTS, PROMPT, COMPLETION = 16, 32, 64
ROUNDS = 5


@contextmanager
def model_folder(shape: Mapping[str, Any]) -> Iterator[Path]:
    """Write a bf16 model where an engine and trainers can read it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **COMMON, **shape))
    with TemporaryDirectory() as name:
        model.to(torch.bfloat16).save_pretrained(name)
        write_tokenizer(Path(name))
        yield Path(name)


@dataclass(frozen=True)
class Rollout:
    """Sequences of one length, with the engine's logprobs [B][T-1] and experts [B, T-1, L, k]."""

    ids: Tensor
    logprobs: list[list[float]]
    routing: Tensor


async def generate(engine: Engine, *, routed: bool, scored: bool = False) -> list[list[Delta]]:
    params = [
        SamplingParams(
            max_tokens=COMPLETION,
            seed=index,
            ignore_eos=True,
            routed_experts=routed,
            prompt_logprobs=0 if scored else None,
        )
        for index in range(REQUESTS)
    ]
    streams = [engine.submit(prompt_of(index), each) for index, each in enumerate(params)]

    async def read(stream: Any) -> list[Delta]:
        return [delta async for delta in stream]

    return list(await asyncio.gather(*map(read, streams)))


def prompt_of(index: int) -> list[int]:
    return [(31 * i + 97 * index) % COMMON["vocab_size"] for i in range(PROMPT)]


def rollout_of(engine: Engine) -> Rollout:
    assert engine.routing_shape is not None
    ids, logprobs, rows = [], [], []
    for index, deltas in enumerate(asyncio.run(generate(engine, routed=True, scored=True))):
        scores = next(delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None)
        drawn = [token for delta in deltas for token in delta.tokens]
        tokens = [*scores[1:], *drawn]
        ids.append([*prompt_of(index), *(token.token_id for token in drawn)])
        logprobs.append([token.logprob or 0.0 for token in tokens])
        rows.append(torch.tensor(engine.routing_shape.array([t.routed_experts or b"" for t in tokens])))
    return Rollout(torch.tensor(ids), logprobs, torch.stack(rows).long())


def distance(model: Any, rollout: Rollout) -> tuple[float, float, float, float]:
    """Share of choices that differ; mean and largest difference of a logprob; share of tokens off by over 10 %."""
    listener, inputs = RoutedExperts(model), rollout.ids[:, :-1]
    with listener.listening(True) as heard, torch.inference_mode():
        logits = model(inputs, use_cache=False).logits
    assert listener.shape is not None
    used = torch.tensor(
        listener.shape.array([row or b"" for row in heard.rows(range(inputs.numel()))])
    ).long()
    flipped = (used.view_as(rollout.routing).sort(-1).values != rollout.routing.sort(-1).values).any(-1)
    apart = [
        abs((scored.logprob or 0.0) - theirs)
        for rows, ids, wanted in zip(logits, rollout.ids.tolist(), rollout.logprobs, strict=True)
        for scored, theirs in zip(prompt_logprobs(rows, ids[1:]), wanted, strict=True)
    ]
    off = sum(difference > 0.1 for difference in apart) / len(apart)
    return float(flipped.float().mean()), statistics.fmean(apart), max(apart), off


def mismatch(folder: Path, rollout: Rollout) -> Iterator[tuple[str, tuple[float, float, float, float]]]:
    """Measure each trainer, without replay and with it."""
    trainers = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "bfloat16, `exact_forward`": torch.bfloat16,
    }
    for name, dtype in trainers.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        if "exact" in name:
            model = exact_forward(model)
        yield name, distance(model, rollout)
        with replay_routing(model, rollout.routing):
            yield f"{name}, replayed", distance(model, rollout)


def cost(engine: Engine) -> tuple[list[float], list[float]]:
    """CPU seconds of a run without capture and with it, in turns; unlike wall time they are this process's own."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(2 * ROUNDS):
        routed = turn % 2 == 1
        began = time.process_time()
        asyncio.run(generate(engine, routed=routed))
        seconds[routed].append(time.process_time() - began)
    return seconds[False], seconds[True]


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def main(shapes: Mapping[str, Mapping[str, Any]] = SHAPES) -> None:
    costs: list[Sequence[object]] = []
    print(row("model", "trainer", "choices that differ", "mean", "largest", "tokens off by > 10 %"))
    print(row(*["---"] * 6))
    for name, shape in shapes.items():
        with model_folder(shape) as folder:
            engine = Engine.from_pretrained(str(folder), EngineConfig(num_blocks=256))
            rollout = rollout_of(engine)
            plain, routed = cost(engine)
            engine.shutdown()
            for trainer, (flipped, mean, largest, off) in mismatch(folder, rollout):
                cells = (f"{flipped:.2%}", f"{mean:.5f}", f"{largest:.4f}", f"{off:.2%}")
                print(row(name, trainer, *cells), flush=True)
        least = [1000 * min(each) / COMPLETION for each in (plain, routed)]
        costs.append((name, *(f"{each:.2f}" for each in least), f"{least[1] / least[0] - 1:+.1%}"))
    print("\n" + row("model", "CPU ms a step, least", "with routing", "change"))
    print(row(*["---"] * 4))
    for cells in costs:
        print(row(*cells))


if __name__ == "__main__":
    main()
