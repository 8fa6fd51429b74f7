"""The proofs of exactness on a GPU: `python -m pytest tests/engine/test_cuda.py` is the one command to run on it.

Everything up to the last call is tested without one, in `runner/test_device_backend.py`; here nothing is replaced.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.engine.test_exactness as proofs
from myserve.core.params import SamplingParams
from myserve.core.rows import RowState
from myserve.core.sampling import Sampler
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.runner.device_backend import backend_for
from myserve.engine.runner.model_structure import observe
from myserve.engine.weights import loader

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ARCHITECTURES = ["llama", "gemma3_text", "qwen3_moe"]
PROOFS = [
    proofs.test_alone_is_in_a_batch_of_32,
    proofs.test_whole_is_chunked_at_ragged_sizes,
    proofs.test_one_is_the_first_of_sixteen,
    proofs.test_teacher_forcing_is_decoding,
]
MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_on_gpu(make_engine: MakeEngine) -> MakeEngine:
    return lambda arch, **config: make_engine(arch, **config | {"device": "cuda"})


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("proof", PROOFS)
def test_what_is_proved_of_a_cpu(proof: Any, arch: str, make_on_gpu: MakeEngine) -> None:
    proof(arch, "bfloat16", make_on_gpu)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_was_found(arch: str, make_on_gpu: MakeEngine) -> None:
    engine = make_on_gpu(arch, dtype="bfloat16", prefix_caching=False)
    told = engine.exactness
    assert told["rows_are_independent"] is True and told["attention"] == "flash", told
    proofs.together(engine, proofs.mixed_requests(4))
    steps = engine.runner.recorded_steps
    assert steps.usable and steps._steps and steps._proved, "steps are graphs, and one was compared"


def test_graphs_change_no_bit(make_on_gpu: MakeEngine, tiny_model: Callable[[str], Path]) -> None:
    config = EngineConfig(num_blocks=128, dtype="bfloat16", device="cuda", prefix_caching=False)
    loaded = loader.load(str(tiny_model("llama")), config)
    found = backend_for(observe(loaded.model).calls, loaded.model.dtype, loaded.device, exact=True)
    plain = Engine(loaded, config, replace(found, recorder=None))
    asked = proofs.mixed_requests(8)
    try:
        recorded = make_on_gpu("llama", dtype="bfloat16", prefix_caching=False)
        assert proofs.together(plain, asked) == proofs.together(recorded, asked)
    finally:
        plain.shutdown()


ASKS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 40, "top_logprobs": 5},
    {"top_p": 0.9, "kept": True},
    {"top_p": 0.9999, "logprobs_mode": "processed", "top_logprobs": 20},
    {"min_p": 0.05},
    {"typical_p": 0.6},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"logit_bias": {5: 3.0}, "logprob_token_ids": (5, 90, 0)},
    {"allowed_token_ids": (3, 64, 65, 130), "min_tokens": 2},
]


@pytest.mark.parametrize("spread", [0.0, 0.1, 2.0, 30.0])
def test_a_gpu_draws_the_bits_of_a_cpu(spread: float) -> None:
    """Not of `top_n_sigma`, whose sums are floats in the device's order, nor of torch noise, which is the device's."""
    vocab = 50_021

    def rows(device: str) -> list[RowState]:
        return [
            RowState(
                SamplingParams(**ask), seed=i, sample_index=i, prompt_token_ids=[1, 2], vocab_size=vocab,
                eos_token_ids=[0], device=torch.device(device), completion_token_ids=[4, 9, 4],
            )
            for i, ask in enumerate(ASKS * 3)
        ]  # fmt: skip

    logits = torch.randn(len(ASKS) * 3, vocab, generator=torch.Generator().manual_seed(1)) * spread
    logits[:, ::7] = logits[:, :1].clone()  # ties
    sampler = Sampler()
    assert sampler.sample(logits.cuda(), rows("cuda")) == sampler.sample(logits, rows("cpu"))


def test_a_step_of_the_sampler_waits_for_the_device_once() -> None:
    vocab, device = 50_021, torch.device("cuda")
    rows = [
        RowState(
            SamplingParams(**ASKS[i % len(ASKS)]), seed=i, sample_index=0, prompt_token_ids=[1], vocab_size=vocab,
            eos_token_ids=[0], device=device,
        )
        for i in range(32)
    ]  # fmt: skip
    logits = torch.randn(32, vocab, device=device)
    Sampler().sample(logits, rows)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            Sampler().sample(logits, rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in heard if "synchronizing CUDA operation" in str(w.message)]
    assert len(waits) == 1, waits
