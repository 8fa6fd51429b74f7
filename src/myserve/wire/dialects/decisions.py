"""Decisions: many typed questions about one input, each answered by probabilities. Two protocols, one of them OpenAI's.

`/v1/decisions` is as openai-python 3.57 types it; `/v1/systemone` is what transformers, vLLM and SGLang serve. Both
become transformers' questions: `noul` (yes or no), `choice`, `score`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NotRequired

from pydantic import AfterValidator, Field, StrictBool, WithJsonSchema, model_validator
from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

from myserve.errors import RequestError
from myserve.wire.base import Integer, WireModel
from myserve.wire.fields import GenerationRequest
from myserve.wire.peers import REFUSED, Refused

__all__ = [
    "Decision",
    "DecisionRequest",
    "DecisionUsage",
    "Diagnostics",
    "LabelLogprob",
    "OpenAIAnswer",
    "SystemOneAnswers",
    "SystemOneRequest",
]

MAX_QUESTIONS = 400  # OpenAI's own limit
MAX_OPTIONS = 255  # likewise


def _is_state(value: Any) -> Any:
    if not isinstance(value, (str, dict, list)):
        raise ValueError("should be a text, an object or a list")
    return value


# a union would have pydantic look at each value of it twice, with Python's lock held
State = Annotated[
    Any,
    AfterValidator(_is_state),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "object", "additionalProperties": True},
                {"type": "array", "items": {}},
            ]
        }
    ),
]
Json = dict[str, Any] | tuple[dict[str, Any], ...]


class DecisionFields(WireModel):
    """Hold the fields of both protocols: the model, and ours about how it is run."""

    REFUSED: ClassVar[Mapping[str, Refused]] = {
        **{name: refused for name, refused in REFUSED.items() if name not in ("tools", "tool_choice")},
        # an answer comes whole, and its questions are apart from one another
        "stream": Refused((False,)),
        "joint": Refused((False,)),
        "images": Refused(([],)),
        "audio": Refused(([],)),
        "videos": Refused(([],)),
        "assets": Refused(({},)),
    }

    model: Annotated[str, Field(min_length=1)]
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_ids: bool | None = None  # each prompt's ids, in its diagnostics
    cache_salt: str | None = None
    priority: Integer | None = None
    request_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    def as_generation(self) -> GenerationRequest:
        """Return what is asked of the engine, beside the prompts."""
        return GenerationRequest(
            model=self.model,
            cache_salt=self.cache_salt,
            priority=self.priority,
            request_timeout=self.request_timeout,
        )


class SystemOneRequest(DecisionFields):
    """`POST /v1/systemone`. The questions' fields are transformers' to check.

    >>> SystemOneRequest(model="m", state="2+2=4", questions={"right": {"type": "noul"}}).questions["right"]
    {'type': 'noul'}
    """

    REFUSED: ClassVar[Mapping[str, Refused]] = {
        **DecisionFields.REFUSED,
        "instructions": Refused(("",), "state"),
    }

    state: State
    questions: Annotated[dict[str, dict[str, Any]], Field(min_length=1, max_length=MAX_QUESTIONS)]


class InputPart(WireModel):
    """A piece of an input or of instructions: text, or JSON that is written as text."""

    HINTS: ClassVar[frozenset[str]] = frozenset({"prompt_cache_breakpoint", "annotations", "logprobs"})

    type: str
    text: str | None = None
    refusal: str | None = None
    data: Json | None = None

    @model_validator(mode="after")
    def _is_text(self) -> InputPart:
        needed = {"input_text": "text", "output_text": "text", "refusal": "refusal", "input_json": "data"}
        if self.type not in needed:
            raise ValueError(f"parts of type {self.type!r} are not supported: this model reads text alone")
        if getattr(self, needed[self.type]) is None:
            raise ValueError(f"a part of type {self.type!r} needs {needed[self.type]!r}")
        return self

    def as_text(self) -> str:
        if self.data is not None and self.type == "input_json":
            return json.dumps(self.data, ensure_ascii=False, separators=(",", ":"))
        return self.text or self.refusal or ""


Content = str | Annotated[tuple[InputPart, ...], Field(fail_fast=True)]


def _text(content: Content | None) -> str:
    """Return a content's text; a line for each part, as vLLM has it."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.as_text() for part in content)


