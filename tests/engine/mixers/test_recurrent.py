"""Recurrences and convolutions: transformers' own numbers, in one order however a sequence is cut."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers.models.bailing_hybrid import modeling_bailing_hybrid
from transformers.models.bamba import modeling_bamba
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.mamba import modeling_mamba
from transformers.models.qwen3_next import modeling_qwen3_next

from myserve.engine.mixers.recurrent import (
    Convolution,
    Mixing,
    Recurrence,
    SelectiveScan,
    StateRows,
    whole_sequences,
)

T, CUTS = 45, (0, 1, 8, 24, 25, 45)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 0.03}


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def whole(mixing: Mixing) -> Tensor:
    return mixing.compute(None, whole_sequences(ints(0, T)))


def made(kind: str, dtype: torch.dtype, key_dim: int = 12, value_dim: int = 20) -> Mixing:
    torch.manual_seed(1)
    if kind in ("convolution", "wide convolution"):  # of weights in float32, whatever the rows are
        kept = dtype if kind == "convolution" else torch.float32
        weight, bias = torch.randn(300, 4).to(kept), torch.randn(300).to(kept)
        return Convolution(torch.randn(T, 300).to(dtype), weight, bias, is_silu=True)
    if kind == "selective":
        return selective(dtype, key_dim, 100)
    query, key = (torch.randn(T, 2, key_dim).to(dtype) for _ in range(2))
    shape = (T, 4, key_dim) if kind == "kda" else (T, 4)
    decay, beta, value = -2 * torch.rand(shape), torch.rand(T, 4), torch.randn(T, 4, value_dim).to(dtype)
    if kind == "scan":
        return Recurrence(
            query, key, value, decay, beta, 1.0, is_delta=False, skip=torch.rand(4), out_is_wide=True
        )
    return Recurrence(query, key, value, decay, beta, key_dim**-0.5, is_delta=True, is_normed=True)


def selective(dtype: torch.dtype, size: int, channels: int) -> SelectiveScan:
    """Of rows as a layer has them: parts of joined products, and channels behind one another in time."""
    joined = torch.randn(T, 2 * channels).to(dtype)
    x, step = (torch.randn(channels, T).to(dtype).T for _ in range(2))
    key, query = torch.randn(T, 3 * size).to(dtype)[:, size:].split(size, dim=1)
    rate, bias = -4 * torch.rand(channels, size), torch.randn(channels).to(dtype).float()
    return SelectiveScan(x, step, joined[:, channels:], key, query, rate, bias, torch.rand(channels))


ROWS_OF: dict[type, tuple[str, ...]] = {
    Convolution: ("x",),
    Recurrence: ("query", "key", "value", "decay", "beta"),
    SelectiveScan: ("x", "step", "gate", "key", "query"),
}


def part(mixing: Mixing, start: int, end: int) -> Mixing:
    names = ROWS_OF[type(mixing)]
    return replace(mixing, **{name: getattr(mixing, name)[start:end] for name in names})  # type: ignore[type-var]


KINDS = pytest.mark.parametrize(
    "kind", ["convolution", "wide convolution", "delta", "kda", "scan", "selective"]
)


@DTYPES
@KINDS
def test_cut_anywhere_a_sequence_has_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    mixing = made(kind, dtype)
    states, parts = mixing.state.allocate(2), []
    states.fill_(float("nan"))  # what an earlier request has left is never read
    for number, (start, end) in enumerate(pairwise(CUTS)):
        rows = StateRows(ints(0, end - start), ints(end), ints(number % 2), ints(1 - number % 2))
        parts.append(part(mixing, start, end).compute(states, rows))
        again = part(mixing, start, end).compute(states, rows)
        assert torch.equal(again, parts[-1]), "a step that is run again is another one"
    assert torch.equal(torch.cat(parts), whole(mixing))
    control = part(mixing, CUTS[-2], T).compute(None, whole_sequences(ints(0, T - CUTS[-2])))
    assert not torch.equal(control, parts[-1]), "the control: without its state"


@KINDS
@pytest.mark.parametrize("threads", [1, 3])
def test_beside_others_a_sequence_has_the_same_bits(kind: str, threads: int) -> None:
    mixing, before = made(kind, torch.bfloat16), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows = whole_sequences(ints(0, 7, 7, 20, 43))  # four requests, one without rows, and padding rows
        together = mixing.compute(None, rows)
    finally:
        torch.set_num_threads(before)
    for start, end in ((0, 7), (7, 20), (20, 43)):
        alone = part(mixing, start, end).compute(None, whole_sequences(ints(0, end - start)))
        assert torch.equal(together[start:end], alone)
    assert not together[43:].any(), "padding rows are zeros"


@DTYPES
@pytest.mark.parametrize("sizes", [(12, 20), (16, 128), (7, 80), (5, 3), (24, 33), (8, 48)], ids=str)
def test_the_delta_rule_is_transformers(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    for kind in ("delta", "kda"):
        m = made(kind, dtype, *sizes)
        assert isinstance(m, Recurrence)
        key, query = (x.repeat_interleave(2, dim=1) for x in (m.key, m.query))
        theirs = (
            modeling_qwen3_next.torch_recurrent_gated_delta_rule
            if kind == "delta"
            else modeling_kimi_linear.recurrent_kimi_delta_attention
        )
        given = [x[None] for x in (query, key, m.value, m.decay, m.beta)]
        wanted, _ = theirs(*given, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=True)
        assert torch.allclose(whole(m).float(), wanted[0].float(), atol=CLOSE[dtype], rtol=CLOSE[dtype])


@DTYPES
def test_the_scan_is_transformers(dtype: torch.dtype) -> None:
    m = made("scan", dtype)
    assert isinstance(m, Recurrence) and m.skip is not None
    rates = torch.rand(4) + 0.1
    m = replace(m, decay=-rates * m.beta)
    wanted = modeling_bamba.mamba2_chunk_scan(
        m.value[None], m.beta[None], -rates, m.key[None], m.query[None], chunk_size=16, D=m.skip
    )
    assert torch.allclose(whole(m), wanted[0].float(), atol=1e-4, rtol=1e-3)


@DTYPES
@pytest.mark.parametrize(("size", "channels"), [(16, 64), (16, 130), (5, 3), (1, 200)])
def test_the_selective_scan_is_transformers(dtype: torch.dtype, size: int, channels: int) -> None:
    m = selective(dtype, size, channels)
    rows = [x.T[None] for x in (m.x, m.step)]
    wanted = modeling_mamba.mamba_selective_scan(
        *rows, m.rate, m.key.T[None], m.query.T[None], D=m.skip, z=m.gate.T[None], delta_bias=m.bias,
        delta_softplus=True,
    )  # fmt: skip
    assert torch.allclose(whole(m).float(), wanted[0].T.float(), atol=5 * CLOSE[dtype], rtol=CLOSE[dtype])


def test_a_scan_decays_to_nothing_and_keeps_what_is_not_a_number() -> None:
    m = selective(torch.float32, 4, 70)
    m.step[3:], m.x[:, 69] = 1e4, float("nan")
    m = replace(m, gate=torch.full_like(m.gate, 10.0))
    out = whole(m)
    assert out[:, 69].isnan().all() and not out[:, :69].isnan().any()
    forgotten = part(m, 5, T).compute(None, whole_sequences(ints(0, T - 5)))
    assert torch.equal(out[5:, :69], forgotten[:, :69]), "a step so long leaves nothing of what was before it"


@DTYPES
@pytest.mark.parametrize("channels", [1, 16, 300])
def test_the_convolution_is_transformers(dtype: torch.dtype, channels: int) -> None:
    m = made("convolution", dtype)
    assert isinstance(m, Convolution) and m.bias is not None
    m = Convolution(m.x[:, :channels], m.weight[:channels], m.bias[:channels], m.is_silu)
    wanted = modeling_qwen3_next.causal_conv1d_fn(m.x.T[None], m.weight, m.bias, activation="silu")
    assert torch.allclose(whole(m).float(), wanted[0].T.float(), atol=CLOSE[dtype], rtol=CLOSE[dtype])


def test_a_convolution_by_float32_weights_rounds_once_at_its_end() -> None:
    m = made("wide convolution", torch.bfloat16)
    assert isinstance(m, Convolution) and m.bias is not None and m.state.dtype == torch.float32
    theirs = modeling_bailing_hybrid.causal_conv1d_fn(m.x.T[None], m.weight, m.bias, activation="silu")
    rounded, wanted = whole(m), theirs[0].T
    assert rounded.dtype == wanted.dtype == torch.bfloat16
    assert (rounded == wanted).float().mean() > 0.999, "but where a sum lies between two roundings"
    early = replace(m, weight=m.weight.bfloat16(), bias=m.bias.bfloat16())
    assert (whole(early) == wanted).float().mean() < 0.9, "the control: weights that are rounded before"


def test_what_does_not_fit_raises_before_memory_is_touched() -> None:
    m, rows = made("delta", torch.float32), whole_sequences(ints(0, T))
    assert isinstance(m, Recurrence)
    for wrong in (
        replace(m, beta=m.beta[:-1]),
        replace(m, decay=m.decay.double()),
        replace(m, key=m.key[:, :1].expand(-1, 3, -1), query=m.query[:, :1].expand(-1, 3, -1)),
        replace(m, value=m.value.half()),
        replace(m, decay=m.decay[..., None].expand(-1, -1, 5)),
    ):
        with pytest.raises(ValueError, match=r"not|share|neither"):
            wrong.compute(None, rows)
    scan = selective(torch.float32, 4, 70)
    for name in ("x", "step", "gate", "key", "query", "rate", "bias", "skip"):
        # against rows of x everything is measured: where x is wrong the next is named
        with pytest.raises(ValueError, match=name if name != "x" else "step"):
            replace(scan, **{name: getattr(scan, name)[:-1]}).compute(None, rows)
    with pytest.raises(ValueError, match="states"):
        m.compute(torch.zeros(2, 3), rows)
    with pytest.raises(ValueError, match="read"):
        m.compute(None, replace(rows, read=rows.read.long()))
