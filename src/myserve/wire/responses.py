"""Answers are typed dicts: a dict is what is sent, so no object is built for a token in vain."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

from myserve.wire.sessions import SessionAnswer
from myserve.wire.token_arrays import TokenArrays

__all__ = [
    "ChatChoice",
    "ChatChunk",
    "ChatChunkChoice",
    "ChatCompletion",
    "ChatDelta",
    "ChatLogprobs",
    "ChoiceExtras",
    "Completion",
    "CompletionChoice",
    "ErrorResponse",
    "FinishReason",
    "GenerateChoice",
    "Generated",
    "LegacyLogprobs",
    "Message",
    "TokenLogprob",
    "ToolCall",
    "ToolCallDelta",
    "TopLogprob",
    "Usage",
    "VersionSpan",
]

# abort: new weights ended it, as their sender asked
FinishReason = Literal["stop", "length", "tool_calls", "abort"]


class ErrorBody(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(TypedDict):
    error: ErrorBody


class TopLogprob(TypedDict):
    token: str
    bytes: list[int] | None
    logprob: float
    token_id: int


class TokenLogprob(TypedDict):
    """OpenAI's four fields, and what a trainer asks for."""

    token: str
    bytes: list[int] | None  # the vocabulary's own bytes; None for a special token that the text leaves out
    logprob: float | None  # None only for the first token of an echoed prompt
    top_logprobs: list[TopLogprob]
    token_id: int
    sampling_logprob: NotRequired[float | None]  # not for prompt tokens: they were not drawn
    rank: NotRequired[int]  # among all ids by the model's own scores, 1 the likeliest
    entropy: NotRequired[float]  # nats, of the model's own distribution
    text_offset: NotRequired[int]  # in characters, completions only
    token_id_logprobs: NotRequired[list[dict[str, Any]]]
    sampling_mask: NotRequired[dict[str, Any]]
    kept: NotRequired[dict[str, Any]]  # its alias: what a request names, its answer names
    routing_matrix: NotRequired[str]  # base64 of uint8 [moe layers, experts per token]
    routing_matrix_dtype: NotRequired[Literal["uint16"]]  # little-endian; only where uint8 is too small


class ChatLogprobs(TypedDict):
    content: list[TokenLogprob]
    refusal: NotRequired[None]


class LegacyLogprobs(TypedDict):
    """The completions route's older form: four parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    routing_matrix: NotRequired[list[str | None]]  # ours: as in chat's entries


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class CompletionTokensDetails(TypedDict):
    reasoning_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: NotRequired[CompletionTokensDetails]  # of models that think


class RawOutput(TypedDict):
    prompt_token_ids: list[int]
    completion_token_ids: list[int]


class ChoiceExtras(TypedDict, total=False):
    """Our fields beside OpenAI's, on every choice."""

    stop_reason: int | str | None
    seed: int
    weight_version: int
    adapter_version: int  # where the model is an adapter
    replica_class: (
        str  # only where a fleet's replicas differ in their bits: equal ones drew in the same arithmetic
    )
    weight_version_spans: list[dict[str, int]]  # only when the weights changed inside the completion
    token_ids: list[int] | None
    drafters: list[
        str | None
    ]  # beside `token_ids`: what had drafted each; None: it was drawn without a draft
    prompt_token_ids: list[int] | None
    prompt_logprobs: list[dict[str, Any] | None] | None
    routing_matrix_shape: list[int]  # [moe layers, experts per token] of every routing matrix in the answer
    prompt_routing_matrices: list[str | None]
    raw_output: RawOutput
    session: SessionAnswer  # where the request names one
    token_arrays: TokenArrays


class CalledFunction(TypedDict):
    name: NotRequired[str]  # in a stream, with the call's first delta
    arguments: str  # JSON, as the model wrote it


class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ToolCallDelta(TypedDict):
    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: CalledFunction


class Message(TypedDict):
    role: Literal["assistant"]
    content: str | None  # None: it called tools and said nothing
    refusal: None
    reasoning_content: NotRequired[str]  # of models that think
    tool_calls: NotRequired[list[ToolCall]]
    # NeMo-RL's: with logprobs and tokens as ids; a logprob is of the distribution that was drawn from
    prompt_token_ids: NotRequired[list[int]]
    generation_token_ids: NotRequired[list[int]]
    generation_log_probs: NotRequired[list[float]]


class ChatChoice(ChoiceExtras):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    logprobs: NotRequired[ChatLogprobs]  # the first choice's, where the original specification has them
    prompt_token_ids: NotRequired[list[int] | None]
    prompt_logprobs: NotRequired[list[dict[str, Any] | None] | None]
    perf_metrics: NotRequired[dict[str, int | float | str]]


class ChatDelta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str
    reasoning_content: str
    tool_calls: list[ToolCallDelta]
    logprobs: ChatLogprobs  # with `delta_logprobs`


class ChatChunkChoice(ChoiceExtras):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(TypedDict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[list[dict[str, Any] | None]]
    perf_metrics: NotRequired[dict[str, int | float | str]]


class CompletionChoice(ChoiceExtras):
    index: int
    text: str
    logprobs: LegacyLogprobs | ChatLogprobs | None
    finish_reason: FinishReason | None  # None in a stream's chunks before the last


class Completion(TypedDict):
    """A whole completion, and a stream's chunk: the same shape."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]
    perf_metrics: NotRequired[dict[str, int | float | str]]


class VersionSpan(TypedDict, total=False):
    """Tokens [start, end) of a completion and what made them. The last two are ours: see docs/weights.md."""

    version: str
    start: int
    end: int
    adapter_version: int
    recomputed: bool


class GenerateChoice(ChoiceExtras, total=False):
    """One choice of vLLM's token route; in a stream, what it gained."""

    index: int
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    sampling_mask: list[list[int]]  # with `kept`: the ids that each token was drawn from
    # base64 of a .npy file, [tokens of prompt and completion - 1, moe layers, experts per token]
    routed_experts: str | None
    weight_versions: list[VersionSpan]  # with the last token: which weights made which tokens


class Generated(TypedDict):
    """vLLM's answer, whole or a stream's chunk."""

    request_id: str
    model: str
    created: int
    choices: list[GenerateChoice]
    usage: NotRequired[Usage]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[list[dict[str, Any] | None] | None]
    prompt_token_id_logprobs: NotRequired[str]  # base64 of a .npy file, float32 [scored tokens, named ids]
