"""New weights in place: the updated engine is the fresh one, bit for bit, and what is refused changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import ARCHITECTURES, make_tiny_model
from myserve.core.params import SamplingParams
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.weights.snapshot import weights_checksum
from myserve.errors import BadSnapshotError, RequestError
from runs import Asked, run, thorough

SMALL = EngineConfig(num_blocks=32)
ASKED = [Asked([5, 7, 100 + i, 41] * (1 + i), SamplingParams(max_tokens=8, seed=i)) for i in range(3)]


def numbers(engine: Engine) -> list[Any]:
    return [choice.numbers for [choice] in run(engine, ASKED)]


@pytest.fixture
def open_engine() -> Iterator[Callable[..., Engine]]:
    """Engines of this test alone, for it changes their weights."""
    engines: list[Engine] = []

    def make(folder: Path, config: EngineConfig = SMALL) -> Engine:
        engines.append(Engine.from_pretrained(str(folder), config))
        return engines[-1]

    yield make
    for engine in engines:
        engine.scheduler.check_integrity()
        engine.shutdown()


@pytest.fixture(scope="module")
def two_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Two models of one kind with different weights."""

    def make(arch: str, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp(arch)
        old, new = (make_tiny_model(arch, root / str(seed), seed=seed, dtype=dtype) for seed in (0, 1))
        return old, new

    return make


LIKE_OTHERS = ("qwen2", "mistral", "gemma2", "olmo2", "starcoder2", "olmoe")
KINDS = (
    [
        thorough(arch, torch.float32) if arch in LIKE_OTHERS else (arch, torch.float32)
        for arch in ARCHITECTURES
    ]
    + [
        thorough(arch, torch.bfloat16) if arch in ("qwen3", "gpt2") else (arch, torch.bfloat16)
        for arch in ("qwen3", "gpt2", "gemma3_text", "qwen3_moe", "mixtral", "llama4_text", "jamba")
    ]
    + [("zamba", torch.float32)]
)


@pytest.mark.parametrize(("arch", "dtype"), KINDS, ids=str)
def test_an_updated_engine_is_a_fresh_one(
    arch: str, dtype: torch.dtype, two_of: Any, open_engine: Any
) -> None:
    old, new = two_of(arch, dtype)
    engine = open_engine(old)
    before, exactness = numbers(engine), engine.exactness
    report = engine.update_weights(new).result(60)
    assert numbers(engine) == numbers(open_engine(new)) != before
    assert (engine.weight_version, engine.exactness) == (1, exactness)
    assert report.checksum == weights_checksum(new)
    # named as in the model: experts stacked, tied ones twice
    trainer = AutoModelForCausalLM.from_pretrained(old)
    engine.update_weights(trainer.state_dict()).result(60)
    assert numbers(engine) == before


PARTS = [
    ("llama", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]),
    ("llama", ["lm_head.weight"]),
    ("qwen2", ["model.layers.0.self_attn.q_proj.bias"]),
    ("gpt2", ["transformer.h.0.attn.c_attn.bias", "transformer.h.1.mlp.c_fc.weight"]),
    ("gpt2", ["transformer.wte.weight"]),  # tied to the output layer
    ("qwen3_moe", ["model.layers.0.mlp.gate.weight", "model.layers.1.mlp.experts.down_proj"]),
    ("mixtral", ["model.layers.1.mlp.experts.gate_up_proj"]),
    ("jamba", ["model.layers.0.mamba.dt_proj.weight"]),
    ("jamba", ["model.layers.0.mamba.dt_proj.bias", "model.layers.0.mamba.A_log"]),
    ("zamba", ["model.layers.0.mamba.x_proj_weight"]),
]


@pytest.mark.parametrize(("arch", "names"), PARTS)
def test_a_part_changes_that_part_alone(arch: str, names: list[str], two_of: Any, open_engine: Any) -> None:
    old, new = two_of(arch)
    model, other = (AutoModelForCausalLM.from_pretrained(path) for path in (old, new))
    engine = open_engine(old)
    before = numbers(engine)
    changed = {name: other.state_dict()[name] + 0.1 for name in names}
    engine.update_weights(changed, partial=True).result(60)
    model.load_state_dict(changed, strict=False)
    model.save_pretrained(old)
    assert numbers(engine) == numbers(open_engine(old)) != before


def test_experts_come_stacked_or_one_by_one(two_of: Any, open_engine: Any) -> None:
    """A checkpoint has a tensor an expert; ten and more sort by number."""
    old, new = two_of("qwen3_moe")
    files = load_file(new / "model.safetensors")
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in files
    engine = open_engine(old)
    only = {name: tensor for name, tensor in files.items() if "layers.0.mlp.experts" in name}
    engine.update_weights(only, partial=True).result(60)
    engine.update_weights(
        {name: tensor for name, tensor in files.items() if name not in only}, partial=True
    ).result(60)
    assert numbers(engine) == numbers(open_engine(new))
    del only["model.layers.0.mlp.experts.3.up_proj.weight"]
    with pytest.raises(BadSnapshotError, match="do not fit each other"):
        engine.update_weights(only, partial=True).result(60)


def test_what_the_trainer_does_afterwards_changes_nothing(two_of: Any, open_engine: Any) -> None:
    old, new = two_of("llama")
    engine, trainer = open_engine(old), AutoModelForCausalLM.from_pretrained(new)
    engine.update_weights(trainer.state_dict()).result(60)
    with torch.no_grad():
        for parameter in trainer.parameters():
            parameter.zero_()
    assert numbers(engine) == numbers(open_engine(new))


def nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = math.nan
    return tensor


