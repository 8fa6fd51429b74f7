"""A mixture of experts in a trainer computes with the experts that the engine used: rollout routing replay (R3).

The router's own code runs, and only its choice is replaced: where it calls `topk`, the scores of the given experts
are gathered. So they are normalised as the model normalises them, and gradients flow into the router as always.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from myserve.engine.batch_invariance.own_matrices import is_router
from myserve.engine.outputs import RoutingShape
from myserve.engine.runner.routed_experts import moe_layers, routing_shape
from myserve.errors import RequestError, UnsupportedModelError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["OWN_CHOICE", "replay_routing"]

OWN_CHOICE = -1  # in place of an expert's id: the model chooses for this token, as for padding


@contextmanager
def replay_routing(
    model: PreTrainedModel, routing: Tensor | np.ndarray[Any, Any]
) -> Iterator[PreTrainedModel]:
    """Make `model` use the experts of `routing` instead of choosing its own, inside the block; yield the model.

    `routing`: integer expert ids [B, T, L, k], or [T, L, k] for one sequence or rows packed behind one another: for
    each token that the model is given, padding included, and each of its L layers with experts, the k experts used
    there. A token whose ids in a layer are all -1 is routed by the model itself: right for padding, and for positions
    whose routing is not known. `myserve.sdk.records.routing.aligned_routing` makes such rows of a sampled completion.

    Every forward pass inside the block must be of that batch; with gradient checkpointing, which runs it again, call
    `backward` inside too. It goes with `exact_forward`, with any dtype and device, and leaves nothing behind. Routers
    under `torch.compile` are not supported.

    Raises `RequestError` for ids that do not fit the model (on entering) or the batch (in the forward pass),
    `UnsupportedModelError` for a model without routers that choose by one `topk`. Source: Rollout Routing Replay,
    arXiv:2510.11370.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> size = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    >>> config = AutoConfig.for_model("mixtral", num_local_experts=4, num_key_value_heads=2, **size)
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> with replay_routing(model, torch.tensor([[[0, 1]], [[2, 3]], [[-1, -1]]])):  # 3 tokens, 1 layer, 2 experts
    ...     model(torch.tensor([[5, 6, 7]])).logits.shape
    torch.Size([1, 3, 8])
    """
    shape, routers = _shape_and_routers(model)
    ids = _checked(routing, shape)  # [N, L, k]
    with ExitStack() as stack:
        for layer, router in enumerate(routers):
            stack.enter_context(_replayed(router, ids[:, layer], shape.num_experts))
        yield model


def _shape_and_routers(model: Any) -> tuple[RoutingShape, list[nn.Module]]:
    shape = routing_shape(model)
    if shape is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no experts whose routing could be replayed")
    routers = []
    for block, experts in moe_layers(model):
        beside = [child for child in block.children() if child is not experts and is_router(child)]
        if len(beside) != 1:
            raise UnsupportedModelError(
                f"{type(block).__name__} has {len(beside)} routers where one was expected"
            )
        routers += beside
    return shape, routers


def _checked(routing: Tensor | np.ndarray[Any, Any], shape: RoutingShape) -> Tensor:
    """As int64 [N, L, k]."""
    ids = routing if isinstance(routing, Tensor) else torch.tensor(routing)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise RequestError(f"routing must hold integer expert ids, got {ids.dtype}", param="routing")
    wanted = (shape.num_moe_layers, shape.experts_per_token)
    if ids.dim() not in (3, 4) or ids.shape[-2:] != wanted:
        raise RequestError(
            f"routing must be [tokens, {wanted[0]}, {wanted[1]}] or [batch, tokens, {wanted[0]}, {wanted[1]}] for "
            f"this model (layers with experts, experts per token), got {list(ids.shape)}",
            param="routing",
        )
    ids = ids.long().flatten(0, -3)
    if ids.numel() and not (int(ids.min()) >= OWN_CHOICE and int(ids.max()) < shape.num_experts):
        raise RequestError(
            f"routing names experts {int(ids.min())} to {int(ids.max())}; this model's are 0 to "
            f"{shape.num_experts - 1}, and -1 leaves a token to the model",
            param="routing",
        )
    ordered = ids.sort(-1).values
    repeats = (ordered[..., 1:] == ordered[..., :-1]).any(-1) | (ordered[..., 0] == OWN_CHOICE)
    if bool((repeats & (ordered[..., -1] != OWN_CHOICE)).any()):
        raise RequestError(
            "routing must name different experts for a token in a layer, or -1 for all of them",
            param="routing",
        )
    return ids


@contextmanager
def _replayed(router: nn.Module, ids: Tensor, num_experts: int) -> Iterator[None]:
    """One layer's router, with its choices made: ids [N, k]."""
    running: list[tuple[ExitStack, _GivenTopK]] = []

    def enter(module: nn.Module, args: Any) -> None:
        entered = ExitStack()
        running.append((entered, entered.enter_context(_GivenTopK(ids, num_experts))))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        entered, given = running.pop()
        entered.close()
        # None: the router raised, and that error is raised
        if output is not None and given.calls != 1:
            raise UnsupportedModelError(
                f"{type(module).__name__} chose experts by topk {given.calls} times: only a router that does so once "
                "can be replayed"
            )

    # Hooks and not a new `forward`: `exact_forward` may have put one there, before or after.
    hooks = [router.register_forward_pre_hook(enter), router.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _GivenTopK(TorchFunctionMode):
    """`topk` over the experts' scores [N, E] gives the scores of `ids` [N, k]; over groups of experts it is itself."""

    def __init__(self, ids: Tensor, num_experts: int) -> None:
        super().__init__()
        self.calls = 0
        self._ids = ids
        self._num_experts = num_experts

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in (torch.topk, Tensor.topk) or args[0].shape[1:] != (self._num_experts,):
            return result
        self.calls += 1
        scores: Tensor = args[0]
        if scores.shape[0] != len(self._ids):
            raise RequestError(
                f"routing is of {len(self._ids)} tokens, and the model was given {scores.shape[0]}, padding included",
                param="routing",
            )
        ids = self._ids.to(scores.device)
        ids = torch.where(ids == OWN_CHOICE, result.indices, ids)
        return torch.return_types.topk((scores.gather(-1, ids), ids))
