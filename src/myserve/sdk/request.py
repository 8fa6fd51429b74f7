"""A request for samples of one prompt, apart from how it is sent: a frozen value with a fingerprint."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

__all__ = ["DEFAULT_MAX_TOKENS", "SampleRequest", "as_token_ids"]

DEFAULT_MAX_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """Hold a prompt and how to sample from it. The seed belongs to it: the same request is the same samples.

    Raises ValueError for a prompt without tokens, `max_tokens` below 1, and fields that the sampler sets itself.

    >>> SampleRequest(prompt_token_ids=(1, 2), model="m", seed=7).fingerprint()
    'dcc4672e2fd897cdd2c86210a6758396'
    """

    prompt_token_ids: tuple[int, ...]
    model: str
    seed: int
    max_tokens: int = DEFAULT_MAX_TOKENS
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # off
    logprobs: bool = False
    top_logprobs: int | None = None
    echo: bool = False
    include_routing_matrix: bool = False
    stop: tuple[str, ...] = ()
    # any other field of the server's, as it is
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not self.prompt_token_ids:
            raise ValueError("the prompt has no tokens; pass at least one message or token id")
        if taken := _OURS & self.extra.keys():
            raise ValueError(f"{', '.join(sorted(taken))}: set by the sampler itself, not by the caller")

    @property
    def sends_echo(self) -> bool:
        """Return whether the server is asked to echo: only where the prompt has rows of logprobs or of routing."""
        return self.echo and (self.logprobs or self.include_routing_matrix)

    def fingerprint(self) -> str:
        """Return 128 bits over every field, in hex: a journal's name for this request."""
        values = {name: getattr(self, name) for name in self.__slots__}
        text = json.dumps(values, sort_keys=True, separators=(",", ":"), default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object, without its prompt; what is at its default is left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "prompt_token_ids"}
        defaults = {f.name: f.default for f in fields(self)} | {"extra": {}}
        return {name: value for name, value in values.items() if value != defaults[name]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], prompt_token_ids: Sequence[int]) -> SampleRequest:
        r"""Return the request that `to_json` wrote. Raises ValueError or TypeError for what is none.

        >>> request = SampleRequest(prompt_token_ids=(1, 2), model="m", seed=7, stop=("\n",))
        >>> SampleRequest.from_json(request.to_json(), [1, 2]) == request
        True
        """
        values = {**data, "stop": tuple(data.get("stop") or ())}
        return cls(prompt_token_ids=tuple(prompt_token_ids), **values)


# What the sampler sends on its own account; a caller's value would break what it promises.
_OURS = frozenset({"prompt", "stream", "stream_options", "raw_output", "sample_index", "num_prior_tokens"})


def as_token_ids(prompt: Any) -> list[int]:
    """Return the token ids in a list, an array, a tensor, or a tokenizer's encoding, or in a batch of one of them.

    Raises TypeError for what holds no integers, ValueError for a batch of several, padding, and ids below 0.

    >>> as_token_ids([1, 2]), as_token_ids([[1, 2]]), as_token_ids({"input_ids": [1, 2], "attention_mask": [1, 1]})
    ([1, 2], [1, 2], [1, 2])
    >>> as_token_ids([1.5])
    Traceback (most recent call last):
    ...
    TypeError: a prompt's token ids are integers; this one has 1.5
    """
    if isinstance(prompt, Mapping) or hasattr(prompt, "input_ids"):
        _check_padding(prompt)
        prompt = prompt["input_ids"] if isinstance(prompt, Mapping) else prompt.input_ids
    if hasattr(prompt, "tolist"):  # numpy, torch, pandas, array
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, str | bytes | bytearray):
        raise TypeError(
            f"token ids come in a list, an array, a tensor or an encoding, not in {type(prompt).__name__}"
        )
    if prompt and hasattr(prompt[0], "tolist"):
        prompt = [row.tolist() for row in prompt]
    if prompt and isinstance(prompt[0], Sequence) and not isinstance(prompt[0], str):
        if len(prompt) > 1:
            raise ValueError(
                f"a batch of {len(prompt)} prompts where one is needed: give them to sample_batch"
            )
        (prompt,) = prompt
    ids = _integers(prompt)
    if ids and min(ids) < 0:
        raise ValueError(
            f"token id {min(ids)}: ids are not below 0 (is it padding, or a label that is masked?)"
        )
    return ids


def _integers(values: Sequence[Any]) -> list[int]:
    try:
        return list(map(operator.index, values))
    except TypeError:
        wrong = next(value for value in values if not hasattr(value, "__index__"))
        raise TypeError(f"a prompt's token ids are integers; this one has {wrong!r}") from None


def _check_padding(encoding: Any) -> None:
    mask = (
        encoding.get("attention_mask")
        if isinstance(encoding, Mapping)
        else getattr(encoding, "attention_mask", None)
    )
    if mask is None:
        return
    mask = mask.tolist() if hasattr(mask, "tolist") else mask
    rows = mask if mask and isinstance(mask[0], Sequence) else [mask]
    if not all(all(row) for row in rows):
        raise ValueError("this encoding is padded (attention_mask has zeros): encode each prompt by itself")
