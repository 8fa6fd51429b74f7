"""A model that does not fit is refused before it is read, with both figures; one that fits is not."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import myserve.engine.weights.memory_gate as gate
from conftest import SMALL, make_tiny_model, trained_tokenizer
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.weights.loader import load
from myserve.errors import NotEnoughMemoryError
from quantized_checkpoints import write_quantized
from runs import thorough
from warm_python import warm_python

# 28 million weights of products, 4 million of an embedding that is tied: large beside what a process needs anyway
WIDE = SMALL | {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 8192, "head_dim": 128,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **WIDE)).bfloat16().save_pretrained(folder)
    trained_tokenizer().save_pretrained(folder)
    return folder


def need(folder: Path, **config: Any) -> gate.Need:
    """What the gate says of a folder, by letting it refuse."""
    options = EngineConfig(**config)
    hf_config = AutoConfig.from_pretrained(folder)
    return gate.need_of(
        gate.stored_tensors(str(folder), None, text_alone=False), hf_config, options, dtype=hf_config.dtype,
        quantize=options.quantize, is_decoded=False, packs=True,
    )  # fmt: skip


def refused(monkeypatch: pytest.MonkeyPatch, free: int, folder: Path, **config: Any) -> str:
    monkeypatch.setattr(gate, "free_memory", lambda _: free)
    with pytest.raises(NotEnoughMemoryError) as caught:
        load(str(folder), EngineConfig(**config))
    return str(caught.value)


def test_weights_and_cache_are_counted_by_definition(wide: Path) -> None:
    products = 8 * (512 * 512 * 2 + 512 * 256 * 2 + 3 * 512 * 2048)
    embedding, norms = 8192 * 512, 17 * 512
    assert need(wide, max_model_len=512).weights == 2 * (products + 2 * embedding + norms)
    assert need(wide, max_model_len=512).cache == 512 * 8 * 2 * (2 * 128) * 2
    int8 = need(wide, max_model_len=512, quantize="int8").weights
    assert 1.0 < int8 / (products + 3 * embedding + 2 * norms) < 1.02  # and scales
    assert need(wide, kv_cache_bytes=1 << 20).cache == 1 << 20


@pytest.mark.parametrize(
    ("arch", "keys", "states"),
    [
        ("qwen3_5_text", 1 * 2 * 2 * 16, 3 * 4 * 12 * 20),  # numbers of a token; of a request
        ("kimi_linear", 0, 4 * 4 * 12 * 12),
        ("granitemoehybrid", 1 * 2 * 2 * 16, 3 * 8 * 16 * 12),
        ("nemotron_h", 1 * 2 * 2 * 16, 1 * 8 * 16 * 12),
        ("falcon_h1", 4 * 2 * 2 * 16, 4 * 8 * 16 * 12),
        ("mamba2", 0, 4 * 8 * 16 * 12),
        ("mamba", 0, 4 * 128 * 12),
        ("jamba", 1 * 2 * 2 * 16, 3 * 128 * 12),
        ("zamba", 2 * 2 * 2 * 32, 4 * 128 * 12),
        ("minimax", 2 * 2 * 2 * 16, 2 * 4 * 16 * 16),
        ("lfm2", 1 * 2 * 2 * 16, 0),
    ],
)
def test_hybrids_are_counted_by_what_each_layer_keeps(arch: str, keys: int, states: int) -> None:
    sizes: dict[str, Any] = {
        **SMALL, "num_hidden_layers": 4, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
        "linear_num_value_heads": 4, "linear_num_heads": 4, "linear_key_head_dim": 12, "linear_value_head_dim": 20,
        "linear_head_dim": 12, "mamba_n_heads": 8, "mamba_num_heads": 8, "mamba_d_head": 16, "mamba_head_dim": 16,
        "mamba_d_state": 12, "ssm_state_size": 12, "state_size": 12, "hidden_size": 64, "mamba_d_ssm": 128,
    }  # fmt: skip
    layers = {
        "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention", "mamba"]},
        "lfm2": {"layer_types": ["conv", "full_attention", "conv", "conv"]},
        "mamba2": {"num_heads": 8},
        "mamba": {"intermediate_size": 128},
        "jamba": {"attn_layer_period": 4, "attn_layer_offset": 2},
        "zamba": {"attention_head_dim": 32, "layers_block_type": ["linear_attention", "hybrid"] * 2},
        "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    }
    known = AutoConfig.for_model(arch).to_dict()
    fitting = {name: value for name, value in sizes.items() if name in known} | layers.get(arch, {})
    config = AutoConfig.for_model(arch, **fitting)
    found = gate.need_of(
        {}, config, EngineConfig(max_model_len=64), dtype=torch.bfloat16, quantize="off", is_decoded=False, packs=True
    )  # fmt: skip
    assert found.cache == 64 * keys * 2 + 2 * 4 * states


@pytest.mark.own_process
@pytest.mark.parametrize("quantize", ["off", thorough("int8")])
def test_what_a_model_takes_is_what_was_said(quantize: str, wide: Path) -> None:
    """Resident memory after a first engine, which brought the kernels, and after the wide model beside it."""
    tiny = make_tiny_model("llama", wide / "tiny", dtype=torch.bfloat16)
    first = Engine.from_pretrained(str(tiny), EngineConfig(num_blocks=32, quantize=quantize))
    before = psutil.Process().memory_info()
    options = EngineConfig(max_model_len=512, num_blocks=16, max_num_seqs=16, quantize=quantize)
    engine = Engine.from_pretrained(str(wide), options)
    after = psutil.Process().memory_info()
    taken = (after.rss - after.shared) - (before.rss - before.shared)  # without mapped files
    said = need(wide, max_model_len=512, max_num_seqs=16, quantize=quantize)
    engine.shutdown()
    first.shutdown()
    assert 0.75 * said.weights < taken < 1.5 * said.total + (48 << 20)


def test_one_that_does_not_fit_is_refused_with_both_figures(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = need(wide)
    refusal = refused(monkeypatch, said.total - 1, wide)
    assert "does not fit" in refusal and f"{said.total >> 20} MiB" in refusal
    assert f"{(said.total - 1) >> 20} MiB are free" in refusal
    assert "--quantize int8 needs" in refusal and "\n" not in refusal
    monkeypatch.setattr(gate, "free_memory", lambda _: said.total)
    load(str(wide), EngineConfig())  # control: it fits to the byte


def test_what_is_offered_does_fit(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = need(wide, max_model_len=512)
    free = said.total - said.cache // 3
    refusal = refused(monkeypatch, free, wide, max_model_len=512)
    offered = re.search(r"--max-model-len (\d+) needs", refusal)
    assert offered is not None and 256 <= int(offered[1]) < 512
    load(str(wide), EngineConfig(max_model_len=int(offered[1])))
    refusal = refused(
        monkeypatch, need(wide, kv_cache_bytes=64 << 20).total - 1, wide, kv_cache_bytes=64 << 20
    )
    assert "--kv-cache-bytes" in refusal


def test_where_nothing_helps_it_says_so(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no option makes it fit" in refused(monkeypatch, 1 << 20, wide)


def test_packed_weights_are_counted_as_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four bits in the file are sixteen in memory."""
    quantized, plain = write_quantized("gptq", tmp_path)
    sizes = [
        int(re.search(r"\((\d+) MiB of weights", refused(monkeypatch, 0, each, kv_cache_bytes=1 << 20))[1])  # type: ignore[index]
        for each in (quantized, plain)
    ]
    assert sizes[0] == sizes[1]


def test_a_process_with_a_limit_refuses_before_it_reads(wide: Path) -> None:
    """`ulimit -v`: one sentence and a status, not a process that is killed."""
    program = (
        "import resource, sys, psutil, torch\n"
        "from myserve.engine.config import EngineConfig\n"
        "from myserve.engine.engine import Engine\n"
        "from myserve.errors import NotEnoughMemoryError\n"
        "used = psutil.Process().memory_info().vms\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20), -1))\n"
        f"try: Engine.from_pretrained({str(wide)!r}, EngineConfig())\n"
        "except NotEnoughMemoryError as error: print(error); sys.exit(7)\n"
    )
    run = subprocess.run([*warm_python(), "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 7, run.stderr[-2000:]
    assert "does not fit into memory" in run.stdout
