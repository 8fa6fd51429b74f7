"""An adapter is checked whole: what cannot be served is refused with the reason, and nothing is changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.adapters import USUAL, write_adapter, write_expert_adapter
from myserve.engine.engine import Engine
from myserve.errors import BadAdapterError
from runs import run_one

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
Change = Callable[[Path], None]


def told(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changes))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def changed(folder: Path) -> None:
        found = load_file(folder / FILE)
        change(found)
        save_file(found, folder / FILE)

    return changed


def another(layer: str) -> Change:
    pair = {f"{layer}.lora_A.weight": torch.ones(4, 32), f"{layer}.lora_B.weight": torch.ones(32, 4)}
    return tensors(lambda found: found.update(pair))


def cut(name: str, left: int) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:left]) and None


def unlink(folder: Path) -> None:
    (folder / CONFIG).unlink()


BAD: list[tuple[str, Change]] = [
    ("has no adapter_config.json", unlink),
    ("is torn or no JSON", cut(CONFIG, 40)),
    ("torn", cut(FILE, -100)),
    ("torn", cut(FILE, 4)),
    ("peft_type", told(peft_type="LOHA")),
    ("DoRA", told(use_dora=True)),
    ("bias", told(bias="all")),
    ("bias of B", told(lora_bias=True)),
    ("modules_to_save", told(modules_to_save=["lm_head"])),
    ("trainable_token_indices", told(trainable_token_indices=[1])),
    ("'new_kind', which this server does not know", told(new_kind={"on": True})),
    ("converted to plain LoRA", told(init_lora_weights="pissa_niter_4")),
    ("r must be an integer", told(r=0)),
    ("lora_alpha must be", told(lora_alpha="16")),
    ("no LoRA config", told(target_modules="q_proj(")),
    (r"with rank 8 of adapter_config.json it is \(8, ", told(r=8)),
    (r"q_proj.lora_A has the shape \(4, ", told(rank_pattern={"layers.1.self_attn.q_proj": 2})),
    ("lacks model.layers.0.mlp.gate_proj", told(target_modules=["q_proj", "gate_proj"])),
    ("does not name", told(target_modules=["q_proj"])),
    ("A and B belong together", tensors(lambda t: t.pop(f"{Q}.lora_B.weight"))),
    ("no linear layer model.layers.7", another(Q.replace("0", "7"))),
    ("is no A or B", tensors(lambda found: found.update({f"{Q}.lora_magnitude_vector": torch.ones(4)}))),
    ("is no A or B", another(Q.removeprefix("base_model.model."))),
    ("no linear layer lm_head", another("base_model.model.lm_head")),
    ("no linear layer model.embed_tokens", another("base_model.model.model.embed_tokens")),
    ("are read", tensors(lambda t: t.update({f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"].to(torch.int32)}))),
    ("not finite", tensors(lambda t: t[f"{Q}.lora_B.weight"].fill_(float("nan")))),
]  # fmt: skip


def test_what_cannot_be_served_is_refused_and_changes_nothing(
    tiny_model: Callable[[str], Path], make_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    engine, model = make_engine("llama", dtype="float32"), tiny_model("llama")
    plain = run_one(engine, [5, 6, 7], max_tokens=4, seed=1).numbers
    for number, (reason, change) in enumerate(BAD):
        folder = write_adapter(tmp_path / str(number), model, targets=["q_proj", "v_proj"])
        change(folder)
        with pytest.raises(BadAdapterError, match=reason):
            engine.load_adapter("bad", folder).result()
    assert not engine.adapters and engine.runner.adapter_steps is None
    assert run_one(engine, [5, 6, 7], max_tokens=4, seed=1).numbers == plain


@pytest.mark.parametrize("one_by_one", [True, False])
def test_experts_are_there_whole_or_refused(
    one_by_one: bool, tiny_model: Callable[[str], Path], make_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    engine, model = make_engine("qwen3_moe", dtype="float32"), tiny_model("qwen3_moe")
    folder = write_expert_adapter(tmp_path, model, one_by_one=one_by_one)
    layer = "base_model.model.model.layers.1.mlp.experts" + (".2.up_proj" if one_by_one else "")

    def without(found: dict[str, torch.Tensor]) -> None:
        for factor in ("lora_A", "lora_B"):
            del found[f"{layer}.{factor}.weight"]

    tensors(without)(folder)
    reason = "lacks some of the 8 experts" if one_by_one else "lacks model.layers.1.mlp.experts.down_proj"
    with pytest.raises(BadAdapterError, match=reason):
        engine.load_adapter("bad", folder).result()
    assert not engine.adapters


def test_all_that_peft_says_of_ranks_and_layers_is_understood(
    tiny_model: Callable[[str], Path], make_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    """Each says the same adapter in another way."""
    engine, model = make_engine("llama", dtype="float32"), tiny_model("llama")
    ways: list[dict[str, Any]] = [
        {"target_modules": r"model\.layers\.\d+\.(self_attn|mlp)\..*_proj"},
        {"r": 9, "lora_alpha": 1, "rank_pattern": {"_proj": 2, ".*_proj": 4}, "alpha_pattern": {".*": 8}},
        {"use_rslora": True, "lora_alpha": 4},
        {"layers_to_transform": [0, 1]},
    ]
    numbers = set()
    for way in [{"target_modules": "all-linear"}, *ways]:
        folder = write_adapter(
            tmp_path / "same", model, rank=4, alpha=8.0, **({"target_modules": USUAL} | way)
        )
        engine.load_adapter("same", folder).result()
        layer = engine.runner.model.get_submodule("model.layers.1.mlp.up_proj").low_rank
        assert layer is not None
        slot = engine.adapters["same"].slot
        numbers.add((layer._weights[slot][0].scale, layer._weights[slot][0].rank))
    engine.unload_adapter("same").result()
    assert numbers == {(2.0, 4)}
    assert not layer._weights, "nothing of an unloaded adapter is left"
