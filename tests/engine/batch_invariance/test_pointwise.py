"""RMSNorm, RoPE and sums: right beside PyTorch's, and each row a function of itself."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from myserve.engine.batch_invariance import pointwise
from myserve.engine.batch_invariance.fusion import NormKind

DTYPES = [torch.float32, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
KINDS = [NormKind(0.0, True), NormKind(0.0, False), NormKind(1.0, False)]


@each_dtype
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("width", [8, 48, 77])
def test_a_norm_is_the_models_own(dtype: torch.dtype, kind: NormKind, width: int) -> None:
    x, weight = (5 * torch.randn(40, width)).to(dtype), torch.randn(width).to(dtype)
    ours = pointwise.rms_norm(x, weight, 1e-6, offset=kind.offset, rounds_first=kind.rounds_first)
    torch.testing.assert_close(ours, kind.reference(x, weight, 1e-6))


def test_a_norm_of_float32_takes_weights_of_another_type() -> None:
    """Mamba's last norm: its residual is float32, whatever the model is."""
    x, weight = torch.randn(40, 48), torch.randn(48).bfloat16()
    ours = pointwise.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(ours, NormKind(0.0, True).reference(x, weight, 1e-5))
    with pytest.raises(ValueError, match="not computed"):
        pointwise.rms_norm(x.bfloat16(), weight.float(), 1e-5)


@each_dtype
def test_a_norms_row_depends_on_itself_alone_and_on_no_layout(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 50, 4, 24).to(dtype), torch.randn(24).to(dtype)
    whole = pointwise.rms_norm(x, weight, 1e-5)
    assert torch.equal(pointwise.rms_norm(x[1, 7, 2], weight, 1e-5), whole[1, 7, 2])
    wide = torch.randn(1, 50, 200).to(dtype)
    heads = wide[..., 64:160].view(1, 50, 4, 24)  # a part of a joined product
    assert torch.equal(
        pointwise.rms_norm(heads, weight, 1e-5), pointwise.rms_norm(heads.contiguous(), weight, 1e-5)
    )


@each_dtype
def test_rotary_angles_have_the_bits_of_transformers(dtype: torch.dtype) -> None:
    query, key = (torch.randn(1, 33, heads, 16).to(dtype).transpose(1, 2) for heads in (6, 2))
    cosine, sine = torch.randn(2, 1, 33, 16).to(dtype)
    theirs = apply_rotary_pos_emb(query, key, cosine, sine)
    ours = pointwise.rotate(query[0], key[0], cosine[0], sine[0])
    assert all(torch.equal(a[0], b) for a, b in zip(theirs, ours, strict=True))
    assert not torch.equal(ours[0], query[0])


def test_float16_goes_by_way_of_float32() -> None:
    x = torch.randn(4, 8).half()
    assert not pointwise.is_ours(x)
    assert torch.equal(pointwise.activation("silu", x, x), pointwise.activation("silu", x.float()).half() * x)


@each_dtype
def test_a_sum_has_pytorchs_bits(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 3, 45, 19).to(dtype)
    assert torch.equal(pointwise.add(a, b), a + b)
