"""What is fused is recognised by what it computes, and what is not recognised is left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from myserve.engine.batch_invariance.fusion import fuse_gates, fuse_rotary, gate_activation, norm_kind
from myserve.engine.batch_invariance.patch import make_exact


@pytest.mark.parametrize(
    ("arch", "offset", "rounds_first"),
    [("llama", 0.0, True), ("qwen3", 0.0, True), ("olmo2", 0.0, False), ("gemma3_text", 1.0, False)],
)
def test_norms_are_known_by_their_numbers(
    tiny_model: Callable[[str], Path], arch: str, offset: float, rounds_first: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(arch), dtype=torch.bfloat16)
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    kinds = {norm_kind(norm) for norm in norms}
    assert norms and len(kinds) == 1
    ((kind, eps),) = (known for known in kinds if known is not None)
    assert (kind.offset, kind.rounds_first, eps) == (offset, rounds_first, model.config.rms_norm_eps)


def test_control_other_norms_are_left_alone() -> None:
    class Shifted(modeling_llama.LlamaRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1  # type: ignore[no-any-return]

    assert norm_kind(modeling_llama.LlamaRMSNorm(8)) is not None  # type: ignore[no-untyped-call]
    assert norm_kind(Shifted(8)) is None  # type: ignore[no-untyped-call]
    assert norm_kind(nn.LayerNorm(8)) is None


def test_gates_are_known_by_their_line(tiny_model: Callable[[str], Path]) -> None:
    def gates(arch: str) -> list[str | None]:
        model = AutoModelForCausalLM.from_pretrained(tiny_model(arch))
        return [gate_activation(m) for m in model.modules() if gate_activation(m) is not None]

    assert gates("qwen3") == ["silu"] * 2
    assert gates("gemma3_text") == ["gelu_tanh"] * 2
    assert not gates("mixtral")  # its experts are no gate


@pytest.mark.parametrize("arch", ["qwen3", "gemma3_text"])
def test_a_fused_gate_is_the_models_own_formula(tiny_model: Callable[[str], Path], arch: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(arch), dtype=torch.bfloat16)
    mlp: Any = model.model.layers[0].mlp
    x = torch.randn(5, 32).bfloat16()
    with torch.inference_mode():
        own = mlp(x)
        fuse_gates(model)
        fused = mlp(x)
    assert "forward" in vars(mlp)
    torch.testing.assert_close(fused, own)


def test_products_of_one_input_are_joined_and_may_be_asked_for_in_any_order(
    tiny_model: Callable[[str], Path],
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    make_exact(model)
    layer = model.model.layers[0].self_attn
    query, key, value = layer.q_proj, layer.k_proj, layer.v_proj
    x, other = torch.randn(2, 1, 3, 32)
    assert all(torch.equal(part(x), part.packed(x)) for part in (query, key, value))
    assert torch.equal(value(x), value.packed(x))  # before its turn
    query(x)
    assert torch.equal(key(other), key.packed(other))  # of another input than the first's
    assert torch.equal(value(x), value.packed(x))


def test_the_rotary_function_is_fused_for_inference_alone() -> None:
    model = modeling_llama.LlamaForCausalLM(
        modeling_llama.LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
    )
    fuse_rotary(model)
    ours = modeling_llama.apply_rotary_pos_emb
    theirs = ours.before_fusion
    fuse_rotary(model)
    assert modeling_llama.apply_rotary_pos_emb is ours, "put there once"
    query, key = torch.randn(1, 2, 5, 4, requires_grad=True), torch.randn(1, 1, 5, 4)
    cosine, sine = torch.randn(2, 1, 5, 4)
    with torch.inference_mode():
        fused = ours(query, key, cosine, sine)
    kept = ours(query, key, cosine, sine)
    assert all(map(torch.equal, fused, kept)) and all(
        map(torch.equal, kept, theirs(query, key, cosine, sine))
    )
    kept[0].sum().backward()
    assert query.grad is not None and bool(query.grad.abs().sum() > 0)


def test_control_a_rotary_function_with_other_bits_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        return q * cos.unsqueeze(unsqueeze_dim), k * sin.unsqueeze(unsqueeze_dim)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", interleaved)
    fuse_rotary(modeling_llama.LlamaMLP(modeling_llama.LlamaConfig(hidden_size=32, intermediate_size=8)))
    assert modeling_llama.apply_rotary_pos_emb is interleaved
