"""What is proved of an engine holds of one that computes in int8: every proof of exactness again, and updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import engine.test_exactness as proofs
from conftest import make_tiny_model
from engine.weights.test_prepare import numbers
from myserve.engine.batch_invariance import quantized
from myserve.engine.batch_invariance.quantized import QuantizedWeight
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.runner import self_test
from myserve.engine.weights.snapshot import weights_checksum
from myserve.errors import UnsupportedModelError
from runs import thorough

MakeEngine = Callable[..., Engine]
MODELS = [
    thorough("llama", "bfloat16"),
    ("odd_gemma3", "bfloat16"),
    thorough("gpt2", "float32"),
    ("qwen3_moe", "bfloat16"),
]
PROOFS = [
    proofs.test_alone_is_in_a_batch_of_32,
    proofs.test_whole_is_chunked_at_ragged_sizes,
    proofs.test_cold_is_from_the_prefix_cache,
    proofs.test_never_is_often_preempted,
    proofs.test_one_is_the_first_of_sixteen,
    proofs.test_teacher_forcing_is_decoding,
]


@pytest.fixture
def make_int8(make_engine: MakeEngine) -> MakeEngine:
    return lambda arch, **config: make_engine(arch, quantize="int8", **config)


@pytest.fixture
def open_engine() -> Iterator[Callable[..., Engine]]:
    """Engines of this test alone, for it changes their weights."""
    engines: list[Engine] = []

    def make(folder: Path, quantize: str = "int8") -> Engine:
        config: Any = {"num_blocks": 128, "quantize": quantize}
        engines.append(Engine.from_pretrained(str(folder), EngineConfig(**config)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.scheduler.check_integrity()
        engine.shutdown()


@pytest.mark.parametrize(("arch", "dtype"), MODELS)
@pytest.mark.parametrize("proof", PROOFS)
def test_what_is_proved_of_floats(proof: Any, arch: str, dtype: str, make_int8: MakeEngine) -> None:
    proof(arch, dtype, make_int8)


@pytest.mark.parametrize(("arch", "dtype"), MODELS[:3])
def test_any_number_of_threads_gives_the_same(arch: str, dtype: str, make_int8: MakeEngine) -> None:
    proofs.test_any_number_of_threads_gives_the_same(arch, dtype, make_int8)


def test_before_is_after_a_restart(
    tiny_model: Callable[[str], Path], make_int8: MakeEngine, open_engine: Any
) -> None:
    asked = proofs.mixed_requests(8, seed=4)
    before = proofs.together(make_int8("qwen3"), asked)
    assert proofs.together(open_engine(tiny_model("qwen3")), asked) == before


def test_control_floats_have_other_bits(make_engine: MakeEngine, make_int8: MakeEngine) -> None:
    asked = proofs.mixed_requests(8)
    floats, ints = make_engine("llama", dtype="bfloat16"), make_int8("llama", dtype="bfloat16")
    assert proofs.together(floats, asked) != proofs.together(ints, asked)


# --- what is told ----------------------------------------------------------------------------------------------


def test_it_is_told_which_layers_are_int8(make_engine: MakeEngine, make_int8: MakeEngine) -> None:
    assert make_engine("llama").quantization == {"method": "off"}
    told = make_int8("llama", dtype="bfloat16").quantization
    assert (told["method"], told["layers"], told["unquantized"]) == ("int8", 15, ())
    told = make_int8("qwen3_moe", dtype="bfloat16").quantization
    # four projections of attention and the experts in each of two layers, and the output layer
    assert (told["layers"], told["unquantized"]) == (
        11,
        ("model.layers.0.mlp.gate", "model.layers.1.mlp.gate"),
    )


def test_a_layer_that_is_too_wide_stays_as_it_is_and_is_named(
    tiny_model: Callable[[str], Path], open_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of more terms than fit 32 bits: here the bound is moved, for such a layer has 4 GB."""
    monkeypatch.setattr(quantized, "MOST_INNER", 63)
    engine = open_engine(tiny_model("llama"))
    names = tuple(f"model.layers.{layer}.mlp.down_proj" for layer in range(2))
    assert engine.quantization["unquantized"] == names and engine.quantization["layers"] == 13
    asked = proofs.mixed_requests(8)
    assert proofs.together(engine, asked) == proofs.alone(engine, asked)


# --- the self-test ---------------------------------------------------------------------------------------------


def test_the_self_test_compares_products_of_each_width(
    make_int8: MakeEngine, make_engine: MakeEngine
) -> None:
    assert self_test.prove_int8(make_int8("llama", dtype="bfloat16").runner.model) == 2
    assert self_test.prove_int8(make_engine("llama", dtype="bfloat16").runner.model) == 0


def test_control_products_that_saturate_are_found_out(
    tiny_model: Callable[[str], Path], open_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = QuantizedWeight._multiply

    def wrong(self: QuantizedWeight, x: Any, out: torch.Tensor) -> None:
        honest(self, x, out)
        out[..., 0] += out[..., 0].abs() * 0.01

    monkeypatch.setattr(QuantizedWeight, "_multiply", wrong)
    with pytest.raises(UnsupportedModelError, match="int8 products of 32 terms come out wrong on this CPU"):
        open_engine(tiny_model("llama"))


# --- new weights in place --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arch", ["llama", thorough("gpt2"), thorough("gemma3_text"), "qwen3_moe", thorough("gpt_oss")]
)
def test_an_updated_engine_is_a_fresh_one(arch: str, tmp_path: Path, open_engine: Any) -> None:
    old, new = (
        make_tiny_model(arch, tmp_path / str(seed), seed=seed, dtype=torch.bfloat16) for seed in (0, 1)
    )
    engine = open_engine(old)
    before, told = numbers(engine), engine.quantization
    report = engine.update_weights(new).result(60)
    assert numbers(engine) == numbers(open_engine(new)) != before
    assert (engine.weight_version, engine.quantization, report.checksum) == (1, told, weights_checksum(new))
    trainer = AutoModelForCausalLM.from_pretrained(old, dtype=torch.bfloat16)
    engine.update_weights(trainer.state_dict()).result(60)
    assert numbers(engine) == before


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        ("llama", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight"]),
        ("qwen2", ["model.layers.0.self_attn.q_proj.bias"]),
        ("qwen3_moe", ["model.layers.0.mlp.gate.weight", "model.layers.1.mlp.experts.down_proj"]),
    ],
)
def test_a_part_changes_that_part_alone(
    arch: str, names: list[str], tmp_path: Path, open_engine: Any
) -> None:
    folders = [
        make_tiny_model(arch, tmp_path / str(seed), seed=seed, dtype=torch.bfloat16) for seed in (0, 1)
    ]
    model, other = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for path in folders)
    engine = open_engine(folders[0])
    before = numbers(engine)
    changed = {name: other.state_dict()[name] + 0.125 for name in names}
    engine.update_weights(changed, partial=True).result(60)
    model.load_state_dict(changed, strict=False)
    model.save_pretrained(folders[0])
    assert numbers(engine) == numbers(open_engine(folders[0])) != before
