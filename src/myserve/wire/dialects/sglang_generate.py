"""SGLang's native route: the fields of a request, one prompt or a batch, and of an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NotRequired

from pydantic import Discriminator, Field, Tag
from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

from myserve.errors import RequestError
from myserve.wire.base import Integer, WireModel
from myserve.wire.completions import CompletionRequest
from myserve.wire.fields import MAX_STOP_STRINGS, LogitBias, TokenIds
from myserve.wire.peers import REFUSED, Refused
from myserve.wire.responses import VersionSpan
from myserve.wire.sessions import SessionAnswer
from myserve.wire.structured import Schema, StructuredOutputs

__all__ = ["MetaInfo", "NativeAnswer", "NativeGenerate", "NativeSampling"]

MAX_NEW_TOKENS = 128  # SGLang's default


class NativeSampling(WireModel):
    """SGLang's `sampling_params`. Ranges are `SamplingParams`' to check."""

    REFUSED: ClassVar[Mapping[str, Refused]] = {
        "stop_regex": Refused(([], "")),
        "beam_width": Refused((1,)),
        "beam_list_num": Refused((1,)),
    }
    HINTS: ClassVar[frozenset[str]] = frozenset({"spaces_between_special_tokens", "stream_interval"})

    max_new_tokens: Integer | None = MAX_NEW_TOKENS
    min_new_tokens: Integer | None = None
    stop: str | Annotated[tuple[str, ...], Field(fail_fast=True, max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    no_stop_trim: bool | None = None
    skip_special_tokens: bool | None = None
    n: Annotated[Integer, Field(ge=1, le=128)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: LogitBias | None = None
    sampling_seed: Integer | None = None
    json_schema: Schema | str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: dict[str, Any] | str | None = None
    # slime's: the ids that top_p and the like have left, for each token
    custom_params: dict[str, Any] | None = None

    @property
    def returns_support(self) -> bool:
        """Return whether slime's replay of truncation is asked for."""
        return bool((self.custom_params or {}).get("return_top_p_token_ids"))

    @property
    def is_scaled(self) -> bool:
        """Return whether SGLang's logprobs of these draws are not the model's own: of scores that were changed."""
        bias = self.logit_bias or self.frequency_penalty or self.presence_penalty
        repeats = self.repetition_penalty not in (None, 1, 1.0)
        return self.temperature not in (None, 0, 1) or (self.temperature != 0 and bool(bias or repeats))

    @property
    def is_truncated(self) -> bool:
        """Return whether some tokens may be taken out before the draw."""
        off = (self.top_p in (None, 1), self.top_k in (None, -1, 0), self.min_p in (None, 0))
        return not all(off) or any((self.regex, self.json_schema, self.ebnf, self.structural_tag))

    def check(self) -> None:
        """Raise RequestError for parameters of a processor that is not there."""
        unknown = sorted((self.custom_params or {}).keys() - {"return_top_p_token_ids"})
        if unknown:
            raise RequestError(
                f"sampling_params.custom_params.{unknown[0]} is not supported by this server",
                param="sampling_params.custom_params",
                code="unsupported_parameter",
            )

    def fields(self) -> dict[str, Any]:
        """Return these as the fields of our own requests."""
        tag = self.structural_tag
        outputs = None if tag is None else StructuredOutputs(structural_tag=tag)
        same = (
            *("stop", "stop_token_ids", "ignore_eos", "skip_special_tokens", "n", "temperature", "top_p"),
            *("top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"),
            *("logit_bias", "regex"),
        )
        return {name: getattr(self, name) for name in same} | {
            "min_tokens": self.min_new_tokens,
            "seed": self.sampling_seed,
            "include_stop_str_in_output": self.no_stop_trim,
            "guided_json": self.json_schema,
            "grammar": self.ebnf,
            "structured_outputs": outputs,
        }


def _is_list(value: object) -> str:
    return "each" if isinstance(value, list | tuple) else "all"


