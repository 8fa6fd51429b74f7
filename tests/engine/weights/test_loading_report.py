"""A checkpoint that does not give every weight of its model is refused by the name of what is missing or too much."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.weights import loader
from myserve.errors import BadCheckpointError, UnsupportedModelError

Weights = dict[str, torch.Tensor]
SMALL = EngineConfig(num_blocks=8)


@pytest.fixture
def changed(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a model whose weights, or whose config, were changed."""

    def make(change: Callable[[Weights], object], arch: str = "llama", **config: object) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(tiny_model(arch), folder)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        described = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(described | config))
        return folder

    return make


def refusal(folder: Path) -> str:
    with pytest.raises(BadCheckpointError) as caught:
        Engine.from_pretrained(str(folder), SMALL)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("llama", "lm_head.weight"),
        ("llama", "model.layers.1.mlp.up_proj.weight"),
        ("llama", "model.norm.weight"),
        ("llama", "model.embed_tokens.weight"),
        ("qwen2", "model.layers.0.self_attn.q_proj.bias"),
        ("gpt2", "transformer.h.1.attn.c_attn.weight"),
        ("mixtral", "model.layers.1.mlp.gate.weight"),
        ("gpt_oss", "model.layers.0.self_attn.sinks"),
    ],
)
def test_a_weight_that_is_missing_is_named(changed: Callable[..., Path], arch: str, name: str) -> None:
    def drop(weights: Weights) -> None:
        names = [n for n in weights if n == name or n.replace("block_sparse_moe", "mlp") == name]
        assert names, sorted(weights)
        for found in names:
            del weights[found]

    told = refusal(changed(drop, arch))
    assert name in told.replace("block_sparse_moe", "mlp")


@pytest.mark.parametrize("part", ["experts.2.w1", "experts.2."], ids=["a part of an expert", "an expert"])
def test_an_expert_that_is_missing_is_refused(changed: Callable[..., Path], part: str) -> None:
    def drop(weights: Weights) -> None:
        for name in [n for n in weights if "layers.1." in n and part in n]:
            del weights[name]

    assert "weights of" in refusal(changed(drop, "mixtral"))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("lm_head.weight", (384, 16)),
        ("model.layers.0.mlp.up_proj.weight", (60, 32)),
        ("model.norm.weight", (31,)),
    ],
)
def test_a_weight_of_another_shape_is_refused(
    changed: Callable[..., Path], name: str, shape: tuple[int, ...]
) -> None:
    assert "shapes" in refusal(changed(lambda weights: weights.update({name: torch.ones(shape)})))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",  # the config has no attention_bias
        "model.layers.1.self_attn.q_norm.weight",  # another architecture's
        "model.layers.1.self_attn.sinks",
        "lm_head.bias",
        "model.norm.bias",
    ],
)
def test_a_weight_inside_a_module_that_would_compute_without_it_is_refused(
    changed: Callable[..., Path], name: str
) -> None:
    assert name in refusal(changed(lambda weights: weights.update({name: torch.ones(32)})))


@pytest.mark.parametrize(
    "name", ["v_head.summary.weight", "model.layers.2.mlp.up_proj.weight", "vision_tower.patch.weight"]
)
def test_a_part_that_the_model_does_not_have_is_named_in_a_warning(
    changed: Callable[..., Path], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = changed(lambda weights: weights.update({name: torch.ones(3)}))
    with caplog.at_level(logging.WARNING, logger="myserve"):
        Engine.from_pretrained(str(folder), SMALL).shutdown()
    assert name in caplog.text


def test_constants_that_old_checkpoints_hold_are_passed_over(
    changed: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = changed(lambda weights: weights.update({name: torch.ones(4)}))
    with caplog.at_level(logging.WARNING, logger="myserve"):
        Engine.from_pretrained(str(folder), SMALL).shutdown()
    assert not [record for record in caplog.records if record.name.startswith("myserve")]


def test_a_head_that_is_tied_is_not_missing(changed: Callable[..., Path]) -> None:
    folder = changed(lambda weights: weights.pop("lm_head.weight"), tie_word_embeddings=True)
    Engine.from_pretrained(str(folder), SMALL).shutdown()


def test_models_that_are_loaded_at_once_are_built_one_after_the_other(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers replaces functions of the process while it builds: of two at once, one would leave heads untied."""
    inside, most = [0], [0]
    build = AutoModelForCausalLM.from_pretrained

    def slow(*args: Any, **kwargs: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.2)
        try:
            return build(*args, **kwargs)
        finally:
            inside[0] -= 1

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", slow)
    with ThreadPoolExecutor(3) as threads:
        loads = [threads.submit(loader.load, str(tiny_model("gpt2")), SMALL) for _ in range(3)]
        models = [load.result().model for load in loads]
    assert most == [1]
    assert all(model.lm_head.weight is model.transformer.wte.weight for model in models)


@pytest.mark.parametrize("tied", [True, False])
def test_torchs_own_files_are_read_in_one_part_and_in_many(
    tiny_model: Callable[[str], Path], tmp_path: Path, tied: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), tie_word_embeddings=tied)
    folder = tmp_path / "bin"
    shutil.copytree(tiny_model("llama"), folder)
    (folder / "model.safetensors").unlink()
    model.config.save_pretrained(folder)
    state = model.state_dict()
    if tied:
        del state["lm_head.weight"]
    half = len(state) // 2
    index = {}
    for part, names in enumerate((list(state)[:half], list(state)[half:]), 1):
        file = f"pytorch_model-0000{part}-of-00002.bin"
        torch.save({name: state[name] for name in names}, folder / file)
        index |= dict.fromkeys(names, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    engine = Engine.from_pretrained(str(folder), SMALL)
    try:
        assert engine.runner.structure.body == "model"
    finally:
        engine.shutdown()
    index.pop("model.norm.weight")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    shard = torch.load(folder / "pytorch_model-00002-of-00002.bin")
    shard.pop("model.norm.weight")
    torch.save(shard, folder / "pytorch_model-00002-of-00002.bin")
    assert "model.norm.weight" in refusal(folder)


def test_a_file_with_bytes_behind_its_tensors_is_not_loaded(changed: Callable[..., Path]) -> None:
    folder = changed(lambda weights: None)
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UnsupportedModelError, match=r"model.safetensors|cannot be read"):
        Engine.from_pretrained(str(folder), SMALL)
