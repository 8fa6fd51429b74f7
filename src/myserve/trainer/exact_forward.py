"""A trainer's transformers model computes with the engine's kernels: the server's logits, bit for bit, with gradients.

The forward pass of every matrix product, norm, activation and of attention is the engine's; the backward pass is the
usual one, by PyTorch. Parameters, state dict and optimizer stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from myserve.engine.batch_invariance import pointwise, vml_warmup
from myserve.engine.batch_invariance.activations import install_activations, reference
from myserve.engine.batch_invariance.fusion import NormKind, norm_kind
from myserve.engine.batch_invariance.gated_norms import GatedNormKind, gated_norm_kind
from myserve.engine.batch_invariance.grouped_linear import is_grouped_linear
from myserve.engine.batch_invariance.left_factors import MATMULS, multiplies_from_the_left, times_columns
from myserve.engine.batch_invariance.linear import PackedWeight
from myserve.engine.batch_invariance.own_matrices import own_matrices
from myserve.engine.batch_invariance.quantized import QuantizedWeight, can_quantize
from myserve.engine.batch_invariance.rope_table import look_up_angles
from myserve.engine.batch_invariance.scaled_experts import adopt_scaled_experts, weighted
from myserve.engine.mixers.indexed_attention import select_all
from myserve.engine.mixers.recurrent_functions import stand_before
from myserve.engine.mixers.row_positions import tell_positions
from myserve.errors import RequestError
from myserve.trainer.exact_adapters import add_expert_adapters, is_lora_layer, make_lora_exact
from myserve.trainer.exact_attention import TRAINER_NAME, register_exact_attention
from myserve.trainer.exact_recurrence import make_recurrent_layers_exact

__all__ = ["exact_forward", "exact_linear"]


Quantize = Literal["off", "int8"]


def exact_forward(
    model: PreTrainedModel, *, max_model_len: int | None = None, quantize: Quantize = "off"
) -> PreTrainedModel:
    """Make a CPU model compute, in place, exactly as the engine does on a CPU, and return it.

    `model(input_ids, attention_mask, position_ids)`, all [B, T], then gives logits [B, T, V] that at every real
    position are the engine's bit for bit, whether it prefilled or decoded the token, on any number of rows and
    threads; and they have gradients. Batches may be padded on either side; where they are on the left, `position_ids`
    must count real tokens alone. Dropout must be off (`model.eval()`): the engine has none. For the logits of sampled
    completions alone, `completion_logits` costs much less; `exact_logprobs` turns logits into the server's logprobs.

    `max_model_len`: the engine's, in tokens. It matters where RoPE depends on the longest context (LongRoPE as in
    Phi-3.5, dynamic NTK), and changes nothing for other models.

    `quantize`: the engine's. With "int8" the same layers compute in int8 as there, of the float weights that the model
    has at that moment, so a trainer on quantised rollouts has a mismatch of exactly 0. Gradients go straight through
    the rounding: they are those of the float layers, to the float weights.

    A model of PEFT (LoRA) has the bits of a server that serves its active adapter by name, and gradients to A and B. An
    adapter in float32 on a bfloat16 model is rounded to bfloat16 in the forward pass, as the server rounds it.

    Raises `ValueError` where a parameter is not on the CPU and for adapters that are not plain LoRA, and in the forward
    pass `RequestError` for a position beyond `max_model_len`, where that was given.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> size = dict(vocab_size=8, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2)
    >>> model = exact_forward(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **size)))
    >>> pair, alone = model(torch.tensor([[1, 2, 3], [4, 5, 6]])).logits, model(torch.tensor([[4, 5, 6]])).logits
    >>> torch.equal(pair[1], alone[0])
    True
    """
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise ValueError("exact_forward computes by kernels that run on a CPU alone; move the model there")
    if quantize not in ("off", "int8"):
        raise ValueError(f"quantize must be off or int8, got {quantize!r}")
    vml_warmup.initialize()
    if max_model_len is not None:
        look_up_angles(model, max_model_len)
    register_exact_attention()
    experts = TRAINER_NAME if quantize == "off" else f"{TRAINER_NAME}_{quantize}"
    ALL_EXPERTS_FUNCTIONS.register(experts, partial(_experts_forward, quantize=quantize))
    model.set_attn_implementation(TRAINER_NAME)
    adopt_scaled_experts(model)
    tell_positions(model)
    select_all(model)
    stand_before(model)
    install_activations(model, _activation)
    make_recurrent_layers_exact(model)
    modules: list[Any] = list(model.modules())
    for module in modules:
        if is_lora_layer(module):
            make_lora_exact(module, exact_linear)
        elif type(module).forward is nn.Linear.forward:
            _replace_forward(
                module, lambda self, x: exact_linear(x, self.weight, self.bias, quantize=quantize)
            )
        elif isinstance(module, Conv1D):
            _replace_forward(
                module, lambda self, x: exact_linear(x, self.weight.T, self.bias, quantize=quantize)
            )
        elif (norm := norm_kind(module)) is not None:
            _replace_forward(module, _norm_forward(*norm))
        elif (gated := gated_norm_kind(module)) is not None:
            module.forward = MethodType(_gated_norm_forward(module.forward, gated), module)
        elif own_matrices(module):
            module.forward = _under(_ExactProducts("off"), module.forward)
        elif is_grouped_linear(module):
            module.forward = _under(_ExactProducts(quantize), module.forward)
        elif multiplies_from_the_left(module):
            module.forward = _under(_ExactLeftProducts(quantize), module.forward)
        elif hasattr(module, "_is_expert_parallel"):
            module.config._experts_implementation = experts
    return model


def _replace_forward(module: Any, forward: Callable[[Any, Tensor], Tensor]) -> None:
    module.forward = MethodType(forward, module)


def exact_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, quantize: Quantize = "off"
) -> Tensor:
    """Return `F.linear(x, weight, bias)` with the engine's bits: x [..., K], weight [N, K], bias [N]; [..., N].

    `quantize`: "int8" for the bits of an engine that quantises. Gradients are those of the float product either way.
    Raises RequestError for tensors that are not on a CPU, are not of floating point, or whose shapes do not fit.

    >>> w = torch.ones(2, 3, requires_grad=True)
    >>> exact_linear(torch.ones(1, 3), w).sum().backward()
    >>> w.grad.shape
    torch.Size([2, 3])
    >>> exact_linear(torch.ones(1, 4), w)
    Traceback (most recent call last):
    ...
    myserve.errors.RequestError: x of shape [1, 4] does not fit weight [2, 3]: its last dimension must be 3
    """
    _check_linear(x, weight, bias)
    quantizes = quantize == "int8" and can_quantize(weight.shape[1])
    out: Tensor = _LinearWithGradients.apply(x, weight, bias, quantizes)  # type: ignore[no-untyped-call]
    return out


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise RequestError for what the kernel would read beyond, or read as another type."""
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.device.type != "cpu" or not tensor.is_floating_point()):
            raise RequestError(
                f"{name} is {tensor.dtype} on {tensor.device}: exact_linear takes floating point on a CPU",
                param=name,
            )
    if weight.dim() != 2:
        raise RequestError(f"weight must be [out, in], got {list(weight.shape)}", param="weight")
    out_features, in_features = weight.shape
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise RequestError(
            f"x of shape {list(x.shape)} does not fit weight {list(weight.shape)}: its last dimension must be "
            f"{in_features}",
            param="x",
        )
    if bias is not None and bias.shape != (out_features,):
        raise RequestError(
            f"bias of shape {list(bias.shape)} does not fit weight {list(weight.shape)}: it must be [{out_features}]",
            param="bias",
        )