def _nested(value: object) -> str:
    first = value[0] if isinstance(value, list | tuple) and value else None
    return "each" if isinstance(first, list | tuple) or first is None else "all"


Switches = Annotated[
    Annotated[bool, Tag("all")] | Annotated[tuple[bool, ...], Field(fail_fast=True), Tag("each")],
    Discriminator(_is_list),
]
Counts = Annotated[
    Annotated[Integer, Tag("all")] | Annotated[tuple[Integer, ...], Field(fail_fast=True), Tag("each")],
    Discriminator(_is_list),
]
Texts = Annotated[
    Annotated[str, Tag("all")] | Annotated[tuple[str, ...], Field(fail_fast=True, min_length=1), Tag("each")],
    Discriminator(_is_list),
]
Ids = Annotated[
    Annotated[TokenIds, Field(min_length=1), Tag("all")]
    | Annotated[
        tuple[Annotated[TokenIds, Field(min_length=1)], ...], Field(fail_fast=True, min_length=1), Tag("each")
    ],
    Discriminator(_nested),
]
NamedIds = Annotated[
    Annotated[TokenIds, Tag("all")]
    | Annotated[tuple[TokenIds | None, ...], Field(fail_fast=True), Tag("each")],
    Discriminator(_nested),
]
Samplings = Annotated[
    Annotated[NativeSampling, Tag("all")]
    | Annotated[tuple[NativeSampling, ...], Field(fail_fast=True, min_length=1), Tag("each")],
    Discriminator(_is_list),
]


