"""The trainer's side of the examples: a transformers model that computes as the engine does, and its optimizer."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from myserve import completion_logits, exact_forward, exact_logprobs
from myserve.sdk import SampledCompletion
from myserve.sdk.records.routing import aligned_routing

WARMUP = 40  # updates: Adam's first ones go a whole learning rate in the direction of a single batch's noise


class Policy:
    """A model in training. Its logprobs are the server's, bit for bit, for the same weights."""

    def __init__(
        self,
        model: str,
        learning_rate: float,
        *,
        replay: bool = False,
        quantize: Literal["off", "int8"] = "off",
    ) -> None:
        disable_progress_bar()  # the run's own display is enough
        torch.use_deterministic_algorithms(True)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        load: Any = AutoModelForCausalLM.from_pretrained
        self._replay = replay
        self.model: Any = exact_forward(load(model, dtype=torch.float32).eval(), quantize=quantize)
        start = load(model, dtype=torch.float32).eval().requires_grad_(False)
        self._start = exact_forward(start, quantize=quantize)
        self._learning_rate, self._updates = learning_rate, 0
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98)
        )

    def logprobs(
        self, samples: Sequence[SampledCompletion], *, temperature: float = 1.0, kept: bool = False
    ) -> Tensor:
        """Return logprobs of every completion token of the samples, one after the other: [N], with gradients.

        `kept`: over the support of each draw, as the server reported it.
        """
        return self._logprobs(self.model, samples, temperature, kept)

    def _logprobs(
        self, model: Any, samples: Sequence[SampledCompletion], temperature: float = 1.0, kept: bool = False
    ) -> Tensor:
        prompts, completions = (
            [getattr(s, f"{part}_tokens") for s in samples] for part in ("prompt", "completion")
        )
        # Each token to the experts that the server used for it, where that is asked for.
        routing = [aligned_routing(sample) for sample in samples] if self._replay else None
        logits = completion_logits(model, prompts, completions, routing=routing)  # [N, V]
        drawn = torch.tensor([token for tokens in completions for token in tokens])
        support = [entry["token_ids"] for s in samples for entry in s.kept or ()] if kept else None
        return exact_logprobs(logits, drawn, temperature=temperature, kept=support)

    @torch.no_grad()
    def kl_to_start(self, samples: Sequence[SampledCompletion], logprobs: Tensor) -> float:
        """Return the KL (k3, nats a token) from the model that the policy began as."""
        d = self._logprobs(self._start, samples) - logprobs
        return float((d.exp() - 1 - d).mean())

    def step(self, loss: Tensor) -> None:
        """Take one step of the optimizer, the gradient clipped to norm 1."""
        self._updates += 1
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate * min(1.0, self._updates / WARMUP)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()

    def save(self, folder: Path) -> None:
        """Write the weights as safetensors, whole or not at all: beside, then renamed."""
        beside = folder.with_name(folder.name + ".new")
        shutil.rmtree(beside, ignore_errors=True)
        self.model.save_pretrained(beside)
        shutil.rmtree(folder, ignore_errors=True)
        beside.replace(folder)
