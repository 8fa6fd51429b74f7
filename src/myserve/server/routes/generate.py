"""Tokens in, tokens out, in vLLM's terms: no text is read, none is written, every sampled token is listed."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from myserve.engine.outputs import Delta, TokenOutput
from myserve.engine.requests.lengths import LengthFields
from myserve.server.answers.answer import ActiveAnswer, finish_reason_of, usage_of
from myserve.server.answers.marked import weight_versions
from myserve.server.answers.npy import as_npy, named_matrix, routed_rows
from myserve.server.answers.respond import answer_request
from myserve.server.answers.writer import AnswerWriter, Plan
from myserve.server.choice import Choice
from myserve.server.prompts.sampling import generate_params, lists_tokens, work_of_params
from myserve.server.routes.body import documented, models_of, read_request
from myserve.wire.completions import CompletionRequest
from myserve.wire.generate import GenerateRequest
from myserve.wire.responses import GenerateChoice, Generated

__all__ = ["router"]

router = APIRouter()

LENGTH_FIELDS = LengthFields("token_ids", "sampling_params.max_tokens")


@router.post("/inference/v1/generate", openapi_extra=documented(GenerateRequest, Generated, Generated))
async def generate(http: Request) -> Response:
    """Draw `n` completions of one prompt of ids; whole, or as server-sent events with `stream`."""
    request = await read_request(http, GenerateRequest)
    completion = request.as_completion(request.model or models_of(http).names[0])

    async def plan(answer: ActiveAnswer[CompletionRequest]) -> Plan:
        params = await answer.tokenizing.run(
            work_of_params(completion), lambda: generate_params(request, completion, answer.model.codec)
        )
        writer = GenerateWriter(answer, request)
        return Plan([request.token_ids], [params], writer, fields=LENGTH_FIELDS)

    answer_id = request.request_id or f"gen-{uuid.uuid4().hex}"
    return await answer_request(http, completion, plan, answer_id=answer_id)


class GenerateWriter(AnswerWriter[CompletionRequest]):
    """Write vLLM's answer of ids. A stream has a chunk for each step that brought a choice tokens or its end."""

    def __init__(self, answer: ActiveAnswer[CompletionRequest], asked: GenerateRequest) -> None:
        super().__init__(answer)
        self._repeats_prompt = bool(asked.return_token_ids)
        self._names_ids = bool(asked.sampling_params.named_rows)
        self._start = asked.sampling_params.prompt_logprob_start or 0

    def whole(self, choices: Sequence[Choice]) -> Generated:
        """Return all choices, with usage and the prompt's scores beside them."""
        body = self._envelope([self._choice(choice, choice.sampled, last=True) for choice in choices])
        body["usage"] = usage_of(choices)
        body["prompt_logprobs"] = self._prompt_logprobs(choices[0])
        if self._names_ids and choices[0].prompt_logprobs is not None:
            body["prompt_token_id_logprobs"] = named_matrix(choices[0].prompt_logprobs[1 + self._start :])
        if self._repeats_prompt:
            body["prompt_token_ids"] = list(choices[0].prompt_token_ids)
        return body

    def gained(self, choice: Choice, delta: Delta) -> Iterator[Generated]:
        """Return one chunk; the prompt's scores come with the first."""
        last = delta.finish_reason is not None
        chunk = self._envelope([self._choice(choice, [*delta.tokens, *delta.stop_tokens], last=last)])
        if delta.prompt_logprobs is not None:
            chunk["prompt_logprobs"] = self._prompt_logprobs(choice)
        yield chunk

    def ended(self, choices: Sequence[Choice]) -> Iterator[Generated]:
        """Return usage as the last chunk, where it was asked for."""
        if self.request.include_usage:
            yield {**self._envelope([]), "usage": usage_of(choices)}

    def _envelope(self, choices: list[GenerateChoice]) -> Generated:
        return {
            "request_id": self.answer.id,
            "model": self.request.model,
            "created": self.answer.created,
            "choices": choices,
        }

    def _choice(self, choice: Choice, tokens: Sequence[TokenOutput], *, last: bool) -> GenerateChoice:
        writer = self.answer.tokens
        entries = [writer.entry(token) for token in tokens] if lists_tokens(self.request) else None
        supports = [list(token.kept.token_ids) for token in tokens if token.kept is not None]
        marks: GenerateChoice = {"sampling_mask": supports} if supports else {}
        if last:
            shape = self.answer.model.engine.routing_shape
            if self.request.include_routing_matrix and shape is not None:
                rows = routed_rows(choice, shape)
                marks["routed_experts"] = None if rows is None else as_npy(rows)
            marks["weight_versions"] = weight_versions(choice.sampled, self.answer.model.snapshots.labels)
        return {
            "index": choice.index,
            "logprobs": None if entries is None else {"content": entries},
            "finish_reason": finish_reason_of(choice) if last else None,
            "token_ids": [token.token_id for token in tokens],
            "seed": choice.seed,
            **self.answer.extras(choice, tokens, first=False, last=last),
            **marks,
        }

    def _prompt_logprobs(self, choice: Choice) -> list[dict[str, Any] | None] | None:
        asked = self.request.prompt_logprobs
        if asked is None or choice.prompt_logprobs is None:
            return None
        return [self.answer.tokens.prompt_ranks(token, asked) for token in choice.prompt_logprobs]
