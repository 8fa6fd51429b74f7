"""Tinker's API as its client 0.38 speaks it: sessions, sampling by promise, and the refusal of what trains."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from myserve.errors import RequestError
from myserve.wire.base import Integer, WireModel
from myserve.wire.completions import CompletionRequest
from myserve.wire.fields import MAX_STOP_STRINGS, TokenIds
from myserve.wire.peers import Refused

__all__ = [
    "NO_ID",
    "CreateSamplingSession",
    "CreateSession",
    "JoinSamplingSession",
    "PromiseName",
    "PromptChunks",
    "SessionHeartbeat",
    "TargetIds",
    "TinkerSample",
    "TinkerSampling",
    "sampling_session_model",
]

SCHEME = "tinker://"
NO_ID = -1  # a cell of `target_prompt_logprobs` that asks for nothing
MAX_TARGET_CELLS = 1 << 18
MAX_TOPK = 1024

SessionId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,1024}$")]
Name = Annotated[str, Field(min_length=1, max_length=512)]
TopK = Annotated[Integer, Field(ge=0, le=MAX_TOPK)]


class TinkerModel(WireModel):
    """The root of this dialect's requests: each says in `type` which it is, as its path does."""

    HINTS: ClassVar[frozenset[str]] = frozenset({"type"})


class CreateSession(TinkerModel):
    """`POST /api/v1/create_session`. Tags and metadata are for a console, which is not here."""

    HINTS: ClassVar[frozenset[str]] = frozenset(
        {"type", "tags", "user_metadata", "sdk_version", "project_id", "display_name"}
    )


class SessionHeartbeat(TinkerModel):
    """`POST /api/v1/session_heartbeat`."""

    session_id: SessionId


class CreateSamplingSession(TinkerModel):
    """`POST /api/v1/create_sampling_session`. The id that it is answered with says the model: nothing is kept.

    >>> asked = CreateSamplingSession(session_id="s", sampling_session_seq_id=0, base_model="Qwen/Qwen3-8B")
    >>> asked.sampling_session_id
    's:sample:0:UXdlbi9Rd2VuMy04Qg'
    >>> sampling_session_model(asked.sampling_session_id)
    'Qwen/Qwen3-8B'
    """

    session_id: SessionId
    sampling_session_seq_id: Annotated[Integer, Field(ge=0)]
    base_model: Name | None = None
    model_path: Name | None = None

    def check(self) -> None:
        """Raise RequestError unless exactly one of the two names a model."""
        named_model(self.base_model, self.model_path)

    @property
    def model(self) -> str:
        return named_model(self.base_model, self.model_path)

    @property
    def sampling_session_id(self) -> str:
        name = base64.urlsafe_b64encode(self.model.encode()).decode().rstrip("=")
        return f"{self.session_id}:sample:{self.sampling_session_seq_id}:{name}"


class JoinSamplingSession(TinkerModel):
    """`POST /api/v1/join_sampling_session`."""

    sampling_session_id: SessionId


class PromiseName(TinkerModel):
    """`POST /api/v1/retrieve_future` and `/cancel_future`: which promise is meant."""

    HINTS: ClassVar[frozenset[str]] = frozenset({"allow_metadata_only"})

    request_id: Annotated[str, Field(min_length=1, max_length=2048)]


def named_model(base_model: str | None, model_path: str | None) -> str:
    """Return the served model that is meant: `base_model`, or what `model_path` names behind "tinker://".

    >>> named_model(None, "tinker://policy")
    'policy'
    """
    if model_path is None:
        if base_model is None:
            raise RequestError("base_model or model_path must name a served model", param="base_model")
        return base_model
    if not model_path.startswith(SCHEME):
        raise RequestError(
            f"model_path must start with {SCHEME!r}, got {model_path!r:.80}", param="model_path"
        )
    return model_path.removeprefix(SCHEME)


def sampling_session_model(sampling_session_id: str) -> str:
    """Return the model that a sampling session's id says. Raises RequestError for an id that is none of ours."""
    *_, kind, number, name = ["", "", "", *sampling_session_id.split(":")]
    try:
        if kind != "sample" or not number.isdigit():
            raise ValueError
        return base64.urlsafe_b64decode(name + "=" * (-len(name) % 4)).decode()
    except (ValueError, binascii.Error):
        raise RequestError(
            f"there is no sampling session {sampling_session_id[:200]!r}: make one with create_sampling_session",
            param="sampling_session_id",
        ) from None


class PromptChunk(WireModel):
    """A part of a prompt: ids. Images and audio are refused."""

    type: str
    tokens: TokenIds = ()

    def check(self) -> None:
        if self.type != "encoded_text":
            raise RequestError(
                f"prompt.chunks: chunks of type {self.type!r:.80} are not supported: this server takes encoded_text",
                param="prompt.chunks",
                code="unsupported_parameter",
            )


