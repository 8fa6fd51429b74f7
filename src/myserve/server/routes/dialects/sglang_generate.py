"""SGLang's native route: prompts as ids or text, alone or as a batch; what it says stands in `meta_info`."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from myserve.engine.outputs import Delta, PromptLogprob, TokenOutput
from myserve.engine.requests.lengths import LengthFields
from myserve.errors import RequestError
from myserve.server.answers.answer import ActiveAnswer
from myserve.server.answers.marked import weight_versions
from myserve.server.answers.npy import as_int32, int32_base64, routed_rows
from myserve.server.answers.respond import answer_request
from myserve.server.answers.writer import AnswerWriter, Body, Plan
from myserve.server.choice import Choice
from myserve.server.prompts.lengths import check_lengths
from myserve.server.prompts.sampling import check_top_logprobs, native_params, work_of_params
from myserve.server.routes.body import documented, models_of, read_request, settings_of
from myserve.wire.completions import CompletionRequest
from myserve.wire.dialects.sglang_generate import (
    MAX_NEW_TOKENS,
    LogprobTriple,
    MetaInfo,
    NativeAnswer,
    NativeGenerate,
)

__all__ = ["router"]

router = APIRouter(tags=["SGLang"])

CHARS_PER_PROMPT = 64  # characters that are tokenized in the time that it takes to begin

Pairs = Iterable[tuple[int, float | None]]


@router.post("/generate", openapi_extra=documented(NativeGenerate, NativeAnswer, NativeAnswer))
@router.put("/generate", openapi_extra=documented(NativeGenerate, NativeAnswer, NativeAnswer))
async def generate_natively(http: Request) -> Response:
    """Draw completions; whole, or as server-sent events that each repeat what came before."""
    request = await read_request(http, NativeGenerate)
    name = request.named_model or models_of(http).names[0]
    count = len(request.prompts)
    each = [request.as_completion(name, index) for index in range(count)]
    for one in each:
        check_top_logprobs(one, settings_of(http).max_logprobs)

    async def plan(answer: ActiveAnswer[CompletionRequest]) -> Plan:
        if (
            answer.adapter is not None
            and {answer.adapter} != {*(request.adapters or [answer.adapter])}
            and request.model
        ):
            raise RequestError(
                f"model is the adapter {answer.adapter[:200]!r}, and lora_path another", param="lora_path"
            )
        codec, longest = answer.model.codec, answer.model.engine.max_model_len
        texts = [prompt for prompt in request.prompts if isinstance(prompt, str)]

        def plan() -> Plan:
            check_lengths(texts, codec, longest, param="text")
            prompts: list[Sequence[int]] = [
                codec.encode(prompt) if isinstance(prompt, str) else prompt for prompt in request.prompts
            ]
            params = []
            for index, (one, prompt) in enumerate(zip(each, prompts, strict=True)):
                limit = request.sampling(index).max_new_tokens
                if (
                    limit == MAX_NEW_TOKENS
                    and "max_new_tokens" not in request.sampling(index).model_fields_set
                ):
                    limit = max(
                        1, min(limit, longest - len(prompt))
                    )  # a default never makes a request too long
                start = request.logprob_start(index, len(prompt))
                asked = request.top_logprobs(index) if start < len(prompt) else None
                if asked is None and (request.return_routed_experts or limit == 0):
                    asked = 0  # so that every position of the prompt is run
                params.append(
                    native_params(
                        one,
                        codec,
                        max_tokens=limit,
                        prompt_logprobs=asked,
                        # SGLang lists the token at `start` without a logprob
                        prompt_logprob_start=max(0, min(start, len(prompt) - 1)),
                    )
                )
            writer = NativeWriter(answer, request)
            return Plan(
                prompts,
                params,
                writer,
                request.rids(answer.id),
                request.adapters,
                differ=isinstance(request.sampling_params, tuple),
                fields=LengthFields("text" if texts else "input_ids", "sampling_params.max_new_tokens"),
            )

        size = sum(map(len, texts)) + CHARS_PER_PROMPT * len(texts)
        return await answer.tokenizing.run(size + sum(map(work_of_params, each)), plan)

    answer_id = request.rid if isinstance(request.rid, str) else uuid.uuid4().hex
    return await answer_request(http, request.as_completion(name), plan, answer_id=answer_id)


class NativeWriter(AnswerWriter[CompletionRequest]):
    """Write SGLang's answers: a list for a batch or for several choices, else one."""

    def __init__(self, answer: ActiveAnswer[CompletionRequest], asked: NativeGenerate) -> None:
        super().__init__(answer)
        self._asked = asked
        self._n = answer.request.n or 1
        self._is_list = asked.is_batch or self._n > 1

    def whole(self, choices: Sequence[Choice]) -> Body:
        """Return every choice's answer."""
        written = [self._answer(choice) for choice in choices]
        return written if self._is_list else written[0]

    def gained(self, choice: Choice, delta: Delta) -> Iterator[NativeAnswer]:
        """Return the answer as far as it has come."""
        answer = self._answer(choice)
        if self._is_list:
            answer["index"] = choice.index
        yield answer

    def ended(self, choices: Sequence[Choice]) -> Iterable[Body]:
        """Return nothing: usage stands in every event."""
        return ()

    def _answer(self, choice: Choice) -> NativeAnswer:
        answer: NativeAnswer = {
            "text": "".join(choice.texts),
            "output_ids": [token.token_id for token in choice.sampled],
            "meta_info": self._meta_info(choice),
        }
        if self._asked.return_prompt_token_ids:
            answer["prompt_token_ids"] = list(choice.prompt_token_ids)
        return answer

    def _meta_info(self, choice: Choice) -> MetaInfo:
        model, sampled = self.answer.model, choice.sampled
        current = choice.weight_version if choice.weight_version is not None else model.engine.weight_version
        meta: MetaInfo = {
            "id": self._id(choice),
            "finish_reason": None if choice.last is None else finish_reason(choice, choice.last),
            "prompt_tokens": len(choice.prompt_token_ids),
            "completion_tokens": len(sampled),
            "cached_tokens": choice.metrics.cached_tokens,
            "weight_version": model.snapshots.labels.of(current),
            "weight_versions": weight_versions(sampled, model.snapshots.labels),
            "num_retractions": sum(token.recomputed for token in sampled),
            "e2e_latency": time.perf_counter() - self.answer.began,
            "seed": choice.seed,
        }
        if choice.adapter_version is not None:
            meta["adapter_version"] = choice.adapter_version
        if self.answer.session is not None and choice.last is not None:
            meta["session"] = self.answer.session.told(choice)
        if self._asked.returns_logprobs(choice.prompt):
            self._add_logprobs(meta, choice)
        self._add_supports(meta, choice)
        shape = model.engine.routing_shape
        if self._asked.return_routed_experts and shape is not None and choice.last is not None:
            rows = routed_rows(choice, shape, self._asked.routed_experts_start_len)
            if rows is not None:
                meta["routed_experts"] = as_int32(rows)
        return meta

    def _id(self, choice: Choice) -> str:
        own = self._asked.rids(self.answer.id)[choice.prompt]
        return own if self._n == 1 else f"{own}_{choice.index % self._n}"

    def _add_logprobs(self, meta: MetaInfo, choice: Choice) -> None:
        asked, at, sampled = self._asked, choice.prompt, choice.sampled
        scale = asked.sampling(at).is_scaled
        start = asked.logprob_start(at, len(choice.prompt_token_ids))
        scored = (choice.prompt_logprobs or ())[start:]
        meta["input_token_logprobs"] = [
            self._triple(token.token_id, token.logprob if i else None) for i, token in enumerate(scored)
        ]
        meta["output_token_logprobs"] = [
            self._triple(token.token_id, logprob_of(token, scaled=scale)) for token in sampled
        ]
        meta["output_token_logprobs_length"] = len(sampled)
        top = asked.top_logprobs(at)
        if top > 0:
            meta["input_top_logprobs"] = self._of_prompt(
                scored, [token.top_logprobs[:top] for token in scored]
            )
            meta["output_top_logprobs"] = [
                self._listed(token.top_logprobs, token, scale) for token in sampled
            ]
        if asked.logprob_ids(at):
            meta["input_token_ids_logprobs"] = self._of_prompt(scored, [t.token_id_logprobs for t in scored])
            meta["output_token_ids_logprobs"] = [
                self._listed(token.token_id_logprobs, token, scale) for token in sampled
            ]

    def _of_prompt(
        self, scored: Sequence[PromptLogprob], pairs: Sequence[Pairs]
    ) -> list[list[LogprobTriple] | None]:
        """Return the prompt's lists; SGLang has nothing for the first token that it lists."""
        return [
            [self._triple(i, value) for i, value in each] if position else None
            for position, (_, each) in enumerate(zip(scored, pairs, strict=True))
        ]

    def _listed(self, pairs: Pairs, token: TokenOutput, scaled: bool) -> list[LogprobTriple]:
        shift = support_log_mass(token) if scaled else 0.0
        return [self._triple(i, None if value is None else value + shift) for i, value in pairs]

    def _triple(self, token_id: int, logprob: float | None) -> LogprobTriple:
        text = self.answer.tokens.text(token_id) if self._asked.return_text_in_logprobs else None
        return (logprob if logprob is None or math.isfinite(logprob) else None, token_id, text)

    def _add_supports(self, meta: MetaInfo, choice: Choice) -> None:
        supports = [list(token.kept.token_ids) for token in choice.sampled if token.kept is not None]
        if self._asked.returns_mask(choice.prompt):
            meta["output_token_sampling_mask"] = supports
            meta["output_token_sampling_logprobs"] = [token.sampling_logprob for token in choice.sampled]
        if self._asked.sampling(choice.prompt).returns_support:
            offsets = [0]
            for support in supports:
                offsets.append(offsets[-1] + len(support))
            meta["top_p_token_ids"] = int32_base64([i for support in supports for i in support])
            meta["top_p_token_offsets"] = int32_base64(offsets)


def logprob_of(token: TokenOutput, *, scaled: bool) -> float:
    """Return SGLang's logprob of a token: of the scores after penalties and temperature, before any truncation.

    The model's own where nothing has changed the scores; else the one that the token was drawn with, and the mass of
    what it was drawn from.
    """
    return token.sampling_logprob + support_log_mass(token) if scaled else token.logprob


def support_log_mass(token: TokenOutput) -> float:
    """Return the log of the probability that the draw's support had before the rest was taken out."""
    return math.log(token.kept.mass) if token.kept is not None and token.kept.mass > 0 else 0.0


def finish_reason(choice: Choice, last: Delta) -> dict[str, Any]:
    """Return SGLang's finish reason of a choice that has ended."""
    count = len(choice.sampled)
    if last.finish_reason == "length":
        return {"type": "length", "length": count}
    if last.finish_reason == "abort":
        # AReaL knows by the first word that there is nothing to be kept
        message = "Abort before prefill" if count == 0 else "Aborted by the server's control plane"
        return {"type": "abort", "message": message}
    matched = last.stop_reason
    if matched is None and choice.sampled:
        matched = choice.sampled[-1].token_id
    return {"type": "stop", "matched": matched}
