"""Of a checkpoint of text and pictures the text is served, as transformers computes it; its towers take no memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from conftest import SMALL, trained_tokenizer
from engine.test_exactness import together
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.weights.loader import load
from myserve.errors import BadCheckpointError, RequestError
from runs import mixed_requests, run_one

_TOWER = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "depth": 1, "num_heads": 2, "out_hidden_size": 32, "fullatt_block_indexes": [0],
    "deepstack_visual_indexes": [0], "head_dim": 16,
}  # fmt: skip
_TEXT = SMALL | {"max_position_embeddings": 256}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
KINDS: dict[str, dict[str, Any]] = {
    "gemma3": {"sliding_window": 24, "query_pre_attn_scalar": 8},
    "mistral3": {"model_type": "mistral"},
    "qwen2_5_vl": _MROPE,
    "qwen3_vl": {"rope_parameters": _MROPE["rope_parameters"] | {"mrope_interleaved": True}},
}


def write(kind: str, folder: Path) -> Path:
    config = AutoConfig.for_model(kind)
    tower = {name: value for name, value in _TOWER.items() if hasattr(config.vision_config, name)}
    config = AutoConfig.for_model(
        kind,
        text_config=_TEXT | KINDS[kind],
        vision_config=tower | {"model_type": config.vision_config.model_type},
        tie_word_embeddings=False,
        **({"mm_tokens_per_image": 4} if kind == "gemma3" else {}),
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    trained_tokenizer().save_pretrained(folder)
    return folder


@torch.inference_mode()
def own(folder: Path, prompt: list[int]) -> tuple[list[int], list[float]]:
    """transformers' greedy tokens, and the logprobs of all tokens but the first."""
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    out = model.generate(torch.tensor([prompt]), max_new_tokens=8, min_new_tokens=8, do_sample=False)[0]
    rows = model(out[None]).logits[0].log_softmax(-1)
    return out[len(prompt) :].tolist(), rows[:-1].gather(1, out[1:, None])[:, 0].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_transformers_own(kind: str, tmp_path: Path) -> None:
    folder = write(kind, tmp_path / kind)
    prompt = [(17 + 31 * i) % 300 + 4 for i in range(50)]
    expected, logprobs = own(folder, prompt)
    engine = Engine.from_pretrained(str(folder), EngineConfig(num_blocks=64))
    try:
        answer = run_one(engine, prompt, max_tokens=8, temperature=0, ignore_eos=True, prompt_logprobs=0)
        assert answer.ids == expected
        scores = next(d.prompt_logprobs for d in answer.deltas if d.prompt_logprobs is not None)
        scored = [p.logprob for p in scores[1:]] + [t.logprob for t in answer.tokens]
        assert max(abs(a - b) for a, b in zip(scored, logprobs, strict=True)) < 1e-3
        asked = mixed_requests(4, seed=5)
        assert together(engine, asked) == [together(engine, [one])[0] for one in asked]
        names = {name for name, _ in engine.runner.model.named_parameters()}
        assert not [name for name in names if "vis" in name or "project" in name]
        # a trainer has the towers, and may send them
        engine.update_weights(load_file(folder / "model.safetensors")).result(timeout=60)
    finally:
        engine.shutdown()


def test_a_text_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    """A tower that is not there is none of ours; a layer of the text is."""
    folder = write("mistral3", tmp_path / "model")
    whole = load_file(folder / "model.safetensors")
    towerless = {name: tensor for name, tensor in whole.items() if "vision" not in name}
    save_file(towerless, folder / "model.safetensors", {"format": "pt"})
    load(str(folder), EngineConfig())
    lost = next(
        name for name in whole if name.endswith("layers.1.mlp.up_proj.weight") and "vision" not in name
    )
    del towerless[lost]
    save_file(towerless, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadCheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        load(str(folder), EngineConfig())


def test_control_another_models_weights_are_still_refused(tmp_path: Path) -> None:
    """What is passed over is the towers' alone."""
    folder = write("mistral3", tmp_path / "model")
    engine = Engine.from_pretrained(str(folder), EngineConfig(num_blocks=64))
    try:
        tensors = load_file(folder / "model.safetensors")
        with pytest.raises(RequestError, match="has no"):
            engine.update_weights(tensors | {"model.value_head.weight": torch.zeros(2, 2)}).result(timeout=60)
    finally:
        engine.shutdown()
