"""The trainer's side of the examples: a transformers model that computes as the engine does, and its optimizer."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from myserve import exact_forward, exact_logprobs, replay_routing
from myserve.sdk import SampledCompletion
from myserve.sdk.routing import aligned_routing

WARMUP = 40  # updates: Adam's first ones go a whole learning rate in the direction of a single batch's noise


class Policy:
    """A model in training. Its logprobs are the server's, bit for bit, for the same weights."""

    def __init__(
        self,
        model: str,
        learning_rate: float,
        *,
        exact: bool = True,
        replay: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.use_deterministic_algorithms(True)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        load: Any = AutoModelForCausalLM.from_pretrained
        self._exact, self._replay = exact, replay
        self.model: Any = self._wrapped(load(model, dtype=dtype).eval())
        self._start = self._wrapped(load(model, dtype=dtype).eval().requires_grad_(False))
        self._learning_rate, self._updates = learning_rate, 0
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98)
        )

    def _wrapped(self, model: Any) -> Any:
        return exact_forward(model) if self._exact else model

    def logprobs(
        self, samples: Sequence[SampledCompletion], *, temperature: float = 1.0, kept: bool = False
    ) -> Tensor:
        """Of every completion token of the samples, one after the other: [N], with gradients.

        `kept`: over the support of each draw, as the server reported it.
        """
        return self._logprobs(self.model, samples, temperature, kept)

    def _logprobs(
        self, model: Any, samples: Sequence[SampledCompletion], temperature: float = 1.0, kept: bool = False
    ) -> Tensor:
        width = max(len(sample.full_tokens) for sample in samples)
        ids = torch.tensor([s.full_tokens + [0] * (width - len(s.full_tokens)) for s in samples])
        mask = torch.tensor([[1] * len(s.full_tokens) + [0] * (width - len(s.full_tokens)) for s in samples])
        with self._routed(model, samples, width):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # [B, width, V]
        rows = [
            logits[i, s.prompt_len - 1 : len(s.full_tokens) - 1] for i, s in enumerate(samples)
        ]  # the logits before each completion token
        drawn = torch.tensor([token for s in samples for token in s.completion_tokens])
        support = [entry["token_ids"] for s in samples for entry in s.kept or ()] if kept else None
        return exact_logprobs(torch.cat(rows), drawn, temperature=temperature, kept=support)

    def _routed(
        self, model: Any, samples: Sequence[SampledCompletion], width: int
    ) -> AbstractContextManager[object]:
        """Each token to the experts that the server used for it, where that is asked for."""
        if not self._replay:
            return nullcontext()
        rows = [torch.tensor(aligned_routing(sample)) for sample in samples]  # each [T, layers, k]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        return replay_routing(model, padded[:, :width])

    @torch.no_grad()
    def kl_to_start(self, samples: Sequence[SampledCompletion], logprobs: Tensor) -> float:
        """How far the policy has gone from the model that it began as: k3, in nats a token."""
        d = self._logprobs(self._start, samples) - logprobs
        return float((d.exp() - 1 - d).mean())

    def step(self, loss: Tensor) -> None:
        """One step of the optimizer, the gradient clipped to length 1."""
        self._updates += 1
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate * min(1.0, self._updates / WARMUP)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()

    def save(self, folder: Path) -> None:
        """The weights as safetensors, whole or not at all: written beside, then renamed."""
        beside = folder.with_name(folder.name + ".new")
        shutil.rmtree(beside, ignore_errors=True)
        self.model.save_pretrained(beside)
        shutil.rmtree(folder, ignore_errors=True)
        beside.replace(folder)
