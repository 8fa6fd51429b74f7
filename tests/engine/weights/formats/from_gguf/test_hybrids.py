"""Hybrids from GGUF have the weights and draws of their folder, bit for bit; what the file does not tell is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from conftest import trained_tokenizer
from engine.test_exactness import together
from gguf_hybrids import HYBRIDS, make_hybrid, write_hybrid
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.weights.formats.from_gguf import config, hybrids
from myserve.engine.weights.formats.from_gguf.architectures import Told
from myserve.engine.weights.loader import LoadedModel, load
from myserve.errors import RequestError, UnsupportedModelError
from runs import mixed_requests

Kind = gguf.GGMLQuantizationType
# in the file and not in the config, or the other way round, and of no effect on what is computed here
NO_EFFECT = {
    "transformers_version", "architectures", "_name_or_path", "dtype", "eos_token_id", "pad_token_id", "bos_token_id",
    "initializer_range", "mamba_chunk_size", "chunk_size", "rope_parameters", "max_position_embeddings",
    "sliding_window", "shared_expert_intermediate_size",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a tiny model, made once."""
    return cache(lambda name: make_hybrid(name, tmp_path_factory.mktemp(name) / "model"))


def loaded(path: Path, **change: Any) -> LoadedModel:
    return load(str(path), EngineConfig(**change))


def other_weights(made: LoadedModel, right: LoadedModel) -> set[str]:
    weights, expected = made.model.state_dict(), right.model.state_dict()
    assert weights.keys() == expected.keys()
    return {key for key in expected if not torch.equal(weights[key], expected[key])}


