"""The sampler behind other trainers' interfaces: TRL's `rollout_func`, tinker-cookbook's `TokenCompleter`.

Neither library is imported: what they call and what they read are plain lists, and is written down here.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol, Unpack

from myserve.sdk.options import SampleOptions
from myserve.sdk.sampler import DeploymentSampler, Prompt
from myserve.sdk.seeds import prompt_seed
from myserve.sdk.types import SampledCompletion

Rollouts = dict[str, list[Any]]


def trl_rollout_func(sampler: DeploymentSampler, **options: Unpack[SampleOptions]) -> Callable[..., Rollouts]:
    """A `rollout_func` for TRL's `GRPOTrainer`: called with the prompts (and the trainer), answers with lists as long.

    Gives `prompt_ids`, `completion_ids` and `logprobs` (of the distribution that was drawn from: what TRL's importance
    correction divides by), one row a prompt. Equal prompts are one group, drawn in one request: TRL repeats each prompt
    `num_generations` times. `options` hold for every call; give the sampler a `run_seed` and a run can be repeated.

    >>> from myserve.sdk.testing import ScriptedTransport, ToyTokenizer
    >>> sampler = DeploymentSampler("http://test", "toy", tokenizer=ToyTokenizer(),
    ...     transport=ScriptedTransport(["a", "b"]))
    >>> rollouts = trl_rollout_func(sampler, max_tokens=4)(["2+2=", "3+3=", "2+2="])
    >>> rollouts["completion_ids"], rollouts["logprobs"]
    ([[97], [97], [98]], [[0.0], [0.0], [0.0]])
    """

    calls = count()

    def rollout(prompts: Sequence[Prompt], trainer: object = None, **_: object) -> Rollouts:
        # Each call has a seed of its own: in the next epoch a prompt gets new samples.
        seed = None if sampler.run_seed is None else prompt_seed(sampler.run_seed, (), next(calls))
        wanted = Counter(map(_key, prompts))
        distinct = {_key(prompt): prompt for prompt in prompts}
        drawn: defaultdict[str, list[SampledCompletion]] = defaultdict(list)
        for n in sorted(set(wanted.values())):  # one batch for each group size; as a rule there is one
            keys = [key for key in distinct if wanted[key] == n]
            groups = sampler.sync.sample_batch(
                [distinct[key] for key in keys], **{**options, "n": n, "seed": seed, "logprobs": True}
            )
            drawn |= zip(keys, (list(group) for group in groups), strict=True)
        samples = [drawn[_key(prompt)].pop(0) for prompt in prompts]
        return {
            "prompt_ids": [sample.prompt_tokens for sample in samples],
            "completion_ids": [sample.completion_tokens for sample in samples],
            "logprobs": [_behaviour(sample) for sample in samples],
        }

    return rollout


class ModelInput(Protocol):
    """What is used of tinker's `ModelInput`."""

    def to_ints(self) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class TokensWithLogprobs:
    """tinker-cookbook's answer type, by its names; the stop sequence is among the tokens, as there."""

    tokens: list[int]
    maybe_logprobs: list[float] | None
    stop_reason: str = "stop"
    sequence_id: str | None = None  # of Tinker itself: ours have none
    prompt_cache_hit_tokens: int = 0

    @property
    def logprobs(self) -> list[float]:
        if self.maybe_logprobs is None:
            raise ValueError("this completion has no logprobs")
        return self.maybe_logprobs


class SamplerTokenCompleter:
    """tinker-cookbook's `TokenCompleter` on a sampler: `await completer(model_input, stop)`.

    `stop` is a list of strings or of token ids, as there; a call's `max_tokens` can only shorten. Logprobs are of the
    distribution that was drawn from.

    >>> import asyncio
    >>> from myserve.sdk.testing import ScriptedTransport
    >>> completer = SamplerTokenCompleter(DeploymentSampler("http://test", "toy",
    ...     transport=ScriptedTransport(["ab"])), max_tokens=8)
    >>> class Ids(list):
    ...     to_ints = list.copy
    >>> asyncio.run(completer(Ids([1, 2]), stop=["x"])).tokens
    [97, 98]
    """

    def __init__(self, sampler: DeploymentSampler, **options: Unpack[SampleOptions]) -> None:
        self._sampler = sampler
        self._options = options

    async def __call__(
        self,
        model_input: ModelInput,
        stop: Sequence[str] | Sequence[int] = (),
        *,
        max_tokens: int | None = None,
    ) -> TokensWithLogprobs:
        call: dict[str, Any] = {**self._options, **_stop_options(stop), "n": 1, "logprobs": True}
        if max_tokens is not None:
            call["max_tokens"] = min(max_tokens, self._options.get("max_tokens", max_tokens))
        (sample,) = await self._sampler.sample_with_prompt_tokens(model_input.to_ints(), **call)
        return TokensWithLogprobs(sample.completion_tokens, _behaviour(sample), sample.finish_reason)


def _stop_options(stop: Sequence[str] | Sequence[int]) -> SampleOptions:
    if not stop:
        return {}
    strings = [entry for entry in stop if isinstance(entry, str)]
    ids = [entry for entry in stop if not isinstance(entry, str)]
    options: SampleOptions = {}
    if strings:
        options |= {"stop": strings, "include_stop_str_in_output": True}
    if ids:
        options["stop_token_ids"] = ids
    return options


def _behaviour(sample: SampledCompletion) -> list[float]:
    logprobs = sample.sampling_logprobs if sample.sampling_logprobs is not None else sample.inference_logprobs
    assert logprobs is not None, "logprobs were asked for"
    return logprobs


def _key(prompt: Prompt | Mapping[str, Any]) -> str:
    return repr(prompt)
