"""Tinker's API, as far as its client samples: sessions that nothing is kept of, promises, and a refusal of training."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from typing import Any

from fastapi import APIRouter, Request, Response

from myserve.errors import EngineDeadError, ModelNotFoundError, OverloadedError, RequestError
from myserve.server import caller
from myserve.server.answers.answer import ActiveAnswer
from myserve.server.answers.respond import Begun, begin_request
from myserve.server.answers.streaming import WRITTEN_INLINE_BYTES, json_response, to_json, unless_gone
from myserve.server.answers.writer import Plan
from myserve.server.errors import ShuttingDownError, error_body, status_of
from myserve.server.prompts.sampling import native_params, work_of_params
from myserve.server.routes.body import documented, models_of, read_bytes, read_request
from myserve.server.routes.dialects.failures import failing_as
from myserve.server.routes.dialects.promises import Promises
from myserve.server.routes.dialects.tinker_answer import AbortedError, TinkerWriter
from myserve.wire.completions import CompletionRequest
from myserve.wire.dialects.paths import TINKER, TINKER_HEALTH, TINKER_TRAINING
from myserve.wire.dialects.tinker import (
    CreateSamplingSession,
    CreateSession,
    JoinSamplingSession,
    PromiseName,
    SessionHeartbeat,
    TinkerSample,
    sampling_session_model,
)

__all__ = ["router"]

router = APIRouter(tags=["Tinker"], prefix=TINKER)

HOLD_SECONDS = 30.0  # the client gives a poll 45 s
PROTOBUF = "application/x-protobuf"
GONE = 410  # on which the client draws the sample again, as a request of its own

# what may pass by itself: another try, here or on a server that has restarted, gives the tokens
_BREAKING = (AbortedError, EngineDeadError, OverloadedError, ShuttingDownError)

# parameters of ours by Tinker's names
_NAMES = {
    "n": "num_samples",
    "top_logprobs": "topk_sample_logprobs",
    "prompt_logprobs": "topk_prompt_logprobs",
    "prompt_logprob_token_ids": "target_prompt_logprobs",
    "stop_token_ids": "sampling_params.stop",
}

# as Tinker's own server says what is wrong
_in_detail = failing_as(lambda message: {"detail": message})


@router.post("/client/config")
@router.post("/client/dynamic_config")
async def client_config(http: Request) -> Response:
    """Return the client's switches: its defaults, but that a sample which it gives up is cancelled here."""
    await read_bytes(http)
    return json_response({"sample_cancel_enabled": True})


@router.get(TINKER_HEALTH.removeprefix(TINKER))
async def healthz(http: Request) -> Response:
    """Answer as long as the server's event loop runs; `/ready` says whether models are loaded."""
    return json_response({"status": "ok"})


@router.get("/get_server_capabilities")
async def get_server_capabilities(http: Request) -> Response:
    """Return the served models, with the context's length of those that are loaded."""
    models = models_of(http)

    def supported(name: str) -> dict[str, Any]:
        loaded = models.if_loaded(name)
        longest = None if loaded is None else loaded.engine.max_model_len
        return {
            "model_name": name,
            "max_context_length": longest,
            "trainable": False,
            "sampleable": True,
        }

    return json_response({"supported_models": [supported(name) for name in models.names]})


@router.post("/create_session", openapi_extra=documented(CreateSession))
@_in_detail
async def create_session(http: Request) -> Response:
    """Return a new name. Nothing is kept of a session, so nothing of it can be lost."""
    await read_request(http, CreateSession, may_be_empty=True)
    return json_response({"type": "create_session", "session_id": uuid.uuid4().hex})


@router.post("/session_heartbeat", openapi_extra=documented(SessionHeartbeat))
@_in_detail
async def session_heartbeat(http: Request) -> Response:
    """Answer. What nobody asks for ends by itself, whatever its session's heart does."""
    await read_request(http, SessionHeartbeat)
    return json_response({"type": "session_heartbeat"})


@router.post("/sessions/{session_id}/finish")
async def finish_session(http: Request, session_id: str) -> Response:
    """Answer: there is nothing to finish."""
    await read_bytes(http)
    return json_response({})


@router.post("/telemetry")
async def telemetry(http: Request) -> Response:
    """Take what the client tells of itself, and forget it unread."""
    await read_bytes(http, memory_factor=1)
    return json_response({"status": "accepted"})


@router.post("/create_sampling_session", openapi_extra=documented(CreateSamplingSession))
@_in_detail
async def create_sampling_session(http: Request) -> Response:
    """Return an id that says which served model is sampled. 404 for one that is not served."""
    request = await read_request(http, CreateSamplingSession)
    _check_served(http, request.model)
    return json_response(
        {"type": "create_sampling_session", "sampling_session_id": request.sampling_session_id}
    )


@router.post("/join_sampling_session", openapi_extra=documented(JoinSamplingSession))
@_in_detail
async def join_sampling_session(http: Request) -> Response:
    """Return a number for a copy of a sampling client: random, as a copy without this route takes its own."""
    request = await read_request(http, JoinSamplingSession)
    _check_served(http, sampling_session_model(request.sampling_session_id))
    return json_response(
        {"type": "join_sampling_session", "client_counter": uuid.uuid4().int % 1_000_000_000 + 1}
    )