def refused(path: Path) -> str:
    with pytest.raises(RequestError) as caught:
        loaded(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


def _saved(made: LoadedModel, folder: Path) -> Path:
    made.model.save_pretrained(folder)
    trained_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_is_the_folder_that_it_was_written_of(
    folder_of: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    folder = folder_of(name)
    right = loaded(folder)
    for kind in (Kind.BF16, Kind.F32) if name == "nemotron_h_moe" else (Kind.BF16,):
        file = write_hybrid(name, folder, tmp_path / f"{kind.name}.gguf", kind)
        made = loaded(file, dtype="bfloat16" if kind is Kind.F32 else "auto")
        assert other_weights(made, right) == set()
        assert {p.dtype for p in made.model.parameters()} == {p.dtype for p in right.model.parameters()}
    said, expected = made.model.config.to_dict(), right.model.config.to_dict()
    assert {key for key in expected if said.get(key) != expected[key]} <= NO_EFFECT
    ids = torch.tensor([[(17 + 31 * i) % 300 + 4 for i in range(40)]])
    for model in (made.model, right.model):
        model.set_attn_implementation("eager")
        for name_of_size in ("mamba_chunk_size", "chunk_size"):  # which the file has not
            for module in model.modules():
                if hasattr(module, name_of_size):
                    setattr(module, name_of_size, 16)
    with torch.no_grad():
        assert torch.equal(*(m(ids, use_cache=False).logits for m in (made.model, right.model)))


@pytest.mark.parametrize("name", ["qwen35", pytest.param("granitehybrid", marks=pytest.mark.thorough)])
def test_draws_are_those_of_the_folder(folder_of: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    folder = folder_of(name)
    file = write_hybrid(name, folder, tmp_path / "model.gguf", Kind.BF16)
    asked, found = mixed_requests(4, seed=3), []
    for path in (folder, file):
        engine = Engine.from_pretrained(str(path), EngineConfig(num_blocks=64))
        found.append(together(engine, asked))
        engine.shutdown()
    assert found[0] == found[1]


@pytest.mark.parametrize("tensor", sorted(hybrids.HYBRIDS["qwen35"].undo))
def test_control_what_is_not_undone_shows(
    folder_of: Callable[[str], Path], tensor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each transformation is seen by the comparison: without its line the weights are others, or no weights."""
    folder = folder_of("qwen35")
    file = write_hybrid("qwen35", folder, tmp_path / "model.gguf", Kind.BF16)
    own = config.ARCHITECTURES["qwen35"]
    rest = {key: undo for key, undo in own.undo.items() if key != tensor}
    monkeypatch.setattr(config, "ARCHITECTURES", {"qwen35": replace(own, undo=rest)})
    if "conv" in tensor:
        assert "conv1d" in refused(file)
    else:
        assert other_weights(loaded(file), loaded(folder))


def test_float32_decays_are_the_nearest(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """A file has -exp(A_log), in which numbers of float32 below 1 lie closer than it can tell."""
    folder = folder_of("qwen35")
    right = loaded(folder, dtype="float32")
    file = write_hybrid("qwen35", folder, tmp_path / "model.gguf", Kind.F32)
    assert other_weights(loaded(file), right) == set()  # they are numbers of bfloat16
    key = "model.layers.0.linear_attn.A_log"
    right.model.state_dict()[key].add_(torch.linspace(0, 1e-3, 6))
    folder = _saved(right, tmp_path / "other")
    again = loaded(write_hybrid("qwen35", folder, tmp_path / "other.gguf", Kind.F32))
    assert other_weights(again, right) <= {key}
    torch.testing.assert_close(
        again.model.state_dict()[key], right.model.state_dict()[key], rtol=0, atol=1.2e-7
    )


def test_a_joined_projection_of_older_converters_is_read(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Qwen3-Next's: one tensor, in transformers' order."""
    folder = folder_of("qwen3next")
    right = loaded(folder)
    joined = {
        f"blk.{i}.ssm_in.weight": right.model.state_dict()[
            f"model.layers.{i}.linear_attn.in_proj_qkvz.weight"
        ].float()
        for i in range(3)
    }
    apart = [f"blk.{i}.{stem}.weight" for i in range(3) for stem in ("attn_qkv", "attn_gate")]
    file = write_hybrid("qwen3next", folder, tmp_path / "model.gguf", Kind.BF16, more=joined, without=apart)
    assert other_weights(loaded(file), right) == set()
    file = write_hybrid("qwen3next", folder, tmp_path / "less.gguf", Kind.BF16, without=apart[1:2])
    assert "has not all of" in refused(file)


def test_layers_that_predict_further_tokens_are_passed_over(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of("qwen35")
    more = {"blk.4.nextn.eh_proj.weight": torch.ones(64, 128), "blk.4.attn_q.weight": torch.ones(128, 64)}
    said = {
        "block_count": 5, "nextn_predict_layers": 1,
        "attention.recurrent_layers": [True, True, True, False, False],
    }  # fmt: skip
    file = write_hybrid("qwen35", folder, tmp_path / "model.gguf", Kind.BF16, said, more)
    assert other_weights(loaded(file), loaded(folder)) == set()
    for wrong in (5, 2**31):
        file = write_hybrid(
            "qwen35", folder, tmp_path / "wrong.gguf", Kind.BF16, said | {"nextn_predict_layers": wrong}, more
        )
        assert "nextn_predict_layers" in refused(file)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("qwen35", {"attention.recurrent_layers": [True] * 4}, "of other layers"),
        ("qwen35", {"ssm.inner_size": 121}, "do not divide"),
        ("qwen35", {"ssm.inner_size": 0}, "it is a size"),
        ("qwen35", {"ssm.time_step_rank": 5}, "cannot be made of"),
        ("qwen35", {"ssm.group_count": 3}, "cannot be made of"),
        ("qwen35", {"ssm.group_count": 0}, ""),
        ("qwen35", {"ssm.state_size": 2**12}, "cannot be made of"),
        ("qwen35", {"rope.dimension_count": 17}, "rope.dimension_count"),
        ("qwen35", {"expert_count": 4}, "expert_count"),
        ("lfm2", {"attention.head_count_kv": [0, 2, 2]}, "of other layers"),
        ("lfm2", {"attention.head_count_kv": [0, 2, 1]}, "one number for all layers"),
        ("lfm2", {"attention.head_count_kv": []}, ""),
        ("lfm2moe", {"expert_gating_func": 1}, "expert_gating_func"),
        ("granitehybrid", {"rope.scaling.finetuned": True}, "rope.scaling.finetuned"),
        ("granitehybrid", {"attention.scale": None}, "attention.scale"),
        ("granitehybrid", {"residual_scale": float("nan")}, "residual_scale"),
        ("mamba", {"ssm.dt_b_c_rms": True}, "dt_b_c_rms"),
        ("mamba2", {"ssm.inner_size": 100}, "do not divide"),
        ("nemotron_h_moe", {"moe_latent_size": 8}, "moe_latent_size"),
    ],
)
def test_what_is_absurd_or_not_read_is_a_sentence(
    folder_of: Callable[[str], Path], name: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = folder_of(name)
    assert reason in refused(write_hybrid(name, folder, tmp_path / "model.gguf", Kind.BF16, changes))


def test_a_decay_that_is_none_is_refused_by_name(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folder_of("mamba2")
    file = write_hybrid(
        "mamba2", folder, tmp_path / "model.gguf", Kind.BF16, more={"blk.1.ssm_a": torch.zeros(8, 1)}
    )
    assert "blk.1.ssm_a" in refused(file)


def test_a_torn_file_is_a_sentence(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folder_of("qwen35")
    whole = write_hybrid("qwen35", folder, tmp_path / "model.gguf", Kind.BF16).read_bytes()
    for share in (0.1, 0.5, 0.9, 0.999):
        torn = tmp_path / "torn.gguf"
        torn.write_bytes(whole[: int(len(whole) * share)])
        assert "torn.gguf" in refused(torn)


def test_a_head_that_lost_its_multiplier_is_refused(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Falcon-H1's converter multiplies the head's weights, which a tied file has not."""
    folder = folder_of("falcon-h1")
    right = loaded(folder)
    right.model.config.tie_word_embeddings = True
    right.model.tie_weights()
    folder = _saved(right, tmp_path / "tied")
    assert "multiplier" in refused(write_hybrid("falcon-h1", folder, tmp_path / "tied.gguf", Kind.BF16))


def test_layers_in_no_period_are_refused() -> None:
    """Jamba's config can say none but a period; a file could have any layers."""
    told = Told("a.gguf", "jamba", {}, {})
    periods = [[1, 0, 0, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 0, 1]]
    for has in periods:
        period, first = hybrids._every(told, [bool(it) for it in has])
        assert first < period and [int(i % period == first) for i in range(len(has))] == has
    for has in ([0, 1, 1, 0], [0, 0, 0, 1, 0, 1], [1, 0, 1, 1]):
        with pytest.raises(UnsupportedModelError, match="in no period"):
            hybrids._every(told, [bool(it) for it in has])
