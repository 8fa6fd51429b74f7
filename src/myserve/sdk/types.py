"""The values that a sampling call returns, under the names of the original specification."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import msgspec

from myserve.sdk.errors import SamplingError

__all__ = [
    "LOGPROB_ROUNDING",
    "Alternative",
    "Completions",
    "SampleDelta",
    "SampledCompletion",
    "SamplerStats",
]

# What a log-softmax in float32 may come out above 0. More is not a rounding, and no probability.
LOGPROB_ROUNDING = 1e-3


class Alternative(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Hold a token that stood beside the one drawn. `token_id` is None where the server gave its text alone.

    A msgspec Struct, as chunks are: the JSON decoder makes it, and nothing is done for it in Python.
    """

    token_id: int | None = None
    logprob: float
    token: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledCompletion:
    """Hold one completion, with every number that a trainer needs. P prompt tokens, C completion tokens.

    The first eight names are the original specification's. Lists over the completion have C entries;
    `inference_logprobs` have P+C-1 when `logprobs_echoed`, and `routing_matrices` when `echo` was asked for.

    >>> sample = SampledCompletion(text=" 4", full_tokens=[5, 6, 9], prompt_len=2, finish_reason="stop",
    ...     completion_len=1, inference_logprobs=[-0.25])
    >>> sample.prompt_tokens, sample.completion_tokens
    ([5, 6], [9])
    """

    text: str
    full_tokens: list[int]  # [P+C]
    prompt_len: int  # P
    finish_reason: str
    completion_len: int  # C
    inference_logprobs: list[float] | None = None  # [C] or [P+C-1]: log-softmax of the raw logits
    logprobs_echoed: bool = False
    routing_matrices: list[str] | None = None  # base64, [C] or [P+C-1]; `routing.routing_array` reads them
    # beyond the original specification
    sampling_logprobs: list[float] | None = None  # [C]: log of the distribution that the draw really used
    top_logprobs: list[tuple[Alternative, ...]] | None = None  # as long as inference_logprobs
    routing_shape: list[int] | None = None  # of each routing matrix: [layers with experts, experts per token]
    routing_dtype: str = "uint8"  # of its ids; "uint16", little-endian, for more than 256 experts
    kept: list[dict[str, Any]] | None = None  # [C]: support, its mass and entropy, where asked for
    index: int = 0  # which of the n samples
    seed: int | None = None  # with `index`, draws this completion again
    stop_reason: int | str | None = None
    weight_version: int | None = None  # at the last token
    weight_version_spans: list[dict[str, int]] | None = None  # [start, end) of each, if it changed on the way
    token_times: list[float] | None = None  # [C] seconds from the request to each token's arrival
    attempts: int = 1  # requests that it took
    request_id: str = ""

    @property
    def prompt_tokens(self) -> list[int]:
        """Return [P]: the prompt's ids."""
        return self.full_tokens[: self.prompt_len]

    @property
    def completion_tokens(self) -> list[int]:
        """Return [C]: the completion's ids."""
        return self.full_tokens[self.prompt_len :]

    @property
    def behaviour_logprobs(self) -> list[float] | None:
        """Return [C]: logprobs of the distribution drawn from, which an importance ratio divides by.

        The model's own at temperature 1, where the server knows no others.
        """
        return self.sampling_logprobs if self.sampling_logprobs is not None else self.inference_logprobs

    @property
    def time_to_first_token(self) -> float | None:
        """Return the seconds from the request to its first token, queueing at the server included."""
        return self.token_times[0] if self.token_times else None

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object; what is None or at its default is left out."""
        values = {name: getattr(self, name) for name in _NAMES}
        present = {name: value for name, value in values.items() if value != _DEFAULTS.get(name, _ABSENT)}
        if self.top_logprobs is not None:
            present["top_logprobs"] = [
                [msgspec.structs.astuple(at) for at in row] for row in self.top_logprobs
            ]
        return present

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SampledCompletion:
        """Return the completion that `to_json` wrote; a name that this version does not know is ignored.

        Raises ValueError for what is no completion: a field of another type, lengths or logprobs that do not fit.

        >>> sample = SampledCompletion(text="", full_tokens=[5, 6], prompt_len=1, finish_reason="stop",
        ...     completion_len=1, top_logprobs=[(Alternative(token_id=3, logprob=-0.5),)])
        >>> SampledCompletion.from_json(sample.to_json()) == sample
        True
        """
        if not isinstance(data, dict):
            raise ValueError(f"a completion is an object, not {type(data).__name__}")
        known = {name: value for name, value in data.items() if name in _NAMES}
        tops = known.get("top_logprobs")
        if tops is not None:
            if not isinstance(tops, list) or not all(isinstance(row, list | tuple) for row in tops):
                raise ValueError("top_logprobs is a list of lists")
            known["top_logprobs"] = [[_alternative(entry) for entry in row] for row in tops]
        completion = msgspec.convert(known, cls)  # its ValidationError is a ValueError
        completion._check()
        return completion

    def _check(self) -> None:
        """Raise ValueError where lengths or logprobs cannot be a completion's."""
        if min(self.prompt_len, self.completion_len, self.index) < 0:
            raise ValueError("a length or an index is below 0")
        if self.prompt_len + self.completion_len != len(self.full_tokens):
            raise ValueError(
                f"{len(self.full_tokens)} tokens, and {self.prompt_len} + {self.completion_len} lengths"
            )
        num_rows = len(self.full_tokens) - 1 if self.logprobs_echoed else self.completion_len
        columns = {"inference_logprobs": num_rows, "top_logprobs": num_rows}
        columns |= dict.fromkeys(("sampling_logprobs", "kept", "token_times"), self.completion_len)
        for name, length in columns.items():
            column = getattr(self, name)
            if column is not None and len(column) != length:
                raise ValueError(f"{len(column)} rows of {name} for {length} tokens")
        for name in ("inference_logprobs", "sampling_logprobs"):
            if not all(value <= LOGPROB_ROUNDING for value in getattr(self, name) or ()):
                raise ValueError(f"{name}: a logprob is above 0")


