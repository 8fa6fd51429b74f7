"""`POST /v1/waterfall`: how one token of a sample came about: it is drawn again, under its own request."""

from __future__ import annotations

import uuid
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field
from typing_extensions import TypedDict

from myserve.core.params import SamplingParams
from myserve.core.waterfall import Waterfall, WaterfallOptions
from myserve.engine.outputs import TokenOutput
from myserve.errors import EngineError, RequestError
from myserve.server.answers.answer import ActiveAnswer
from myserve.server.answers.generation import Generation
from myserve.server.answers.respond import begin_request
from myserve.server.answers.streaming import json_response, unless_gone
from myserve.server.answers.writer import Plan
from myserve.server.routes.body import documented, read_request, settings_of
from myserve.server.routes.chat import plan_chat
from myserve.server.routes.completions import plan_completion
from myserve.wire.base import Integer, WireModel
from myserve.wire.chat import ChatCompletionRequest
from myserve.wire.completions import CompletionRequest
from myserve.wire.fields import TokenIds

__all__ = ["WaterfallAnswer", "WaterfallRequest", "router"]

router = APIRouter()

# what a request asks to be told of its tokens: nothing of it is told here
REPORTS = (
    *("stream", "stream_options", "stream_interval", "logprobs", "top_logprobs", "logprob_token_ids"),
    *("sampling_mask", "kept", "token_stats", "prompt_logprobs", "include_routing_matrix"),
    *("token_arrays", "echo", "echo_last", "best_of"),
)


class WaterfallRequest(WireModel):
    """A request as it was sent, what was drawn, and which of these tokens is asked for."""

    chat: ChatCompletionRequest | None = None
    completion: CompletionRequest | None = None
    seed: Integer | None = None  # of the choice, where the request has none
    choice: Annotated[Integer, Field(ge=0)] = 0  # the choice's index
    completion_token_ids: TokenIds = ()  # of the choice, up to the token at least
    position: Annotated[Integer, Field(ge=0)] | None = None  # of the token; None: the one behind these
    top: Integer = 20

    @property
    def request(self) -> ChatCompletionRequest | CompletionRequest:
        """The request, in either form."""
        request = self.chat or self.completion
        assert request is not None, "checked"
        return request

    @property
    def place(self) -> int:
        """Return how many tokens of the completion come before the one that is asked for."""
        return len(self.completion_token_ids) if self.position is None else self.position

    def check(self) -> None:
        """Raise RequestError for what no field alone is wrong about."""
        if (self.chat is None) == (self.completion is None):
            raise RequestError("send either chat or completion: the request as it was sent", param="chat")
        self.request.check()
        if self.place > len(self.completion_token_ids):
            raise RequestError(
                f"position must be in [0, {len(self.completion_token_ids)}], as completion_token_ids go; got "
                f"{self.place}",
                param="position",
            )
        if self.seed is None and self.request.seed is None and self.request.temperature != 0:
            raise RequestError("send the seed that the choice told: its draw depends on it", param="seed")


class WaterfallStage(TypedDict):
    """Tell what one stage left. Probabilities are of the tokens that are left; `rest`: those not listed."""

    name: str
    num_tokens: int
    num_removed: int
    removed_mass: float
    entropy: float
    rest_tokens: int
    rest_mass: float


class ListedToken(TypedDict):
    """One token through the stages: null from the stage on that removed it."""

    token_id: int
    token: str
    bytes: list[int] | None
    rank: int
    scores: list[float | None]
    probabilities: list[float | None]
    removed_by: str | None
    noise: float | None
    arrival: float | None


class WaterfallDraw(TypedDict):
    """Tell where the draw fell: the first to arrive in the race, or the largest score."""

    kind: str
    token_id: int
    runner_up: int | None
    margin: float | None


class WaterfallAnswer(TypedDict):
    """The waterfall of one token. `is_same`: whether it is the token that was recorded; null where none was."""

    id: str
    object: str
    created: int
    model: str
    position: int
    token_id: int
    token: str
    is_same: bool | None
    logprob: float
    sampling_logprob: float
    seed: int
    weight_version: int
    stages: list[WaterfallStage]
    tokens: list[ListedToken]
    draw: WaterfallDraw
    system_fingerprint: str


