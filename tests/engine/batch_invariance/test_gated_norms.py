"""The norms beside a gate: known by their numbers, right beside the models' own, and each row a function of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearRMSNormGated
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNormGated

from myserve.engine.batch_invariance.activations import install_activations
from myserve.engine.batch_invariance.gated_norms import GatedNormKind, fuse_gated_norms, gated_norm_kind

WIDTH = 48
MODULES: dict[str, tuple[Callable[[], Any], GatedNormKind]] = {
    "qwen3_5": (lambda: Qwen3_5RMSNormGated(WIDTH), GatedNormKind("silu", False, True, 1, 1e-6)),
    "kimi_linear": (lambda: KimiLinearRMSNormGated(WIDTH), GatedNormKind("sigmoid", False, False, 1, 1e-6)),
    "mamba2": (lambda: MambaRMSNormGated(WIDTH, 16), GatedNormKind("silu", True, True, 3, 1e-6)),
    "falcon_h1": (lambda: FalconH1RMSNormGated(WIDTH, n_groups=2), GatedNormKind("silu", False, False, 2, 1e-6)),
    "falcon_h1, gate first": (
        lambda: FalconH1RMSNormGated(WIDTH, n_groups=2, norm_before_gate=False),
        GatedNormKind("silu", True, False, 2, 1e-6),
    ),
}  # fmt: skip
each_module = pytest.mark.parametrize("name", MODULES)


def _made(name: str) -> tuple[Any, GatedNormKind]:
    make, kind = MODULES[name]
    module = make().bfloat16()
    nn.init.normal_(module.weight)
    install_activations(module)
    return module, kind


@each_module
@torch.no_grad()
def test_a_gated_norm_is_known_by_its_numbers_and_computes_the_models_own(name: str) -> None:
    module, kind = _made(name)
    assert gated_norm_kind(module) == kind
    x, gate = (3 * torch.randn(2, 1, 40, WIDTH)).bfloat16()
    own = module(x, gate)
    assert fuse_gated_norms(module) == 1
    torch.testing.assert_close(module(x, gate), own)
    assert not torch.equal(module(x, -gate), own)


@each_module
@torch.no_grad()
def test_a_row_depends_on_itself_alone_and_on_no_layout(name: str) -> None:
    module, kind = _made(name)
    x, gate = torch.randn(2, 50, WIDTH).bfloat16()
    whole = kind.fused(x, gate, module.weight)
    assert torch.equal(kind.fused(x[7], gate[7], module.weight), whole[7])
    part = torch.randn(50, 3 * WIDTH).bfloat16()[:, WIDTH : 2 * WIDTH]  # of a joined product
    assert torch.equal(kind.fused(x, part, module.weight), kind.fused(x, part.contiguous(), module.weight))


@torch.no_grad()
def test_float32_rows_take_weights_of_another_type() -> None:
    """Mamba-2's scan gives float32."""
    module, kind = _made("mamba2")
    x, gate = torch.randn(5, WIDTH), torch.randn(5, WIDTH).bfloat16()
    torch.testing.assert_close(kind.fused(x, gate, module.weight), module(x, gate))


def test_control_what_is_written_otherwise_is_left_alone() -> None:
    class Shifted(Qwen3_5RMSNormGated):
        def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
            return super().forward(hidden_states, gate) + 1  # type: ignore[no-any-return]

    module = Shifted(WIDTH)
    install_activations(module)
    assert gated_norm_kind(module) is None and fuse_gated_norms(module) == 0