class InputItem(WireModel):
    """A message, a call of a tool, or what a tool has answered."""

    HINTS: ClassVar[frozenset[str]] = frozenset({"phase", "id", "status", "namespace"})
    NEEDED: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "message": ("role", "content"),
        "function_call": ("call_id", "name", "arguments"),
        "function_call_output": ("call_id", "output"),
        "custom_tool_call": ("call_id", "name", "input"),
        "custom_tool_call_output": ("call_id", "output"),
    }

    type: Literal[
        "message",
        "function_call",
        "function_call_output",
        "custom_tool_call",
        "custom_tool_call_output",
    ] = "message"
    role: Literal["user", "developer", "system", "assistant"] | None = None
    content: Content | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    input: str | None = None
    output: Content | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> InputItem:
        for name in self.NEEDED[self.type]:
            if getattr(self, name) is None:
                raise ValueError(f"an item of type {self.type!r} needs {name!r}")
        return self

    def as_state(self) -> dict[str, str]:
        """Return the item as the model reads it, in JSON."""
        shown = {name: getattr(self, name) for name in self.NEEDED[self.type]}
        kind = {} if self.type == "message" else {"type": self.type}
        texts = {name: value if isinstance(value, str) else _text(value) for name, value in shown.items()}
        return kind | texts


class PredicateQuestion(WireModel):
    """A statement about the input, and how likely it is true."""

    type: Literal["predicate"]
    instructions: Content
    name: str | None = None

    def as_question(self) -> dict[str, Any]:
        return {"type": "noul", "instructions": _text(self.instructions)}


class ChoiceOption(WireModel):
    """One of the options. A string and a boolean of the same text are two."""

    value: str | StrictBool
    description: str | None = None


class ChoiceQuestion(WireModel):
    """A choice among options."""

    type: Literal["choice"]
    instructions: Content
    choices: Annotated[tuple[ChoiceOption, ...], Field(fail_fast=True, min_length=2, max_length=MAX_OPTIONS)]
    name: str | None = None

    @property
    def has_distinct_values(self) -> bool:
        return len({(type(choice.value), choice.value) for choice in self.choices}) == len(self.choices)

    def as_question(self) -> dict[str, Any]:
        texts = [_shown(choice.value) for choice in self.choices]
        if len(set(texts)) < len(texts):
            # "true" beside true: both as JSON has them
            texts = [json.dumps(choice.value, ensure_ascii=False) for choice in self.choices]
        descriptions = [choice.description or None for choice in self.choices]
        return {
            "type": "choice",
            "instructions": _text(self.instructions),
            "criteria": dict(zip(texts, descriptions, strict=True)),
        }


def _shown(value: str | bool) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class ScoreLevel(WireModel):
    """A level of a scale."""

    label: str
    description: str | None = None


class ScoreQuestion(WireModel):
    """A level on a scale: the levels are in order, the first is 0."""

    type: Literal["score"]
    instructions: Content
    levels: Annotated[tuple[ScoreLevel, ...], Field(fail_fast=True, min_length=2, max_length=MAX_OPTIONS)]
    name: str | None = None

    def as_question(self) -> dict[str, Any]:
        criteria = [
            f"{level.label}: {level.description}" if level.description else level.label
            for level in self.levels
        ]
        return {"type": "score", "instructions": _text(self.instructions), "criteria": criteria}


Question = Annotated[PredicateQuestion | ChoiceQuestion | ScoreQuestion, Field(discriminator="type")]