@router.post("/v1/waterfall", openapi_extra=documented(WaterfallRequest, WaterfallAnswer))
async def show_waterfall(http: Request) -> Response:
    """Draw one token of a sample again, and return its distribution after every stage and the race that chose it."""
    asked = await read_request(http, WaterfallRequest)
    prompt_index, sample_index = divmod(asked.choice, asked.request.n or 1)
    options = WaterfallOptions(at=asked.place + (asked.request.num_prior_tokens or 0), top=asked.top)
    prior = list(asked.completion_token_ids[: asked.place])

    async def plan(answer: ActiveAnswer[Any]) -> Plan:
        if asked.chat is not None:
            planned = await plan_chat(settings_of(http), answer)
        else:
            planned = await plan_completion(answer)
        if prompt_index >= len(planned.prompts):
            raise RequestError(f"choice: the request has no choice {asked.choice}", param="choice")
        params: SamplingParams = planned.params[prompt_index]
        if asked.seed is not None:
            params = params.with_seed(asked.seed)
        limit = params.max_tokens
        if limit is not None and not asked.request.counts_prior_tokens:
            limit += asked.request.num_prior_tokens or 0  # they are counted below
        params = replace(params, waterfall=options, max_tokens=limit)
        return Plan([[*planned.prompts[prompt_index], *prior]], [params], planned.writer)

    changes: dict[str, Any] = dict.fromkeys(
        name for name in REPORTS if name in type(asked.request).model_fields
    )
    changes |= {
        "n": 1,
        "sample_index": (asked.request.sample_index or 0) + sample_index,
        "num_prior_tokens": options.at,
        "counts_prior_tokens": True,
    }
    request = asked.request.model_copy(update=changes)
    answer, _, generation = await begin_request(
        http, request, plan, answer_id=f"waterfall-{uuid.uuid4().hex}"
    )
    try:
        token = await unless_gone(http, _first_with_waterfall(generation))
    finally:
        generation.abort()
    seed = generation.choices[0].seed
    return json_response(_written(asked, answer, token, seed))


async def _first_with_waterfall(generation: Generation) -> TokenOutput:
    """Wait for the token that was asked for; its text may be held back until others have come."""
    async with aclosing(generation.steps()) as steps:
        async for step in steps:
            for _, delta in step:
                for token in (*delta.tokens, *delta.stop_tokens):
                    if token.waterfall is not None:
                        return token
    raise EngineError("the draw was aborted by the server's control plane")


def _written(
    asked: WaterfallRequest, answer: ActiveAnswer[Any], token: TokenOutput, seed: int
) -> WaterfallAnswer:
    waterfall = token.waterfall
    assert waterfall is not None, "that is what was waited for"
    recorded = asked.completion_token_ids[asked.place : asked.place + 1]
    draw = waterfall.draw
    return {
        "id": answer.id,
        "object": "waterfall",
        "created": answer.created,
        "model": asked.request.model,
        "position": asked.place,
        "token_id": token.token_id,
        "token": answer.tokens.text(token.token_id),
        "is_same": recorded == (token.token_id,) if recorded else None,
        "logprob": token.logprob,
        "sampling_logprob": token.sampling_logprob,
        "seed": seed,
        "weight_version": token.weight_version,
        "stages": [
            {
                "name": stage.name,
                "num_tokens": stage.num_tokens,
                "num_removed": stage.num_removed,
                "removed_mass": stage.removed_mass,
                "entropy": stage.entropy,
                "rest_tokens": stage.rest_tokens,
                "rest_mass": stage.rest_mass,
            }
            for stage in waterfall.stages
        ],
        "tokens": _listed(waterfall, answer),
        "draw": {
            "kind": draw.kind,
            "token_id": draw.token_id,
            "runner_up": draw.runner_up,
            "margin": draw.margin,
        },
        "system_fingerprint": answer.fingerprint,
    }


def _listed(waterfall: Waterfall, answer: ActiveAnswer[Any]) -> list[ListedToken]:
    return [
        {
            "token_id": one.token_id,
            "token": answer.tokens.text(one.token_id),
            "bytes": answer.tokens.bytes_in_text(one.token_id),
            "rank": one.rank,
            "scores": list(one.scores),
            "probabilities": list(one.probabilities),
            "removed_by": one.removed_by,
            "noise": one.noise,
            "arrival": one.arrival,
        }
        for one in waterfall.tokens
    ]