class PromptChunks(WireModel):
    """A prompt, whose ids lie in chunks."""

    chunks: Annotated[tuple[PromptChunk, ...], Field(fail_fast=True, min_length=1, max_length=16_384)]

    def check(self) -> None:
        """Raise RequestError for a chunk of anything but ids, and for a prompt without any."""
        for chunk in self.chunks:
            chunk.check()
        if not self.token_ids:
            raise RequestError("prompt must have at least one token", param="prompt")

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token_id for chunk in self.chunks for token_id in chunk.tokens)


class TinkerSampling(WireModel):
    """Tinker's SamplingParams. `stop`: strings or ids, beside EOS; an empty list: nothing ends it, not even EOS.

    >>> TinkerSampling(stop=("\\n", "User:")).stop_strings, TinkerSampling(stop=(7,)).stop_ids
    (('\\n', 'User:'), (7,))
    """

    max_tokens: Integer | None = None
    seed: Integer | None = None
    stop: str | Annotated[tuple[str | int, ...], Field(fail_fast=True, max_length=4096)] | None = None
    temperature: float = 1.0
    top_k: Integer = -1
    top_p: float = 1.0

    @property
    def ignores_eos(self) -> bool:
        return self.stop is not None and len(self.stop) == 0 and not isinstance(self.stop, str)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        given = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        return tuple(each for each in given if isinstance(each, str))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        given = () if isinstance(self.stop, str) else self.stop or ()
        return tuple(each for each in given if not isinstance(each, str))

    def check(self) -> None:
        """Raise RequestError for more strings than are looked for."""
        if len(self.stop_strings) > MAX_STOP_STRINGS:
            raise RequestError(
                f"sampling_params.stop must hold at most {MAX_STOP_STRINGS} strings, got {len(self.stop_strings)}",
                param="sampling_params.stop",
            )


class TargetIds(WireModel):
    """An int64 tensor [P - 1, K] of ids, dense or CSR: row i has those that are scored at position i + 1 of the prompt.

    >>> TargetIds(data=(5, -1, 6, 7), dtype="int64", shape=(2, 2)).rows
    ((5, -1), (6, 7))
    >>> TargetIds(data=(5, 6, 7), dtype="int64", shape=(2, 9), sparse_crow_indices=(0, 1, 3),
    ...     sparse_col_indices=(0, 2, 8)).rows
    ((5,), (6, 7))
    """

    data: Annotated[tuple[Integer, ...], Field(fail_fast=True)]
    dtype: Literal["int64"]
    shape: Annotated[tuple[Integer, ...], Field(min_length=2, max_length=2)]
    sparse_crow_indices: TokenIds | None = None
    sparse_col_indices: TokenIds | None = None

    @property
    def is_sparse(self) -> bool:
        return self.sparse_crow_indices is not None

    @property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """Return each row's cells: all of a dense one, the listed ones of a sparse one."""
        count, width = self.shape
        ends = self.sparse_crow_indices if self.is_sparse else range(0, count * width + 1, max(1, width))
        return tuple(self.data[start:end] for start, end in pairwise(ends or ()))

    def check(self, prompt_length: int) -> None:
        """Raise RequestError unless there is a row for each token but the first, and a cell that names an id."""
        name = "target_prompt_logprobs"
        count, width = self.shape
        crow, col = self.sparse_crow_indices, self.sparse_col_indices
        if count != prompt_length - 1 or width < 1:
            raise RequestError(
                f"{name} must have the shape [{prompt_length - 1}, K], a row for each token of the prompt but the "
                f"first, got {list(self.shape)}",
                param=name,
            )
        if crow is None or col is None:
            well_formed = crow is col and len(self.data) == count * width
        else:
            well_formed = (
                len(crow) == count + 1
                and crow[0] == 0
                and crow[-1] == len(col) == len(self.data)
                and all(start <= end for start, end in pairwise(crow))
                and all(0 <= each < width for each in col)
            )
        if not well_formed:
            raise RequestError(
                f"{name}: data and indices do not make the shape {list(self.shape)}", param=name
            )
        if min(self.data, default=NO_ID) < NO_ID or max(self.data, default=NO_ID) < 0:
            raise RequestError(f"{name} must have token ids, or -1, and at least one id", param=name)

    def scored(self, start: int) -> tuple[tuple[int, ...], ...]:
        """Return rows [start:] as they are asked of the engine: equally long, with id 0 where nothing is asked."""
        rows = self.rows[start:]
        width = max(map(len, rows))
        if len(rows) * width > MAX_TARGET_CELLS:
            raise RequestError(
                f"target_prompt_logprobs asks for {width} ids at {len(rows)} positions; {MAX_TARGET_CELLS} cells are "
                "the limit",
                param="target_prompt_logprobs",
            )
        return tuple(tuple(max(0, each) for each in row) + (0,) * (width - len(row)) for row in rows)

    @property
    def first(self) -> int:
        """Return the first row that names an id."""
        return next(at for at, row in enumerate(self.rows) if any(each != NO_ID for each in row))