@router.get("/samplers/{sampler_id}")
@_in_detail
async def get_sampler(http: Request, sampler_id: str) -> Response:
    """Return the model that a sampling session's id says."""
    name = sampling_session_model(sampler_id)
    _check_served(http, name)
    return json_response({"sampler_id": sampler_id, "base_model": name, "model_path": None})


@router.post("/asample", openapi_extra=documented(TinkerSample))
@_in_detail
async def asample(http: Request) -> Response:
    """Begin to draw, and promise the answer: `/retrieve_future` has it. Each sequence's id has its seed and index.

    The same request sent again is the same promise.
    """
    request = await read_request(http, TinkerSample)
    completion = request.as_completion()
    request_id = request.request_id or uuid.uuid4().hex
    promise = _promises(http).make(
        request_id,
        _owner(),
        hashlib.blake2b(request.model_dump_json().encode()).digest(),
        _begin(http, request, completion, request_id),
        _write,
    )
    try:
        generation = await promise.generation()
    except Exception as error:
        # what did not begin is not promised
        _promises(http).forget(promise)
        raise _by_tinkers_names(error) from error
    ids = [f"{request_id}:seed:{choice.seed}:{choice.index}" for choice in generation.choices]
    return json_response({"request_id": request_id, "model_id": None, "sample_sequence_ids": ids})


@router.post("/retrieve_future", openapi_extra=documented(PromiseName))
@_in_detail
async def retrieve_future(http: Request) -> Response:
    """Return the answer as protobuf; `try_again` where it is not there after half a minute."""
    request = await read_request(http, PromiseName)
    promise = _promises(http).get(request.request_id, _owner())
    if promise is None:
        return _gone(f"there is no promise {request.request_id[:200]!r}: it was forgotten, or never made")
    try:
        result = await unless_gone(http, _promises(http).fetch(promise, HOLD_SECONDS))
    except _BREAKING as error:
        _promises(http).forget(promise)
        return _gone(str(error))
    except Exception as error:
        # an answer of its own: the client reads a 5xx as trouble on the way and asks again
        category = "user" if status_of(error) < 500 else "server"
        return json_response({"error": error_body(error)["error"]["message"], "category": category})
    if result is None:
        body = {"type": "try_again", "request_id": request.request_id, "queue_state": "active"}
        return json_response(body)
    return Response(result, media_type=PROTOBUF)


@router.post("/cancel_future", openapi_extra=documented(PromiseName))
@_in_detail
async def cancel_future(http: Request) -> Response:
    """Stop a sample that nobody waits for any more. Harmless where it is not there."""
    request = await read_request(http, PromiseName)
    promise = _promises(http).get(request.request_id, _owner())
    if promise is not None:
        _promises(http).forget(promise)
    return json_response({})


async def refuse_training(http: Request) -> Response:
    """Refuse: this server samples."""
    raise RequestError(
        f"{http.url.path} is not served: this server samples and does not train or keep checkpoints. Train elsewhere, "
        "and put new weights in place as docs/frameworks.md says",
        code="training_not_supported",
    )


for _path in TINKER_TRAINING:
    router.post(_path.removeprefix(TINKER))(_in_detail(refuse_training))


async def _begin(
    http: Request, request: TinkerSample, completion: CompletionRequest, answer_id: str
) -> Begun:
    async def plan(answer: ActiveAnswer[CompletionRequest]) -> Plan:
        params = await answer.tokenizing.run(
            work_of_params(completion) + request.num_target_cells // 4,
            lambda: native_params(
                completion, answer.model.codec, max_tokens=completion.max_tokens, **request.scoring()
            ),
        )
        return Plan([request.prompt.token_ids], [params], TinkerWriter(answer, request))

    return await begin_request(http, completion, plan, answer_id=answer_id)


async def _write(begun: Begun) -> bytes:
    """Return the answer's bytes, once all is drawn."""
    try:
        choices = await begun.generation.finish()
    finally:
        begun.generation.abort()
    for choice in choices:
        begun.answer.keep(choice, begun.writer.said)
    if begun.generation.size > WRITTEN_INLINE_BYTES:
        written: bytes = await asyncio.to_thread(begun.writer.whole, choices)
        return written
    return begun.writer.whole(choices)  # type: ignore[no-any-return]


def _by_tinkers_names(error: Exception) -> Exception:
    """Return the error of a field as Tinker calls it."""
    if not isinstance(error, RequestError) or error.param not in _NAMES:
        return error
    name = _NAMES[error.param]
    return RequestError(error.message.replace(error.param, name, 1), param=name, code=error.code)


def _promises(http: Request) -> Promises:
    promises: Promises = http.app.state.promises
    return promises


def _owner() -> str:
    return caller.current(0.0).name


def _check_served(http: Request, name: str) -> None:
    names = models_of(http).names
    if name not in names:
        raise ModelNotFoundError(
            f"the model {name[:200]!r} is not served here; this server has: {', '.join(names)}"
        )


def _gone(message: str) -> Response:
    return Response(to_json({"detail": message}), GONE, media_type="application/json")