class DecisionRequest(DecisionFields):
    """`POST /v1/decisions`.

    >>> asked = DecisionRequest(model="m", input="2+2=4", questions=(PredicateQuestion(type="predicate",
    ...     instructions="Is it right?"),))
    >>> asked.as_state(), asked.as_questions()
    ('2+2=4', {'0': {'type': 'noul', 'instructions': 'Is it right?'}})
    """

    input: str | Annotated[tuple[InputItem, ...], Field(fail_fast=True, min_length=1)]
    questions: Annotated[tuple[Question, ...], Field(fail_fast=True, min_length=1, max_length=MAX_QUESTIONS)]

    def check(self) -> None:
        """Raise RequestError for options that are equal, and for what a tool has answered to no call."""
        for position, question in enumerate(self.questions):
            if isinstance(question, ChoiceQuestion) and not question.has_distinct_values:
                name = f"questions[{position}].choices"
                raise RequestError(f"{name}: each must have a value of its own", param=name)
        called: set[str | None] = set()
        for position, item in enumerate(self.input if isinstance(self.input, tuple) else ()):
            if item.type.endswith("_call"):
                called.add(item.call_id)
            elif item.type.endswith("_output") and item.call_id not in called:
                raise RequestError(
                    f"input[{position}].call_id names no call before it: {item.call_id!r:.80}",
                    param=f"input[{position}].call_id",
                )

    def as_state(self) -> str | list[Any]:
        """Return the input as text, where it is one user's text alone; else its items, with who said what."""
        if isinstance(self.input, str):
            return self.input
        if len(self.input) == 1 and self.input[0].role == "user":
            return _text(self.input[0].content)
        return [item.as_state() for item in self.input]

    def as_questions(self) -> dict[str, dict[str, Any]]:
        """Return the questions as transformers has them, by their place."""
        return {str(place): question.as_question() for place, question in enumerate(self.questions)}


class LabelLogprob(TypedDict):
    """A label, which option it stands for, and its raw logprob; null where its probability is 0."""

    option: str
    label: str
    token_id: int
    logprob: float | None


class Argmax(TypedDict):
    """The likeliest token of all."""

    token: str
    token_id: int
    logprob: float


class Diagnostics(TypedDict):
    """Numbers that say how far an answer can be trusted: its probabilities are of the labels alone."""

    label_mass: float  # what all labels have together of the model's own distribution
    argmax_is_label: bool
    argmax: Argmax
    labels: list[LabelLogprob]
    weight_version: int
    cached_tokens: int
    adapter_version: NotRequired[int]
    prompt_token_ids: NotRequired[list[int]]


class SystemOneUsage(TypedDict):
    input_tokens: int
    output_tokens: int


class SystemOneAnswers(TypedDict):
    """The answers by their questions' names, as transformers writes them."""

    id: str
    object: Literal["structured_decision"]
    created: int
    model: str
    answers: dict[str, dict[str, Any]]
    usage: SystemOneUsage
    diagnostics: dict[str, Diagnostics]
    system_fingerprint: str
    warnings: list[str]  # what was asked for and has no effect


class CachedTokens(TypedDict):
    cached_tokens: int
    cache_write_tokens: int


class ReasoningTokens(TypedDict):
    reasoning_tokens: int


class DecisionUsage(TypedDict):
    """Every question's prompt counts whole; what they share is among `cached_tokens`."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class OptionProbability(TypedDict):
    """A choice's value, or a level's place and label, and its probability."""

    value: str | bool | int
    probability: float
    label: NotRequired[str]


class OpenAIAnswer(TypedDict):
    """An answer: which fields there are, its `type` says."""

    type: Literal["predicate", "choice", "score", "refusal"]
    name: str | None
    probability: NotRequired[float]
    choice: NotRequired[str | bool]
    score: NotRequired[float]
    confidence: NotRequired[float]
    probabilities: NotRequired[list[OptionProbability]]
    diagnostics: Diagnostics


class Decision(TypedDict):
    """The answers in the order of their questions."""

    id: str
    created: int
    model: str
    answers: list[OpenAIAnswer]
    usage: DecisionUsage
    system_fingerprint: str
    warnings: list[str]