class NativeGenerate(WireModel):
    """`POST /generate`: one prompt or a batch, as text or as ids; with a batch, most fields may be lists.

    >>> asked = NativeGenerate(input_ids=((5, 6), (7,)), sampling_params=NativeSampling(temperature=0.5))
    >>> asked.is_batch, [prompt for prompt in asked.prompts], asked.sampling(1).temperature
    (True, [(5, 6), (7,)], 0.5)
    """

    REFUSED: ClassVar[Mapping[str, Refused]] = {
        **{name: refused for name, refused in REFUSED.items() if name != "lora_path"},
        "image_data": Refused(([], [[]])),
        "audio_data": Refused(([], [[]])),
        "video_data": Refused(([], [[]])),
        "modalities": Refused(([], [[]])),
        "input_embeds": Refused(),
        "positional_embed_overrides": Refused(),
        "return_entropy": Refused((False,)),
        "return_indexer_topk": Refused((False,)),
        "return_flat_raw_top_logprobs": Refused((False,)),
        "require_reasoning": Refused((False,)),
        "lora_id": Refused(),
        "multi_item_delimiter_indices": Refused(([],)),
        "video_config": Refused(({},)),
        "max_thinking_tokens": Refused(),
        "prompt": Refused((), "input_ids or text; vLLM's and TRL's clients use /v1/completions"),
        "prompts": Refused((), "input_ids or text; vLLM's and TRL's clients use /v1/completions"),
    }
    # about where a request runs, and how it is logged and measured
    HINTS: ClassVar[frozenset[str]] = frozenset(
        {
            *(
                "log_metrics",
                "no_logs",
                "conversation_id",
                "routing_key",
                "external_trace_header",
                "background",
            ),
            *("received_time", "mm_hashes", "mm_content_hashes", "bootstrap_pair_key"),
            *("decode_tp_size", "kv_router_hint", "return_bytes", "return_flat_raw_top_logprobs_b64"),
            *("http_worker_ipc", "need_wait_for_mm_inputs", "num_items_assigned", "encoder_urls"),
            *("image_max_dynamic_patch", "video_max_dynamic_patch"),
        }
    )

    text: Texts | None = None
    input_ids: Ids | None = None
    sampling_params: Samplings | None = None
    rid: Texts | None = None
    return_logprob: Switches | None = None
    logprob_start_len: Counts | None = None
    top_logprobs_num: Counts | None = None
    token_ids_logprob: NamedIds | None = None
    return_text_in_logprobs: bool = False
    return_sampling_mask: Switches | None = None
    return_routed_experts: bool = False
    routed_experts_start_len: Annotated[Integer, Field(ge=0)] = 0
    return_prompt_token_ids: bool = False
    stream: bool = False
    priority: Integer | None = None
    lora_path: str | tuple[str | None, ...] | None = None  # names of loaded adapters; null: the model alone
    cache_salt: Texts | None = None
    extra_key: Texts | None = None
    request_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    stream_interval: Annotated[Integer, Field(ge=1)] | None = None  # tokens a chunk
    model: str | None = None

    @property
    def is_batch(self) -> bool:
        """Return whether the prompts are a list, and so the answers."""
        source: Any = self.text if self.text is not None else self.input_ids
        return isinstance(source, tuple) and not isinstance(source[0], int)

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """Return the prompts one by one."""
        source: Any = self.text if self.text is not None else self.input_ids
        return list(source) if self.is_batch else [source]

    def check(self) -> None:
        """Raise RequestError for no prompt, two, or lists of other lengths than the batch's."""
        if (self.text is None) == (self.input_ids is None):
            raise RequestError("send either text or input_ids", param="input_ids")
        count = len(self.prompts)
        for name in (
            "sampling_params",
            "rid",
            "return_logprob",
            "logprob_start_len",
            "top_logprobs_num",
            "lora_path",
        ):
            self._check_length(name, count)
        nested = self.token_ids_logprob
        if nested and not isinstance(nested[0], int):
            self._check_length("token_ids_logprob", count)
        for index in range(count):
            self.sampling(index).check()
        if len({self.sampling(index).n or 1 for index in range(count)}) > 1:
            raise RequestError("n must be the same for all prompts of a batch", param="sampling_params.n")
        for name in ("cache_salt", "extra_key"):
            self._check_length(name, count)
            if len({self._of(name, index, None) for index in range(count)}) > 1:
                raise RequestError(f"{name} must be the same for all prompts of a batch", param=name)
        if isinstance(self.rid, tuple) and len(set(self.rid)) < len(self.rid):
            raise RequestError("rid must not have an id twice", param="rid")

    @property
    def adapters(self) -> list[str | None] | None:
        """Return the adapter of each prompt; None: whatever the model's name says."""
        if self.lora_path is None:
            return None
        return (
            list(self.lora_path)
            if isinstance(self.lora_path, tuple)
            else [self.lora_path] * len(self.prompts)
        )

    @property
    def named_model(self) -> str | None:
        """Return what the request says of its model: an adapter's name is one as well."""
        return self.model or next((name for name in self.adapters or () if name is not None), None)

    def _check_length(self, name: str, count: int) -> None:
        value = getattr(self, name)
        if isinstance(value, tuple) and (not self.is_batch or len(value) != count):
            raise RequestError(
                f"{name} has {len(value)} elements, and there "
                + (f"are {count} prompts" if self.is_batch else "is one prompt, not a list"),
                param=name,
            )

    def _of(self, name: str, index: int, default: Any) -> Any:
        value = getattr(self, name)
        value = value[index] if isinstance(value, tuple) else value
        return default if value is None else value

    def sampling(self, index: int) -> NativeSampling:
        """Return a prompt's parameters."""
        found: NativeSampling = self._of("sampling_params", index, NativeSampling())
        return found

    def returns_logprobs(self, index: int) -> bool:
        return bool(self._of("return_logprob", index, False))

    def top_logprobs(self, index: int) -> int:
        """Return how many alternatives a prompt's answer lists at each token."""
        return int(self._of("top_logprobs_num", index, 0)) if self.returns_logprobs(index) else 0

    def logprob_ids(self, index: int) -> tuple[int, ...]:
        """Return the ids whose logprob is listed at each token."""
        named = self.token_ids_logprob
        if not named or not self.returns_logprobs(index):
            return ()
        own: Any = named if isinstance(named[0], int) else named[index]
        return tuple(own or ())

    def returns_mask(self, index: int) -> bool:
        return bool(self._of("return_sampling_mask", index, False))

    def needs_support(self, index: int) -> bool:
        """Return whether each draw's support is looked up: because it is asked for, or for SGLang's logprobs."""
        sampling = self.sampling(index)
        scales = sampling.is_scaled and sampling.is_truncated and self.returns_logprobs(index)
        return scales or sampling.returns_support or self.returns_mask(index)

    def logprob_start(self, index: int, num_prompt_tokens: int) -> int:
        """Return the first of the prompt's tokens that has an entry. Raises RequestError."""
        asked = int(self._of("logprob_start_len", index, -1))
        if not -1 <= asked <= num_prompt_tokens:
            raise RequestError(
                f"logprob_start_len must be in [-1, {num_prompt_tokens}], which is the prompt's length, got {asked}",
                param="logprob_start_len",
            )
        return num_prompt_tokens if asked == -1 or not self.returns_logprobs(index) else asked

    def rids(self, answer_id: str) -> list[str]:
        """Return the prompts' ids: those that were given, or the answer's with a number where there are several."""
        if isinstance(self.rid, tuple):
            return list(self.rid)
        count = len(self.prompts)
        return [f"{answer_id}_{index}" for index in range(count)] if self.is_batch else [answer_id]

    def as_completion(self, model: str, index: int | None = None) -> CompletionRequest:
        """Return one prompt's request as the completions route knows it; without an index, what all share."""
        at = 0 if index is None else index
        prompts: Any = self.prompts
        prompt = prompts[at] if index is not None or not self.is_batch else tuple(prompts)
        scaled = self.sampling(at).is_scaled
        return CompletionRequest(
            model=model,
            prompt=prompt,
            stream=self.stream,
            priority=self.priority,
            cache_salt=self._of("cache_salt", at, self._of("extra_key", at, None)),
            request_timeout=self.request_timeout,
            stream_interval=self.stream_interval,
            include_routing_matrix=self.return_routed_experts or None,
            top_logprobs=self.top_logprobs(at),
            logprob_token_ids=self.logprob_ids(at) or None,
            logprobs_mode="processed" if scaled else "raw",
            sampling_mask=self.needs_support(at) or None,
            **self.sampling(at).fields(),
        )


