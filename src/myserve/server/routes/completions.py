"""Completions: prompts as text or ids, echoed and scored where asked, in OpenAI's older form or in chat's."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from functools import partial

from fastapi import APIRouter, Request, Response

from myserve.engine.outputs import Delta, TokenOutput
from myserve.engine.requests.lengths import checked_max_tokens
from myserve.server.answers.answer import ActiveAnswer, UsageSoFar, finish_reason_of, usage_of
from myserve.server.answers.generation import params_of_prompts
from myserve.server.answers.logprobs import TextOffsets, legacy
from myserve.server.answers.respond import answer_request
from myserve.server.answers.writer import AnswerWriter, Plan
from myserve.server.choice import Choice
from myserve.server.prompts.codec import Codec
from myserve.server.prompts.lengths import check_lengths
from myserve.server.prompts.sampling import (
    completion_params,
    lists_tokens,
    tells_text_alone,
    top_logprobs_of,
    wants_logprobs,
    work_of_params,
)
from myserve.server.routes.body import documented, read_request
from myserve.wire.completions import CompletionRequest
from myserve.wire.responses import (
    ChatLogprobs,
    Completion,
    CompletionChoice,
    LegacyLogprobs,
    TokenLogprob,
)

__all__ = ["plan_completion", "router"]

router = APIRouter()

CHARS_PER_PROMPT = 64  # characters that are tokenized in the time that it takes to begin
CHARS_AT_ONCE = 1 << 18  # that one request has the tokenizer's thread for

DOCUMENTED = documented(CompletionRequest, Completion, Completion)


@router.post("/v1/completions", openapi_extra=DOCUMENTED)
@router.post("/inference/v1/completions", openapi_extra=DOCUMENTED)
async def create_completion(http: Request) -> Response:
    """Draw `n` completions of one or many prompts; whole, or as server-sent events with `stream`."""
    request = await read_request(http, CompletionRequest)
    return await answer_request(http, request, plan_completion, answer_id=f"cmpl-{uuid.uuid4().hex}")


async def plan_completion(answer: ActiveAnswer[CompletionRequest]) -> Plan:
    """Return the draws of a request.

    Prompts are tokenized by groups: other requests' go in between, and the first that is too long ends it.
    """
    request, codec = answer.request, answer.model.codec
    max_model_len = answer.model.engine.max_model_len
    adds_special = request.add_special_tokens is not False

    def encode(group: Sequence[str | Sequence[int]]) -> list[Sequence[int]]:
        check_lengths([text for text in group if isinstance(text, str)], codec, max_model_len, param="prompt")
        encoded: list[Sequence[int]] = [
            codec.encode(prompt, add_special_tokens=adds_special) if isinstance(prompt, str) else prompt
            for prompt in group
        ]
        for prompt in encoded:
            checked_max_tokens(len(prompt), 0 if request.max_tokens == 0 else None, max_model_len)
        return encoded

    prompts: list[Sequence[int]] = []
    for group, size in _groups(request.prompts):
        prompts += await answer.tokenizing.run(size, partial(encode, group))

    def plan() -> Plan:
        params = completion_params(request, codec, room=max_model_len - max(map(len, prompts)))
        return Plan(prompts, params_of_prompts(params, len(prompts)), CompletionWriter(answer))

    return await answer.tokenizing.run(CHARS_PER_PROMPT * (len(prompts) - 1) + work_of_params(request), plan)


def _groups(
    prompts: Sequence[str | Sequence[int]],
) -> Iterator[tuple[list[str | Sequence[int]], int]]:
    """Yield the prompts in groups that are tokenized at once, each with its size in characters.

    >>> [(len(group), size) for group, size in _groups(["a" * 200_000, "b" * 100_000, "c", (1, 2)])]
    [(2, 300128), (2, 65)]
    """
    group: list[str | Sequence[int]] = []
    size = 0
    for prompt in prompts:
        group.append(prompt)
        size += len(prompt) + CHARS_PER_PROMPT if isinstance(prompt, str) else 0
        if size >= CHARS_AT_ONCE:
            yield group, size
            group, size = [], 0
    if group:
        yield group, size


class CompletionWriter(AnswerWriter[CompletionRequest]):
    """Write OpenAI's older shape; remember how far each choice's text has come."""

    def __init__(self, answer: ActiveAnswer[CompletionRequest]) -> None:
        super().__init__(answer)
        self._so_far: UsageSoFar | None = None
        self._tells_text_alone = tells_text_alone(answer.request)
        self._offsets: dict[int, TextOffsets] = {}  # of each choice that has begun

    def whole(self, choices: Sequence[Choice]) -> Completion:
        """Return all choices, with usage."""
        body = self._envelope(
            [
                self._write(choice, "".join(choice.texts), choice.tokens, choice.stop_tokens, last=True)
                for choice in choices
            ]
        )
        body["usage"] = usage_of(choices)
        return body

    def began(self, choices: Sequence[Choice]) -> Iterator[Completion]:
        """Begin to count the usage so far."""
        if self.request.includes_usage_so_far:
            self._so_far = UsageSoFar(choices)
        return iter(())

    def gained(self, choice: Choice, delta: Delta) -> Iterator[Completion]:
        """Return one chunk with what the choice gained."""
        last = delta.finish_reason is not None
        chunk = self._envelope([self._write(choice, delta.text, delta.tokens, delta.stop_tokens, last=last)])
        if self.request.include_usage:
            chunk["usage"] = None if self._so_far is None else self._so_far.add(choice, delta)
        yield chunk

    def is_text_alone(self, choice: Choice) -> bool:
        """Return True behind the first chunk where no list of tokens and no usage so far was asked for."""
        return choice.index in self._offsets and self._tells_text_alone

    def ended(self, choices: Sequence[Choice]) -> Iterator[Completion]:
        """Return usage as the last chunk, where it was asked for."""
        if self.request.include_usage:
            yield {**self._envelope([]), "usage": usage_of(choices)}

    def _envelope(self, choices: list[CompletionChoice]) -> Completion:
        return {
            "id": self.answer.id,
            "object": "text_completion",
            "created": self.answer.created,
            "model": self.request.model,
            "system_fingerprint": self.answer.fingerprint,
            "choices": choices,
        }

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
        echoed_text = self._echoed_text(choice, echoed) if echoed else ""
        if first:
            self._offsets[choice.index] = TextOffsets(self._codec.token_bytes, start=len(echoed_text))
        entries: list[TokenLogprob] = []
        if lists_tokens(self.request):
            entries = self._entries(tokens, stop_tokens)
            self._offsets[choice.index].write(entries)
            entries = self._echoed_entries(choice, echoed, echoed_text) + entries
        return {
            "index": choice.index,
            "text": echoed_text + text,
            "logprobs": self._logprobs(entries),
            "finish_reason": finish_reason_of(choice) if last else None,
            **self.answer.extras(
                choice, [*tokens, *stop_tokens], first=first, last=last, echoed=self._echoed(choice)
            ),
        }

    @property
    def _codec(self) -> Codec:
        return self.answer.model.codec

    @property
    def _skips_special(self) -> bool:
        return self.request.skip_special_tokens is not False

    def _echoed(self, choice: Choice) -> Sequence[int]:
        """Return the prompt's ids that the answer begins with."""
        ids = choice.prompt_token_ids
        if self.request.echo_last is not None:
            return ids[max(0, len(ids) - self.request.echo_last) :]
        return ids if self.request.echo else ()

    def _echoed_text(self, choice: Choice, echoed: Sequence[int]) -> str:
        """Return a prompt as it was sent; of ids, their text, and of a prompt's end what it adds to the rest."""
        prompt = self.request.prompts[choice.prompt]
        if echoed and isinstance(prompt, str) and self.request.echo_last is None:
            return prompt  # a tokenizer may have added a space or a BOS
        if len(echoed) < len(choice.prompt_token_ids):
            return self._codec.token_bytes.text(echoed, skip_special_tokens=self._skips_special)
        return self._codec.decode(echoed, skip_special_tokens=self._skips_special)

    def _echoed_entries(self, choice: Choice, echoed: Sequence[int], echoed_text: str) -> list[TokenLogprob]:
        if not echoed or not choice.prompt_logprobs:
            return []
        table, top = self._codec.token_bytes, top_logprobs_of(self.request)
        places = table.places(echoed, echoed_text, skip_special_tokens=self._skips_special)
        entries = []
        for token, (begin, text_bytes) in zip(choice.prompt_logprobs[-len(echoed) :], places, strict=True):
            entry = self.answer.tokens.prompt_entry(token, top, text_bytes)
            entry["text_offset"] = begin
            entries.append(entry)
        if self.request.raw_output and len(entries) == len(choice.prompt_token_ids):
            # Fireworks' client wants a number in every row, or it drops all; then it drops this one.
            entries[0]["logprob"] = 0.0
        return entries

    def _entries(
        self, tokens: Sequence[TokenOutput], stop_tokens: Sequence[TokenOutput]
    ) -> list[TokenLogprob]:
        writer = self.answer.tokens
        entries = [writer.entry(token) for token in tokens]
        # Scoring and training count tokens: the one that ended the completion must not be missing then.
        if self.answer.returns_ids or self.request.echo or self.request.echo_last:
            entries += [writer.entry(token, in_text=False) for token in stop_tokens]
        return entries

    def _logprobs(self, entries: list[TokenLogprob]) -> LegacyLogprobs | ChatLogprobs | None:
        """Return the four lists for a number in `logprobs`; chat's form for `true`, or for routing alone."""
        if not lists_tokens(self.request):
            return None
        is_legacy = wants_logprobs(self.request) and self.request.logprobs is not True
        processed = self.request.logprobs_mode == "processed"
        return legacy(entries, processed=processed) if is_legacy else {"content": entries}
