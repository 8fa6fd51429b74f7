"""What each request must give: a plain loop over a trainer's model, one row, no cache, no batch, tensor code alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.combine.cases import Case
from benchmarks.combine.tiny import CONTEXT, EOS, VOCAB_SIZE
from myserve.core.generate import sample_generate
from myserve.core.params import SamplingParams
from myserve.core.rows import RowState
from myserve.core.sampling import Sampled, Sampler, SamplerCfg
from myserve.core.stopping import StopIds
from myserve.engine.constraints.factory import Constraints
from myserve.trainer.exact_forward import exact_forward

__all__ = ["Oracle", "PlainToken"]

HAIR = 1e-4  # nats that transformers' own kernels may differ by
EDITS = ("allowed_token_ids", "bad_words_ids", "logit_bias", "min_tokens", "grammar")


@dataclass(frozen=True)
class PlainToken:
    """One token of the loop, with the numbers that the server must report."""

    token_id: int
    logprob: float
    sampling_logprob: float


class Oracle:
    """The plain loop over one model's folder."""

    def __init__(self, folder: Path, constraints: Constraints) -> None:
        load = AutoModelForCausalLM.from_pretrained
        self._exact = exact_forward(load(folder).eval())
        self._theirs = load(folder).eval()
        self._constraints = constraints

    @torch.inference_mode()
    def completion(
        self, prompt: list[int], params: SamplingParams, *, sample_index: int, num_prior_tokens: int
    ) -> list[PlainToken] | str:
        """Return the tokens of one choice without regard to stop strings; or the words of its row's error."""
        room = CONTEXT - len(prompt)
        limit = room if params.max_tokens is None else params.max_tokens
        begun = len(prompt) - num_prior_tokens
        row = RowState(
            params,
            seed=params.seed or 0,
            sample_index=sample_index,
            prompt_token_ids=prompt[:begun],
            completion_token_ids=prompt[begun:],
            vocab_size=VOCAB_SIZE,
            eos_token_ids=[EOS],
            constraint=self._constraints.begin(params, limit, prompt[begun:]),
        )
        ends = StopIds(
            eos_token_ids=[EOS], stop_token_ids=params.stop_token_ids, ignore_eos=params.ignore_eos
        )
        sampler, ids, drawn = Sampler(compiled=False), list(prompt), list[PlainToken]()
        while len(drawn) < limit:
            logits = self._exact(torch.tensor([ids])).logits[:, -1]
            [outcome] = sampler.sample(logits, [row])
            if not isinstance(outcome, Sampled):
                return str(outcome)
            row.append(outcome.token_id)
            ids.append(outcome.token_id)
            drawn.append(PlainToken(outcome.token_id, outcome.logprob, outcome.sampling_logprob))
            if outcome.token_id in ends or len(ids) == CONTEXT:
                break
        return drawn

    @torch.inference_mode()
    def likeliest(self, prompt: list[int], ids: list[int]) -> bool:
        """Whether each id is transformers' own argmax after those before it, within a hair."""
        logits = self._theirs(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        drawn = logits.gather(1, torch.tensor(ids).unsqueeze(1))[:, 0]
        return bool((logits.amax(-1) - drawn <= HAIR).all())

    def original(self, prompt: list[int], params: SamplingParams) -> list[int]:
        """Return what the original specification's loop, `sample_generate`, draws from the same generator."""
        cfg = SamplerCfg(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
        )
        noise = torch.Generator().manual_seed((params.seed or 0) & (2**64 - 1))
        limit = min(params.max_tokens or CONTEXT, CONTEXT - len(prompt))
        ids, _ = sample_generate(self._exact, torch.tensor([prompt]), limit, EOS, cfg, noise)
        return list(ids[0, len(prompt) :].tolist())


def is_greedy(params: SamplingParams) -> bool:
    """Whether each token must be the model's own argmax."""
    plain = SamplingParams()
    untouched = all(getattr(params, name) == getattr(plain, name) for name in EDITS)
    penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
    return params.temperature == 0.0 and untouched and penalties == (1.0, 0.0, 0.0)


def is_of_the_original(params: SamplingParams, case: Case) -> bool:
    """Whether `sample_generate` knows everything that is asked."""
    known: dict[str, Any] = {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "max_tokens": params.max_tokens,
        "seed": params.seed,
        "noise": params.noise,
    }
    drawn_so = params.noise == "torch" or params.temperature == 0.0
    reports = (
        "top_logprobs",
        "logprobs_mode",
        "logprob_token_ids",
        "kept",
        "routed_experts",
        "ranks",
        "prompt_logprobs",
    )
    asked = {name: getattr(params, name) for name in reports} | known
    priors = case.asked.get("num_prior_tokens", 0) or case.asked.get("sample_index", 0)
    return drawn_so and not priors and SamplingParams(**asked) == params and params.max_tokens != 0
