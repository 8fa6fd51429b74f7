"""A trainer's transformers model computes with the engine's kernels: the server's logits, bit for bit, with gradients.

The forward pass of every matrix product, norm, activation and of attention is the engine's; the backward pass is the
usual one, by PyTorch. Parameters, state dict and optimizer stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

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
from myserve.engine.batch_invariance.linear import PackedWeight
from myserve.engine.batch_invariance.patch import is_router
from myserve.engine.batch_invariance.rope_table import look_up_angles
from myserve.trainer.exact_attention import TRAINER_NAME, register_exact_attention

__all__ = ["exact_forward", "exact_linear"]


def exact_forward(model: PreTrainedModel, *, max_model_len: int | None = None) -> PreTrainedModel:
    """Make a CPU model compute, in place, exactly as the engine does on a CPU, and return it.

    `model(input_ids, attention_mask, position_ids)`, all [B, T], then gives logits [B, T, V] that at every real
    position are the engine's bit for bit, whether it prefilled or decoded the token, on any number of rows and
    threads; and they have gradients. Batches may be padded on either side; where they are on the left, `position_ids`
    must count real tokens alone. Dropout must be off (`model.eval()`): the engine has none. For the logits of sampled
    completions alone, `completion_logits` costs much less; `exact_logprobs` turns logits into the server's logprobs.

    `max_model_len`: the engine's, in tokens. It matters where RoPE depends on the longest context (LongRoPE as in
    Phi-3.5, dynamic NTK), and changes nothing for other models.

    Raises `ValueError` where a parameter is not on the CPU, and in the forward pass `RequestError` for a position
    beyond `max_model_len`, where that was given.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> size = dict(vocab_size=8, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2)
    >>> model = exact_forward(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **size)))
    >>> pair, alone = model(torch.tensor([[1, 2, 3], [4, 5, 6]])).logits, model(torch.tensor([[4, 5, 6]])).logits
    >>> torch.equal(pair[1], alone[0])
    True
    """
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise ValueError("exact_forward computes by kernels that run on a CPU alone; move the model there")
    vml_warmup.initialize()
    if max_model_len is not None:
        look_up_angles(model, max_model_len)
    register_exact_attention()
    ALL_EXPERTS_FUNCTIONS.register(TRAINER_NAME, _experts_forward)
    model.set_attn_implementation(TRAINER_NAME)
    install_activations(model, _activation)
    modules: list[Any] = list(model.modules())
    for module in modules:
        if type(module).forward is nn.Linear.forward:
            _replace_forward(module, lambda self, x: exact_linear(x, self.weight, self.bias))
        elif isinstance(module, Conv1D):
            _replace_forward(module, lambda self, x: exact_linear(x, self.weight.T, self.bias))
        elif (norm := norm_kind(module)) is not None:
            _replace_forward(module, _norm_forward(*norm))
        elif is_router(module):
            module.forward = _with_exact_products(module.forward)
        elif hasattr(module, "_is_expert_parallel"):
            module.config._experts_implementation = TRAINER_NAME
    return model


def _replace_forward(module: Any, forward: Callable[[Any, Tensor], Tensor]) -> None:
    module.forward = MethodType(forward, module)


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `F.linear(x, weight, bias)` with the engine's bits: x [..., K], weight [N, K], bias [N]; [..., N].

    >>> w = torch.ones(2, 3, requires_grad=True)
    >>> exact_linear(torch.ones(1, 3), w).sum().backward()
    >>> w.grad.shape
    torch.Size([2, 3])
    """
    out: Tensor = _LinearWithGradients.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


class _LinearWithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        # Packed anew each time: it is one pass over the weights, and a trainer changes them after every step.
        return PackedWeight(weight, bias)(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])  # [M, N]
        bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return grad @ weight, rows.T @ x.reshape(-1, x.shape[-1]), bias


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
    """Answers `F.linear`, which routers call themselves, by `exact_linear`."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (exact_linear if func is F.linear else func)(*args, **(kwargs or {}))


def _with_exact_products(forward: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _ExactProducts():
            return forward(*args, **kwargs)

    return wrapped


def _experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute as `patch.exact_experts_forward` does, in its order of sums, with gradients.

    hidden_states [T, D], top_k_index and top_k_weights [T, k]; gives [T, D].
    """
    parts = hidden_states.new_zeros(*top_k_index.shape, hidden_states.shape[-1], dtype=torch.float32)
    for expert in sorted(set(top_k_index.flatten().tolist())):
        token, slot = (top_k_index == expert).nonzero(as_tuple=True)
        inner = _expert_linear(
            module, "gate_up_proj" if module.has_gate else "up_proj", expert, hidden_states[token]
        )
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        outer = _expert_linear(module, "down_proj", expert, inner)
        if module.has_post_expert_norm:
            outer = module.post_expert_norm(outer)
        parts = parts.index_put((token, slot), (outer * top_k_weights[token, slot, None]).float())
    total = parts[:, 0]
    for j in range(1, parts.shape[1]):
        total = total + parts[:, j]
    return total.to(hidden_states.dtype)


def _expert_linear(module: Any, name: str, expert: int, x: Tensor) -> Tensor:
    weight, biases = getattr(module, name)[expert], getattr(module, f"{name}_bias", None)
    return exact_linear(
        x, weight.T if module.is_transposed else weight, None if biases is None else biases[expert]
    )
