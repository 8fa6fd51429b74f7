"""TRL: a `rollout_func` for `GRPOTrainer`. It takes and returns plain lists; the library is not imported."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any, Unpack

from myserve.sdk.options import Prompt, SampleOptions
from myserve.sdk.sampler import DeploymentSampler
from myserve.sdk.seeds import prompt_seed
from myserve.sdk.types import SampledCompletion

__all__ = ["Rollouts", "trl_rollout_func"]

Rollouts = dict[str, list[Any]]


def trl_rollout_func(sampler: DeploymentSampler, **options: Unpack[SampleOptions]) -> Callable[..., Rollouts]:
    """Return a `rollout_func` for TRL's `GRPOTrainer`: called with the prompts, it returns lists as long.

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
            "logprobs": [_logprobs(sample) for sample in samples],
        }

    return rollout


def _logprobs(sample: SampledCompletion) -> list[float]:
    assert sample.behaviour_logprobs is not None, "logprobs were asked for"
    return sample.behaviour_logprobs


def _key(prompt: Prompt | Mapping[str, Any]) -> str:
    return repr(prompt)
