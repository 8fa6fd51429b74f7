"""Tokens in, tokens out, in vLLM's words: no text is read, none is written, every sampled token is listed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from fastapi import APIRouter, Request, Response

from myserve.engine.outputs import Delta, TokenOutput
from myserve.server.answers.answer import ActiveAnswer, finish_reason_of, usage_of
from myserve.server.answers.generation import Generation
from myserve.server.answers.streaming import EventStream, json_response, unless_gone
from myserve.server.choice import Choice
from myserve.server.prompts.sampling import generate_params, lists_tokens
from myserve.server.routes.body import documented, models_of, read_request
from myserve.wire.generate import GenerateRequest
from myserve.wire.responses import GenerateChoice, Generated

router = APIRouter()


@router.post("/inference/v1/generate", openapi_extra=documented(GenerateRequest, Generated, Generated))
async def generate(http: Request) -> Response:
    """One prompt of ids, `n` completions as ids; whole, or as server-sent events with `stream`."""
    request = await read_request(http, GenerateRequest)
    models = models_of(http)
    model = await models.get(request.model)
    completion = request.as_completion(request.model or models.names[0])
    answer = ActiveAnswer.begin(completion, model, "gen")
    answer.id = request.request_id or answer.id
    params = generate_params(completion, model.codec)
    await model.engine.prepare(params)
    generation = Generation(model, [request.token_ids], [params], completion, answer.id)
    if request.stream:
        return EventStream(_chunks(answer, generation), generation.abort)
    try:
        choices = await unless_gone(http, generation.finish())
    finally:
        generation.abort()
    body = _envelope(answer, [_choice(answer, choice, choice.sampled, last=True) for choice in choices])
    body["usage"] = usage_of(choices)
    body["prompt_logprobs"] = _prompt_logprobs(answer, choices[0])
    if request.return_token_ids:
        body["prompt_token_ids"] = list(request.token_ids)
    return json_response(body)


async def _chunks(answer: ActiveAnswer, generation: Generation) -> AsyncGenerator[Generated, None]:
    """A chunk for each step that brought a choice tokens or its end; the prompt's scores come with the first."""
    async with aclosing(generation.events()) as events:
        async for choice, delta in events:
            chunk = _envelope(answer, [_gained(answer, choice, delta)])
            if delta.prompt_logprobs is not None:
                chunk["prompt_logprobs"] = _prompt_logprobs(answer, choice)
            yield chunk
    if answer.request.include_usage:
        yield {**_envelope(answer, []), "usage": usage_of(generation.choices)}


def _envelope(answer: ActiveAnswer, choices: list[GenerateChoice]) -> Generated:
    return {
        "request_id": answer.id,
        "model": answer.request.model,
        "created": answer.created,
        "choices": choices,
    }


def _gained(answer: ActiveAnswer, choice: Choice, delta: Delta) -> GenerateChoice:
    last = delta.finish_reason is not None
    return _choice(answer, choice, [*delta.tokens, *delta.stop_tokens], last=last)


def _choice(
    answer: ActiveAnswer, choice: Choice, tokens: Sequence[TokenOutput], *, last: bool
) -> GenerateChoice:
    entries = [answer.writer.entry(token) for token in tokens] if lists_tokens(answer.request) else None
    supports = [list(token.kept.token_ids) for token in tokens if token.kept is not None]
    masks: GenerateChoice = {"sampling_mask": supports} if supports else {}
    return {
        "index": choice.index,
        "logprobs": None if entries is None else {"content": entries},
        "finish_reason": finish_reason_of(choice) if last else None,
        "token_ids": [token.token_id for token in tokens],
        "seed": choice.seed,
        **answer.extras(choice, tokens, first=False, last=last),
        **masks,
    }


def _prompt_logprobs(answer: ActiveAnswer, choice: Choice) -> list[dict[str, object] | None] | None:
    asked = answer.request.prompt_logprobs
    if asked is None or choice.prompt_logprobs is None:
        return None
    return [answer.writer.prompt_ranks(token, asked) for token in choice.prompt_logprobs]
