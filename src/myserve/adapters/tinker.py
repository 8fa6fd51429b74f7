"""tinker-cookbook: a `TokenCompleter`. The interface is written down here; the library is not imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Unpack

from myserve.sdk.options import SampleOptions
from myserve.sdk.sampler import DeploymentSampler

__all__ = ["ModelInput", "SamplerTokenCompleter", "TokensWithLogprobs"]


class ModelInput(Protocol):
    """The part of tinker's `ModelInput` that is used."""

    def to_ints(self) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class TokensWithLogprobs:
    """Hold an answer under tinker-cookbook's names; the stop sequence is among the tokens, as there."""

    tokens: list[int]
    maybe_logprobs: list[float] | None
    stop_reason: str = "stop"
    sequence_id: str | None = None  # of Tinker itself: ours have none
    prompt_cache_hit_tokens: int = 0

    @property
    def logprobs(self) -> list[float]:
        """Return the logprobs [C]. Raises ValueError where there are none."""
        if self.maybe_logprobs is None:
            raise ValueError("this completion has no logprobs")
        return self.maybe_logprobs


class SamplerTokenCompleter:
    """Complete tokens for tinker-cookbook on a sampler: `await completer(model_input, stop)`.

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
        return TokensWithLogprobs(sample.completion_tokens, sample.behaviour_logprobs, sample.finish_reason)


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