class TinkerSample(TinkerModel):
    """`POST /api/v1/asample`: `num_samples` completions of one prompt, and scores of the prompt."""

    REFUSED: ClassVar[Mapping[str, Refused]] = {
        "prompt_alt_tokens_k": Refused((0,), "a request for each position"),
        "record_stability_info": Refused((False,)),
    }

    prompt: PromptChunks
    sampling_params: TinkerSampling
    num_samples: Annotated[Integer, Field(ge=1, le=128)] = 1
    base_model: Name | None = None
    model_path: Name | None = None
    sampling_session_id: SessionId | None = None
    seq_id: Annotated[Integer, Field(ge=0)] | None = None
    prompt_logprobs: bool | None = None
    prompt_logprobs_last_n: Annotated[Integer, Field(ge=1)] | None = None
    topk_prompt_logprobs: TopK = 0
    topk_sample_logprobs: TopK = 0
    target_prompt_logprobs: TargetIds | None = None

    def check(self) -> None:
        """Raise RequestError for what no field alone is wrong about."""
        self.prompt.check()
        self.sampling_params.check()
        length = len(self.prompt.token_ids)
        if self.sampling_session_id is not None and self.seq_id is None:
            raise RequestError("seq_id is required with sampling_session_id", param="seq_id")
        if self.prompt_logprobs_last_n is not None:
            if not (self.prompt_logprobs or self.topk_prompt_logprobs):
                raise RequestError(
                    "prompt_logprobs_last_n needs prompt_logprobs", param="prompt_logprobs_last_n"
                )
            if self.prompt_logprobs_last_n > length - 1:
                raise RequestError(
                    f"prompt_logprobs_last_n must be in [1, {length - 1}], as the prompt has {length} tokens, got "
                    f"{self.prompt_logprobs_last_n}",
                    param="prompt_logprobs_last_n",
                )
        if self.target_prompt_logprobs is not None:
            self.target_prompt_logprobs.check(length)

    @property
    def model(self) -> str:
        """Return the served model that is meant. Raises RequestError where none is named."""
        if self.sampling_session_id is not None:
            return sampling_session_model(self.sampling_session_id)
        return named_model(self.base_model, self.model_path)

    @property
    def request_id(self) -> str | None:
        """Return the promise's id, which is the same when the request is sent again; None: it has none of its own."""
        if self.sampling_session_id is None:
            return None
        return f"{self.sampling_session_id}:{self.seq_id}"

    @property
    def first_scored(self) -> int | None:
        """Return the first position of the prompt whose logprobs are shown; None: no such logprobs are asked for."""
        if not (self.prompt_logprobs or self.topk_prompt_logprobs):
            return None
        last_n = self.prompt_logprobs_last_n
        return 1 if last_n is None else len(self.prompt.token_ids) - last_n

    @property
    def num_target_cells(self) -> int:
        return 0 if self.target_prompt_logprobs is None else len(self.target_prompt_logprobs.data)

    def scoring(self) -> dict[str, Any]:
        """Return what is asked of the sampler about the prompt, under its own names; nothing where nothing is."""
        shown, target = self.first_scored, self.target_prompt_logprobs
        # a row of the target is a position whose next token is scored
        starts = [] if shown is None else [max(0, shown - 1)]
        starts += [] if target is None else [target.first]
        if not starts:
            return {}
        asked: dict[str, Any] = {
            "prompt_logprobs": self.topk_prompt_logprobs,
            "prompt_logprob_start": min(starts),
        }
        if target is not None:
            asked["prompt_logprob_token_ids"] = target.scored(min(starts))
        return asked

    def as_completion(self) -> CompletionRequest:
        """Return this request as the completions route knows it; alternatives are of what was drawn from."""
        sampling = self.sampling_params
        return CompletionRequest(
            model=self.model,
            prompt=self.prompt.token_ids,
            n=self.num_samples,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            stop=sampling.stop_strings or None,
            stop_token_ids=sampling.stop_ids or None,
            ignore_eos=sampling.ignores_eos or None,
            top_logprobs=self.topk_sample_logprobs,
            logprobs_mode="processed",
        )
