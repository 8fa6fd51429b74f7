"""A trainer as it is elsewhere: transformers' own forward of a padded batch. The control of every zero."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from myserve import replay_routing
from myserve.sdk import SampledCompletion
from myserve.sdk.records.routing import aligned_routing

Rows = list[list[float]]


@torch.no_grad()
def plain_logprobs(
    model: str,
    samples: Sequence[SampledCompletion],
    *,
    dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
    replay: bool = False,
) -> Rows:
    """Return logprobs of each sample's completion tokens. `replay`: a mixture of experts uses the server's experts."""
    load: Any = AutoModelForCausalLM.from_pretrained
    trainer = load(model, dtype=dtype).eval()
    ids = pad_sequence([torch.tensor(s.full_tokens) for s in samples], batch_first=True)  # [B, T]
    mask = pad_sequence([torch.ones(len(s.full_tokens)) for s in samples], batch_first=True)
    experts = [torch.tensor(aligned_routing(s)) for s in samples] if replay else []  # each [T, layers, k]
    given = replay_routing(trainer, pad_sequence(experts, True, -1)) if replay else nullcontext()
    with given:
        logits = trainer(input_ids=ids, attention_mask=mask, use_cache=False).logits.float() / temperature
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]  # [B, T - 1]
    return [
        row[s.prompt_len - 1 : len(s.full_tokens) - 1].tolist()
        for row, s in zip(logprobs, samples, strict=True)
    ]
