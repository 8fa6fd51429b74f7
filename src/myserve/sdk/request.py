"""What is asked for one prompt, apart from how it travels: a frozen value with a fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DEFAULT_MAX_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """A prompt and how to sample from it. The seed belongs to it: the same request is the same samples.

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
    extra: Mapping[str, Any] = field(default_factory=dict)  # any other field of the server's, as it is

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not self.prompt_token_ids:
            raise ValueError("the prompt has no tokens; pass at least one message or token id")
        if taken := _OURS & self.extra.keys():
            raise ValueError(f"{', '.join(sorted(taken))}: set by the sampler itself, not by the caller")

    def fingerprint(self) -> str:
        """128 bits over every field: what a journal calls this request."""
        values = {name: getattr(self, name) for name in self.__slots__}
        text = json.dumps(values, sort_keys=True, separators=(",", ":"), default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# What the sampler sends on its own account; a caller's value would break what it promises.
_OURS = frozenset({"prompt", "stream", "stream_options", "raw_output", "sample_index", "num_prior_tokens"})


def as_token_ids(rendered: Any) -> list[int]:
    """The ids in what `apply_chat_template` or `encode` gave: a list, a batch of one, an encoding, a tensor.

    >>> as_token_ids([1, 2]), as_token_ids([[1, 2]]), as_token_ids({"input_ids": [1, 2]})
    ([1, 2], [1, 2], [1, 2])
    """
    if isinstance(rendered, Mapping) or hasattr(rendered, "input_ids"):
        rendered = rendered["input_ids"] if isinstance(rendered, Mapping) else rendered.input_ids
    if hasattr(rendered, "tolist"):
        rendered = rendered.tolist()
    if not isinstance(rendered, Sequence) or isinstance(rendered, str):
        raise TypeError(f"the tokenizer gave {type(rendered).__name__}, not token ids")
    if rendered and isinstance(rendered[0], Sequence):
        (rendered,) = rendered
    return [int(token_id) for token_id in rendered]