class _LinearWithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, quantizes: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        # Packed anew each time: it is one pass over the weights, and a trainer changes them after every step.
        return (QuantizedWeight if quantizes else PackedWeight)(weight, bias)(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])  # [M, N]
        bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return grad @ weight, rows.T @ x.reshape(-1, x.shape[-1]), bias, None


def _norm_forward(kind: NormKind, eps: float) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        out: Tensor = _Norm.apply(x, self.weight, kind, eps)  # type: ignore[no-untyped-call]
        return out

    return forward


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kind: NormKind, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.kind, ctx.eps = kind, eps
        return pointwise.rms_norm(x, weight, eps, offset=kind.offset, rounds_first=kind.rounds_first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = (saved.detach().requires_grad_() for saved in ctx.saved_tensors)
        with torch.enable_grad():
            out = ctx.kind.reference(x, weight, ctx.eps)
            return *torch.autograd.grad(out, (x, weight), grad), None, None


def _gated_norm_forward(theirs: Callable[..., Tensor], kind: GatedNormKind) -> Callable[..., Tensor]:
    def forward(self: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is None:
            return theirs(hidden_states)
        out: Tensor = _GatedNorm.apply(hidden_states, gate, self.weight, kind)  # type: ignore[no-untyped-call]
        return out

    return forward


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, kind: GatedNormKind) -> Tensor:
        ctx.save_for_backward(x, gate, weight)
        ctx.kind = kind
        return kind.fused(x, gate, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = tuple(tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        with torch.enable_grad():
            return *torch.autograd.grad(ctx.kind.reference(*saved), saved, grad), None


def _activation(name: str, x: Tensor) -> Tensor:
    out: Tensor = _Activation.apply(name, x)  # type: ignore[no-untyped-call]
    return out


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.name = name
        return pointwise.activation(name, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            return None, torch.autograd.grad(reference(ctx.name)(x), x, grad)[0]


class _ExactProducts(TorchFunctionMode):
    """Answers `F.linear`, which routers and others call themselves, by `exact_linear`."""

    def __init__(self, quantize: Quantize) -> None:
        super().__init__()
        self._linear = partial(exact_linear, quantize=quantize)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (self._linear if func is F.linear else func)(*args, **(kwargs or {}))


class _ExactLeftProducts(TorchFunctionMode):
    """Answers `weight @ x`, as Mamba-1's layers multiply, by `exact_linear`: [N, K] by [B, K, T], or for each head."""

    def __init__(self, quantize: Quantize) -> None:
        super().__init__()
        self._quantize = quantize

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in MATMULS:
            return func(*args, **(kwargs or {}))
        weight, x = args
        if weight.dim() == 2:
            return times_columns(partial(exact_linear, weight=weight, quantize=self._quantize), x)
        heads = zip(weight[:, 0], x, strict=True)
        return torch.stack([times_columns(partial(exact_linear, weight=head), own) for head, own in heads])


def _under(mode: TorchFunctionMode, forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return forward(*args, **kwargs)

    return wrapped


def _experts_forward(
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    quantize: Quantize = "off",
) -> Tensor:
    """Compute as `patch.exact_experts_forward` does, in its order of sums, with gradients.

    hidden_states [T, D], top_k_index and top_k_weights [T, k]; gives [T, D].
    """
    parts = hidden_states.new_zeros(*top_k_index.shape, hidden_states.shape[-1], dtype=torch.float32)
    for expert in sorted(set(top_k_index.flatten().tolist())):
        token, slot = (top_k_index == expert).nonzero(as_tuple=True)
        up = "gate_up_proj" if module.has_gate else "up_proj"
        x, weights = weighted(module, hidden_states[token], top_k_weights[token, slot, None])
        inner = _expert_linear(module, up, expert, x, quantize)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        outer = _expert_linear(module, "down_proj", expert, inner, quantize)
        if module.has_post_expert_norm:
            outer = module.post_expert_norm(outer)
        given = outer if weights is None else outer * weights
        parts = parts.index_put((token, slot), given.float())
    total = parts[:, 0]
    for j in range(1, parts.shape[1]):
        total = total + parts[:, j]
    return total.to(hidden_states.dtype)


def _expert_linear(module: Any, name: str, expert: int, x: Tensor, quantize: Quantize) -> Tensor:
    weight, biases = getattr(module, name)[expert], getattr(module, f"{name}_bias", None)
    weight, bias = weight.T if module.is_transposed else weight, None if biases is None else biases[expert]
    y = exact_linear(x, weight, bias, quantize=quantize)
    return add_expert_adapters(module, name, expert, x, y, exact_linear)