def _alternative(entry: Any) -> Any:
    """Return an alternative that was written as a list of its fields, as a mapping; anything else as it is."""
    return (
        dict(zip(Alternative.__struct_fields__, entry, strict=False))
        if isinstance(entry, list | tuple)
        else entry
    )


_ABSENT = object()
_NAMES = tuple(field.name for field in fields(SampledCompletion))
_DEFAULTS = {field.name: field.default for field in fields(SampledCompletion)}


@dataclass(frozen=True, slots=True)
class SampleDelta:
    """Hold what one sample gained: text that can no longer change, and the tokens that it aligns with.

    `restarted`: what came before for this index is void; its stream was cut and could not be resumed.
    """

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float | None, ...] = ()
    finish_reason: str | None = None
    restarted: bool = False


class Completions(list[SampledCompletion]):
    """A list of completions, and what is not in it: `dropped` and `failures`.

    >>> Completions([], dropped=2)
    Completions([], dropped=2, failures=0)
    """

    def __init__(
        self,
        completions: Iterable[SampledCompletion] = (),
        *,
        dropped: int = 0,
        failures: Iterable[SamplingError] = (),
    ) -> None:
        super().__init__(completions)
        self.dropped = dropped  # samples over `max_seq_len`, or all n where the prompt alone reaches it
        self.failures = tuple(failures)  # with on_error="keep"

    def __repr__(self) -> str:
        return f"Completions({super().__repr__()}, dropped={self.dropped}, failures={len(self.failures)})"


@dataclass(slots=True)
class SamplerStats:
    """Count what a sampler did since it was made."""

    prompts: int = 0
    samples: int = 0  # whole ones
    failed: int = 0
    dropped: int = 0  # over `max_seq_len`
    requests: int = 0  # HTTP requests, failed ones included
    resumed: int = 0  # samples that went on from the tokens they had
    completion_tokens: int = 0
