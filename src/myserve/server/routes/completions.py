"""Completions: prompts as text or ids, echoed and scored where asked, in OpenAI's older form or in chat's."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from fastapi import APIRouter, Request, Response

from myserve.engine.outputs import Delta, TokenOutput
from myserve.server.answers.answer import ActiveAnswer, finish_reason_of, usage_of
from myserve.server.answers.generation import Generation, params_of_prompts
from myserve.server.answers.logprobs import legacy, with_offsets
from myserve.server.answers.streaming import EventStream, json_response, unless_gone
from myserve.server.choice import Choice
from myserve.server.models.models import ServedModel
from myserve.server.prompts.sampling import completion_params, lists_tokens, top_logprobs_of, wants_logprobs
from myserve.server.routes.body import documented, models_of, read_request
from myserve.wire.completions import CompletionRequest
from myserve.wire.responses import (
    ChatLogprobs,
    Completion,
    CompletionChoice,
    LegacyLogprobs,
    TokenLogprob,
)

router = APIRouter()

CHARS_PER_PROMPT = 64  # characters that are tokenized in the time that it takes to begin


DOCUMENTED = documented(CompletionRequest, Completion, Completion)


@router.post("/v1/completions", openapi_extra=DOCUMENTED)
@router.post("/inference/v1/completions", openapi_extra=DOCUMENTED)
async def create_completion(http: Request) -> Response:
    """One or many prompts, `n` completions of each; whole, or as server-sent events with `stream`."""
    request = await read_request(http, CompletionRequest)
    model = await models_of(http).get(request.model)
    answer = ActiveAnswer.begin(request, model, "cmpl")
    prompts = await _token_ids(answer, model, request.prompts)
    room = model.engine.max_model_len - max(map(len, prompts))
    params = params_of_prompts(completion_params(request, model.codec, room=room), len(prompts))
    await model.engine.prepare(params[0])
    generation = Generation(model, prompts, params, request, answer.id)
    writer = CompletionWriter(answer, request)
    if request.stream:
        return EventStream(_chunks(answer, generation, writer), generation.abort)
    try:
        choices = await unless_gone(http, generation.finish())
    finally:
        generation.abort()
    body = _envelope(answer, [writer.whole(choice) for choice in choices])
    body["usage"] = usage_of(choices)
    if not request.perf_metrics_in_response:
        return json_response(body)
    metrics = answer.perf_metrics(choices)
    body["perf_metrics"] = metrics.to_dict()
    return json_response(body, metrics.to_headers())


async def _token_ids(
    answer: ActiveAnswer, model: ServedModel, prompts: Sequence[str | tuple[int, ...]]
) -> list[Sequence[int]]:
    """All prompts in one go: a thousand short ones would hold up the event loop as one long one does."""
    size = sum(CHARS_PER_PROMPT + len(prompt) for prompt in prompts if isinstance(prompt, str))
    return await answer.tokenizing.run(
        size, lambda: [model.codec.encode(text) if isinstance(text, str) else text for text in prompts]
    )


async def _chunks(
    answer: ActiveAnswer, generation: Generation, writer: CompletionWriter
) -> AsyncGenerator[Completion, None]:
    running = len(generation.choices)
    async with aclosing(generation.events()) as events:
        async for choice, delta in events:
            chunk = _envelope(answer, [writer.chunk(choice, delta)])
            if answer.request.include_usage:
                chunk["usage"] = None
            running -= delta.finish_reason is not None
            if not running and answer.request.perf_metrics_in_response:
                chunk["perf_metrics"] = answer.perf_metrics(generation.choices).to_dict()
            yield chunk
    if answer.request.include_usage:
        yield {**_envelope(answer, []), "usage": usage_of(generation.choices)}


def _envelope(answer: ActiveAnswer, choices: list[CompletionChoice]) -> Completion:
    return {
        "id": answer.id,
        "object": "text_completion",
        "created": answer.created,
        "model": answer.request.model,
        "system_fingerprint": answer.model.fingerprint,
        "choices": choices,
    }


@dataclass(slots=True)
class CompletionWriter:
    """Writes choices, whole or delta by delta; remembers how far each choice's text has come."""

    answer: ActiveAnswer
    request: CompletionRequest
    _offsets: dict[int, int] = field(default_factory=dict)  # choice -> characters written; absent: not begun

    def whole(self, choice: Choice) -> CompletionChoice:
        """A choice that has ended."""
        return self._write(choice, "".join(choice.texts), choice.tokens, choice.stop_tokens, last=True)

    def chunk(self, choice: Choice, delta: Delta) -> CompletionChoice:
        """What a choice gained with `delta`."""
        last = delta.finish_reason is not None
        return self._write(choice, delta.text, delta.tokens, delta.stop_tokens, last=last)

    def _write(
        self,
        choice: Choice,
        text: str,
        tokens: Sequence[TokenOutput],
        stop_tokens: Sequence[TokenOutput],
        *,
        last: bool,
    ) -> CompletionChoice:
        first = choice.index not in self._offsets
        echoed = self._echoed(choice) if first else ()
        entries: list[TokenLogprob] = []
        if lists_tokens(self.request):
            entries = self._entries(choice, echoed, tokens, stop_tokens)
        self._offsets[choice.index] = with_offsets(entries, self._offsets.get(choice.index, 0))
        return {
            "index": choice.index,
            "text": self._echoed_text(choice, echoed) + text,
            "logprobs": self._logprobs(entries),
            "finish_reason": finish_reason_of(choice) if last else None,
            **self.answer.extras(
                choice, [*tokens, *stop_tokens], first=first, last=last, echoed=self._echoed(choice)
            ),
        }

    def _echoed(self, choice: Choice) -> Sequence[int]:
        """The prompt's ids that the answer begins with."""
        ids = choice.prompt_token_ids
        if self.request.echo_last is not None:
            return ids[max(0, len(ids) - self.request.echo_last) :]
        return ids if self.request.echo else ()

    def _echoed_text(self, choice: Choice, echoed: Sequence[int]) -> str:
        prompt = self.request.prompts[choice.prompt]
        if echoed and isinstance(prompt, str) and self.request.echo_last is None:
            return prompt  # as it was sent: a tokenizer may have added a space or a BOS
        skip = self.request.skip_special_tokens is not False
        return self.answer.model.codec.decode(echoed, skip_special_tokens=skip)

    def _entries(
        self,
        choice: Choice,
        echoed: Sequence[int],
        tokens: Sequence[TokenOutput],
        stop_tokens: Sequence[TokenOutput],
    ) -> list[TokenLogprob]:
        writer = self.answer.writer
        top = top_logprobs_of(self.request)
        scored = (choice.prompt_logprobs or ())[-len(echoed) :] if echoed else ()
        entries = [writer.prompt_entry(token, top) for token in scored]
        if self.request.raw_output and len(entries) == len(choice.prompt_token_ids):
            # Fireworks' client wants a number in every row, or it drops all; then it drops this one.
            entries[0]["logprob"] = 0.0
        entries += [writer.entry(token) for token in tokens]
        # Who scores or trains counts tokens: the one that ended the completion must not be missing then.
        if self.answer.returns_ids or self.request.echo or self.request.echo_last:
            entries += [writer.entry(token, in_text=False) for token in stop_tokens]
        return entries

    def _logprobs(self, entries: list[TokenLogprob]) -> LegacyLogprobs | ChatLogprobs | None:
        """A number in `logprobs` asks for the four lists; `true`, or routing alone, for chat's form."""
        if not lists_tokens(self.request):
            return None
        is_legacy = wants_logprobs(self.request) and self.request.logprobs is not True
        return legacy(entries) if is_legacy else {"content": entries}
