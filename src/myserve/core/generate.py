"""The plain loop over a bare Hugging Face model, no cache: the oracle that the engine is held to."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor, nn

from myserve.core.sampling import SamplerCfg, sample_next

__all__ = ["Step", "greedy_generate", "sample_generate"]


class Step(TypedDict, total=False):
    """One row's token at one step, as the original specification's payload has it."""

    id: int
    logprob: float
    top_logprobs: list[tuple[int, float]]


@torch.inference_mode()
def greedy_generate(
    model: nn.Module,
    input_ids: Tensor,  # [B, T], no padding
    max_new_tokens: int,
    eos_token_id: int | None = None,
) -> Tensor:
    """`input_ids` with the likeliest token appended at every step, [B, T + new]; see `sample_generate`."""
    return sample_generate(model, input_ids, max_new_tokens, eos_token_id, SamplerCfg(temperature=0.0))[0]


@torch.inference_mode()
def sample_generate(
    model: nn.Module,
    input_ids: Tensor,  # [B, T], no padding
    max_new_tokens: int,
    eos_token_id: int | None,
    cfg: SamplerCfg,
    gen: torch.Generator | None = None,
    collect_logprobs: bool = False,
) -> tuple[Tensor, list[list[Step]]]:
    """(ids [B, T + new], per_step): per_step[t][b] tells of row b's token at step t, where asked for.

    Draws what `transformers.generate(do_sample=True)` draws from the same generator state. A row that has
    given `eos_token_id` is padded with it while others go on. Penalties count the completion, never the
    prompt.
    """
    model.eval()
    out = input_ids
    per_step: list[list[Step]] = []
    going = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    for _ in range(max_new_tokens):
        logits = model(out).logits[:, -1, :]  # [B, V]
        next_ids, chosen, logprobs = sample_next(logits, cfg, out[:, input_ids.shape[1] :], gen)
        if eos_token_id is not None:
            next_ids = torch.where(going, next_ids, eos_token_id)
            going &= next_ids != eos_token_id
        out = torch.cat((out, next_ids.unsqueeze(1)), dim=1)
        if collect_logprobs:
            per_step.append(_steps(next_ids, chosen, logprobs, cfg.top_logprobs))
        if not going.any():
            break
    return out, per_step


def _steps(next_ids: Tensor, chosen: Tensor, logprobs: Tensor, k: int) -> list[Step]:
    steps: list[Step] = [
        {"id": token_id, "logprob": logprob}
        for token_id, logprob in zip(next_ids.tolist(), chosen.tolist(), strict=True)
    ]
    if k:
        best = logprobs.topk(min(k, logprobs.shape[-1]))
        for step, ids, values in zip(steps, best.indices.tolist(), best.values.tolist(), strict=True):
            # an alternative that is out of the support is not listed: JSON has no -inf
            listed = zip(ids, values, strict=True)
            step["top_logprobs"] = [(i, value) for i, value in listed if value > -torch.inf]
    return steps