Q = "model.layers.0.self_attn.q_proj.weight"
BAD: list[tuple[Callable[[Any], Any], str]] = [
    (lambda t: {}, "no tensors"),
    (lambda t: {n: x for n, x in t.items() if n != Q}, f"lacks {Q}"),
    (lambda t: {n: x for n, x in t.items() if "layers.0" not in n}, "and 6 more"),
    (lambda t: t | {"model.layers.2.mlp.up_proj.weight": t[Q]}, "has no model.layers.2"),
    (lambda t: t | {Q: t[Q].T[:16].contiguous()}, r"the shape \(16, 32\); the model's is \(32, 32\)"),
    (lambda t: t | {Q: t[Q].bfloat16()}, "is torch.bfloat16 and the model's is torch.float32"),
    (lambda t: t | {Q: t[Q].int()}, "is torch.int32"),
    (lambda t: t | {Q: nan(t[Q])}, f"{Q} has values that are not finite"),
    (lambda t: t | {Q: t[Q].abs().log() * math.inf}, "not finite"),
    (lambda t: t | {Q: 3.0}, f"{Q} is a float"),
]


@pytest.mark.parametrize(("spoil", "words"), BAD)
def test_a_bad_snapshot_is_refused_and_the_old_weights_serve(
    spoil: Callable[[Any], Any], words: str, two_of: Any, make_engine: Callable[..., Engine]
) -> None:
    _, new = two_of("llama")
    engine = make_engine("llama")
    before = numbers(engine)
    with pytest.raises(BadSnapshotError, match=words):
        engine.update_weights(spoil(load_file(new / "model.safetensors"))).result(60)
    assert (engine.weight_version, numbers(engine)) == (0, before)


def test_a_checksum_that_differs_is_refused(two_of: Any, make_engine: Callable[..., Engine]) -> None:
    old, new = two_of("llama")
    engine = make_engine("llama")
    with pytest.raises(BadSnapshotError, match="the checksum is sha256:"):
        engine.update_weights(new, checksum=weights_checksum(old)).result(60)
    assert engine.weight_version == 0


def test_tied_weights_are_one_under_either_name(two_of: Any, open_engine: Any) -> None:
    old, new = two_of("gpt2")
    engine = open_engine(old)
    tensors = load_file(new / "model.safetensors")
    embedding = tensors.pop("transformer.wte.weight")
    engine.update_weights(tensors | {"lm_head.weight": embedding}).result(60)
    assert numbers(engine) == numbers(open_engine(new))
    both = tensors | {"lm_head.weight": embedding, "transformer.wte.weight": embedding + 1}
    with pytest.raises(BadSnapshotError, match="are one tensor in this model, and differ"):
        engine.update_weights(both).result(60)


def test_an_explicit_dtype_rounds_every_snapshot_to_it(two_of: Any, open_engine: Any) -> None:
    old, new = two_of("qwen3")
    config = EngineConfig(num_blocks=32, dtype="bfloat16")
    engine = open_engine(old, config)
    engine.update_weights(new).result(60)
    assert numbers(engine) == numbers(open_engine(new, config))


def test_an_engine_without_exactness_is_updated_too(two_of: Any, open_engine: Any) -> None:
    old, new = two_of("gpt2")
    config = EngineConfig(num_blocks=32, exact="off")
    engine = open_engine(old, config)
    engines = open_engine(old, config), engine, open_engine(new, config)
    engine.update_weights(new).result(60)
    for asked in ASKED:  # one at a time: here a batch would show in the numbers
        [[stale], [updated], [wanted]] = (run(each, [asked])[0] for each in engines)
        # a library's last bit follows where a tensor lies in memory
        assert updated.ids == wanted.ids
        assert [t.logprob for t in updated.tokens] == pytest.approx(
            [t.logprob for t in wanted.tokens], abs=1e-5
        )
        assert abs(stale.tokens[0].logprob - wanted.tokens[0].logprob) > 1e-3


def test_versions_are_counted_or_named_and_only_grow(two_of: Any, open_engine: Any) -> None:
    old, new = two_of("llama")
    engine = open_engine(old)
    assert engine.update_weights(new, version=40).result(60).weight_version == 40
    assert engine.update_weights(old).result(60).weight_version == 41
    for version in (41, 0, -1):
        with pytest.raises(RequestError, match="the version must grow"):
            engine.update_weights(new, version=version).result(60)
    [[choice]] = run(engine, ASKED[:1])
    assert {token.weight_version for token in choice.tokens} == {41}


def test_more_than_the_memory_holds_is_refused(
    two_of: Any, make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, new = two_of("llama")
    monkeypatch.setattr("myserve.engine.weights.prepare.free_memory", lambda device: 1000)
    with pytest.raises(RuntimeError, match="do not fit beside the old ones"):
        make_engine("llama").update_weights(new).result(60)


def test_a_torn_file_is_refused(two_of: Any, make_engine: Callable[..., Engine], tmp_path: Path) -> None:
    _, new = two_of("llama")
    data = (new / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadSnapshotError, match="torn"):
        make_engine("llama").update_weights(tmp_path).result(60)


def test_shards_without_an_index_are_one_snapshot(two_of: Any, open_engine: Any, tmp_path: Path) -> None:
    old, new = two_of("llama")
    tensors = list(load_file(new / "model.safetensors").items())
    save_file(dict(tensors[:9]), tmp_path / "0.safetensors")
    save_file(dict(tensors[9:]), tmp_path / "1.safetensors")
    engine = open_engine(old)
    engine.update_weights(tmp_path).result(60)
    assert numbers(engine) == numbers(open_engine(new))