LogprobTriple = tuple[float | None, int, str | None]


class MetaInfo(TypedDict):
    """The facts of an answer beside its text and ids. `seed` is ours: it makes the same draws again."""

    id: str
    finish_reason: dict[str, Any] | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    weight_version: str
    weight_versions: list[VersionSpan]
    num_retractions: int
    e2e_latency: float
    seed: int
    adapter_version: NotRequired[int]  # ours too
    session: NotRequired[SessionAnswer]  # where the request names one
    input_token_logprobs: NotRequired[list[LogprobTriple]]
    output_token_logprobs: NotRequired[list[LogprobTriple]]
    output_token_logprobs_length: NotRequired[int]
    input_top_logprobs: NotRequired[list[list[LogprobTriple] | None]]
    output_top_logprobs: NotRequired[list[list[LogprobTriple] | None]]
    input_token_ids_logprobs: NotRequired[list[list[LogprobTriple] | None]]
    output_token_ids_logprobs: NotRequired[list[list[LogprobTriple] | None]]
    output_token_sampling_mask: NotRequired[list[list[int]]]
    output_token_sampling_logprobs: NotRequired[list[float]]
    top_p_token_ids: NotRequired[str]
    top_p_token_offsets: NotRequired[str]
    routed_experts: NotRequired[str]


class NativeAnswer(TypedDict):
    """One choice, whole, or as far as a stream has come: SGLang's streams repeat what came before."""

    text: str
    output_ids: list[int]
    meta_info: MetaInfo
    prompt_token_ids: NotRequired[list[int]]
    index: NotRequired[int]
