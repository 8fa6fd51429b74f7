"""Which models load, and what is said of those that cannot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from myserve.core.grammar import Grammar
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.mixers import attention
from myserve.errors import RequestError, UnsupportedModelError
from runs import run_one

SMALL = EngineConfig(num_blocks=8)


def test_a_hybrid_model_is_refused_for_its_layers(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "qwen3", layer_types=["full_attention", "compressed_sparse_attention"], num_hidden_layers=2
    )
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="compressed_sparse_attention"):
        Engine.from_pretrained(str(tmp_path), SMALL)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        Engine.from_pretrained(str(tmp_path), SMALL)


def test_a_model_that_packs_wrongly_is_found_out(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of every other test here that loads: spoil the attention, and loading must refuse."""
    honest = attention.paged_attention

    def sees_one_key_too_few(query: torch.Tensor, *args: torch.Tensor, **options: float) -> torch.Tensor:
        return honest(query.roll(1, dims=0), *args, **options)

    monkeypatch.setattr(attention, "paged_attention", sees_one_key_too_few)
    with pytest.raises(UnsupportedModelError, match="other logits packed than alone"):
        Engine.from_pretrained(str(tiny_model("llama")), SMALL)


def test_a_path_is_as_good_as_its_text(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("llama")
    engines = [Engine.from_pretrained(model, SMALL) for model in (folder, str(folder))]
    drawn = [run_one(engine, [1, 2, 3], max_tokens=4, seed=1).numbers for engine in engines]
    assert drawn[0] == drawn[1]
    for engine in engines:
        engine.shutdown()


def test_a_path_that_is_no_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError)):
        Engine.from_pretrained(str(tmp_path / "nothing"), SMALL)


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("dtype", "fp32"),
        ("exact", "maybe"),
        ("max_num_seqs", 0),
        ("max_queue", 0),
        ("max_num_batched_tokens", 0),
    ],
)
def test_a_knob_out_of_range_says_its_name(knob: str, value: object) -> None:
    with pytest.raises(RequestError, match=knob):
        EngineConfig(**{knob: value})


def test_dtype_is_what_was_asked_for(make_engine: Callable[..., Engine]) -> None:
    assert make_engine("llama").runner.model.dtype == torch.float32
    assert make_engine("llama", dtype="bfloat16").runner.model.dtype == torch.bfloat16


def test_the_context_is_no_longer_than_asked_or_than_the_cache_holds(
    tiny_model: Callable[[str], Path],
) -> None:
    path = str(tiny_model("llama"))
    for config, length in [
        (EngineConfig(num_blocks=64), 512),
        (EngineConfig(num_blocks=64, max_model_len=100), 100),
        (EngineConfig(num_blocks=2), 64),
    ]:
        assert Engine.from_pretrained(path, config).max_model_len == length


def test_what_exactness_was_found_is_told(make_engine: Callable[..., Engine]) -> None:
    on, off = (
        make_engine("llama").exactness,
        make_engine("llama", prefix_caching=False, exact="off").exactness,
    )
    assert (on["mode"], on["rows_are_independent"]) == ("on", True)
    assert (off["mode"], off["rows_are_independent"]) == ("off", False)


@pytest.mark.parametrize(
    ("named", "ids"),
    [
        (2, (2,)),
        ([2, 49155], (2,)),
        ([2, 7, 2], (2, 7)),
        (-1, (2,)),  # the tokenizer's
        ([], (2,)),
        (None, (2,)),
        ([-1, 384], (2,)),
        ([383], (383,)),
    ],
)
def test_ids_that_cannot_be_drawn_end_nothing(
    tiny_model: Callable[[str], Path], tmp_path: Path, named: object, ids: tuple[int, ...]
) -> None:
    folder = with_eos(tiny_model("llama"), tmp_path / "copy", named)
    engine = Engine.from_pretrained(str(folder), SMALL)
    try:
        assert engine.eos_token_ids == ids
        completion = run_one(engine, [5, 6, 7], max_tokens=40, seed=1, grammar=Grammar("regex", "[ab]{2,4}"))
        assert completion.finish_reason == "stop" and set(completion.text) <= set("ab")
    finally:
        engine.shutdown()


@pytest.mark.parametrize("named", ["</s>", [2, "x"], [[2]], True, 2.5])
def test_what_is_no_id_is_refused(tiny_model: Callable[[str], Path], tmp_path: Path, named: object) -> None:
    folder = with_eos(tiny_model("llama"), tmp_path / "copy", named)
    with pytest.raises(UnsupportedModelError, match="eos_token_id") as caught:
        Engine.from_pretrained(str(folder), SMALL)
    assert "\n" not in str(caught.value)


def with_eos(model: Path, folder: Path, named: object) -> Path:
    """A copy whose config and generation config name these EOS ids."""
    shutil.copytree(model, folder)
    for file in ("config.json", "generation_config.json"):
        described = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(described | {"eos_token_id": named}))
    return folder
