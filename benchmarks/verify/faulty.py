"""Our server with one thing broken: an ASGI layer that changes requests on their way in, or answers on the way out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["FAULTS", "FaultySampler", "PlantedFault"]

Json = dict[str, Any]
_GENERATES = ("/v1/completions", "/v1/chat/completions")


def _unchanged(body: Json, state: FaultySampler) -> Json:
    return body


@dataclass(frozen=True)
class PlantedFault:
    """Describe a fault: the check that must find it, and what it does to a request, an answer, or a chunk."""

    check: str
    request: Callable[[Json, FaultySampler], Json] = _unchanged
    answer: Callable[[Json, Json, FaultySampler], Json] | None = (
        None  # of an answer or a chunk, and its request
    )
    error: Callable[[Json], Json] | None = None


class FaultySampler:
    """Wrap our app; `fault` names what is broken, and may be changed between requests."""

    def __init__(self, app: Any, fault: str | None = None) -> None:
        self.app, self._fault = app, fault
        self.in_flight = self.streams = 0
        self.prompts: dict[str, int] = {}

    @property
    def fault(self) -> str | None:
        return self._fault

    @fault.setter
    def fault(self, name: str | None) -> None:
        self._fault, self.streams, self.prompts = name, 0, {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        planted = FAULTS[self._fault] if self._fault else None
        if planted is None or scope["type"] != "http" or scope["path"] not in _GENERATES:
            await self.app(scope, receive, send)
            return
        raw, more = b"", True
        while more:
            message = await receive()
            raw, more = raw + message.get("body", b""), message.get("more_body", False)
        body = _object(raw)
        self.in_flight += 1
        was_shared = self.in_flight > 1
        try:
            if body is not None:
                key = json.dumps([body.get("prompt"), body.get("messages"), body.get("temperature")])
                body["_times"], self.prompts[key] = self.prompts.get(key, 0), self.prompts.get(key, 0) + 1
                changed = planted.request(dict(body), self)
                changed.pop("_times", None)
                raw = json.dumps(changed).encode()
            status, headers, answer = await _run(self.app, scope, raw)
            if body is not None:
                body["_shared"] = was_shared or self.in_flight > 1
        finally:
            self.in_flight -= 1
        if body is not None:
            answer = self._changed(planted, status, body, answer)
            self.streams += bool(body.get("stream"))
        headers = [(k, v) for k, v in headers if k.lower() not in (b"content-length", b"transfer-encoding")]
        headers.append((b"content-length", str(len(answer)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    def _changed(self, planted: PlantedFault, status: int, body: Json, raw: bytes) -> bytes:
        if status >= 400:
            return raw if planted.error is None else json.dumps(planted.error(json.loads(raw))).encode()
        if planted.answer is None:
            return raw
        if not body.get("stream"):
            return json.dumps(planted.answer(json.loads(raw), body, self)).encode()
        events = raw.decode().split("\n\n")
        for i, event in enumerate(events):
            if event.startswith("data: {"):
                events[i] = "data: " + json.dumps(planted.answer(json.loads(event[6:]), body, self))
        return "\n\n".join(events).encode()


async def _run(app: Any, scope: Any, raw: bytes) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Run the app on a body; return its whole answer."""
    sent, got = False, {"status": 500, "headers": [], "body": b""}

    async def receive() -> Json:
        nonlocal sent
        if sent:
            import asyncio

            await asyncio.Event().wait()  # the client stays
        sent = True
        return {"type": "http.request", "body": raw, "more_body": False}

    async def send(message: Json) -> None:
        if message["type"] == "http.response.start":
            got["status"], got["headers"] = message["status"], list(message["headers"])
        elif message["type"] == "http.response.body":
            got["body"] += message.get("body", b"")

    headers = [(k, v) for k, v in scope["headers"] if k != b"content-length"]
    inner = dict(scope) | {"headers": [*headers, (b"content-length", str(len(raw)).encode())]}
    await app(inner, receive, send)
    return got["status"], got["headers"], got["body"]


def _object(raw: bytes) -> Json | None:
    try:
        body = json.loads(raw)
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


def _with(**changes: Callable[[Json, FaultySampler], Any]) -> Callable[[Json, FaultySampler], Json]:
    """Return a change of a request: each named field that it has becomes what the function says."""

    def change(body: Json, state: FaultySampler) -> Json:
        return body | {name: of(body, state) for name, of in changes.items() if body.get(name) is not None}

    return change


def _is_draw(body: Mapping[str, Any]) -> bool:
    """Whether one token is drawn with randomness."""
    temperature = body.get("temperature")
    return body.get("max_tokens") == 1 and isinstance(temperature, int | float) and temperature > 0


def _numbers(body: Json, change: Callable[[float], float]) -> Json:
    """Return an answer whose logprobs have all been changed."""
    for choice in body.get("choices") or ():
        for holder in (choice, choice.get("delta") or {}):
            logprobs = holder.get("logprobs") or {}
            for entry in logprobs.get("content") or ():
                for one in (entry, *(entry.get("top_logprobs") or ())):
                    one["logprob"] = change(one["logprob"])
            if logprobs.get("token_logprobs"):
                logprobs["token_logprobs"] = [
                    value if value is None else change(value) for value in logprobs["token_logprobs"]
                ]
                logprobs["top_logprobs"] = [
                    top and {name: change(value) for name, value in top.items()}
                    for top in logprobs.get("top_logprobs") or ()
                ]
    return body


def _copies(answer: Json, body: Json, state: FaultySampler) -> Json:
    choices = answer["choices"]
    if len(choices) > 1:
        answer["choices"] = [choices[0] | {"index": i} for i in range(len(choices))]
    return answer


def _first_logprob_again(answer: Json, body: Json, state: FaultySampler) -> Json:
    """Give each token of a stream the first one's logprob."""
    if not body.get("stream"):
        return answer

    def first(value: float) -> float:
        return float(body.setdefault("_first", value))

    return _numbers(answer, first)


def _broken_characters(answer: Json, body: Json, state: FaultySampler) -> Json:
    if body.get("stream"):
        for choice in answer.get("choices") or ():
            for holder, name in ((choice, "text"), (choice.get("delta") or {}, "content")):
                text = holder.get(name) or ""
                holder[name] = "".join(c if ord(c) < 128 else "\ufffd" * len(c.encode()) for c in text)
    return answer


def _shifted_echo(answer: Json, body: Json, state: FaultySampler) -> Json:
    if body.get("echo"):
        for choice in answer["choices"]:
            values = choice["logprobs"]["token_logprobs"]
            choice["logprobs"]["token_logprobs"] = [None, *values[2:], values[-1]]
    return answer


def _shifted_scores(answer: Json, body: Json, state: FaultySampler) -> Json:
    for choice in answer.get("choices") or ():
        if choice.get("prompt_logprobs"):
            rows = choice["prompt_logprobs"]
            numbers = [next(iter(row.values()))["logprob"] for row in rows[1:]]
            for row, number in zip(rows[1:], numbers[1:] + numbers[:1], strict=True):
                next(iter(row.values()))["logprob"] = number
    return answer


def _other_id(answer: Json, body: Json, state: FaultySampler) -> Json:
    for choice in answer.get("choices") or ():
        if choice.get("token_ids"):
            choice["token_ids"][-1] += 1
    return answer


def _counted_prompt(body: Json, state: FaultySampler) -> Json:
    """Count the prompt's tokens as if they were the completion's."""
    if body.get("frequency_penalty") and isinstance(body.get("prompt"), list):
        return body | {"num_prior_tokens": len(body["prompt"]) - 1}
    return body


def _drop_seed(when: Callable[[Json, FaultySampler], bool]) -> Callable[[Json, FaultySampler], Json]:
    def change(body: Json, state: FaultySampler) -> Json:
        return {k: v for k, v in body.items() if k != "seed"} if when(body, state) else body

    return change


FAULTS: Mapping[str, PlantedFault] = {
    "seeds are ignored": PlantedFault("seed_alone", _drop_seed(lambda body, state: True)),
    "seeds are honoured by the only request alone": PlantedFault(
        "seed_under_load", _drop_seed(lambda body, state: state.in_flight > 1)
    ),
    "streams move the generator": PlantedFault(
        "seed_after_traffic", _with(seed=lambda body, state: body["seed"] ^ (77 * state.streams))
    ),
    "the n choices are one": PlantedFault("n_distinct", answer=_copies),
    "a seed's last bit is lost": PlantedFault(
        "seeds_independent", _with(seed=lambda body, state: body["seed"] & ~1)
    ),
    "temperature 0 is taken for unset": PlantedFault(
        "greedy", _with(temperature=lambda body, state: body["temperature"] or 1.0)
    ),
    "logprobs are of a hotter distribution": PlantedFault(
        "logprobs_normalised", answer=lambda answer, body, state: _numbers(answer, lambda x: x / 2)
    ),
    "draws are hotter than their logprobs": PlantedFault(
        "draws_match",
        _with(
            temperature=lambda body, state: (
                1.5 if _is_draw(body) and body["temperature"] == 1 else body["temperature"]
            )
        ),
    ),
    "logits are multiplied by the temperature": PlantedFault(
        "temperature",
        _with(
            temperature=lambda body, state: 1 / body["temperature"] if _is_draw(body) else body["temperature"]
        ),
    ),
    "top_k keeps one more": PlantedFault("top_k", _with(top_k=lambda body, state: body["top_k"] + 1)),
    "top_p is squared": PlantedFault(
        "top_p", _with(top_p=lambda body, state: body["top_p"] ** 2 if _is_draw(body) else body["top_p"])
    ),
    "min_p is halved": PlantedFault("min_p", _with(min_p=lambda body, state: body["min_p"] / 2)),
    "logit_bias is halved": PlantedFault(
        "logit_bias",
        _with(logit_bias=lambda body, state: {k: v / 2 for k, v in body["logit_bias"].items()}),
    ),
    "frequency_penalty counts the prompt": PlantedFault("frequency_penalty", _counted_prompt),
    "presence_penalty has the wrong sign": PlantedFault(
        "presence_penalty",
        _with(presence_penalty=lambda body, state: -p if abs(p := body["presence_penalty"]) <= 2 else p),
    ),
    "repetition_penalty is ignored": PlantedFault(
        "repetition_penalty", _with(repetition_penalty=lambda body, state: 1.0)
    ),
    "the stop string is left in the text": PlantedFault(
        "stop", lambda body, state: body | {"include_stop_str_in_output": True} if body.get("stop") else body
    ),
    "one token too many": PlantedFault(
        "max_tokens", _with(max_tokens=lambda body, state: m + 1 if (m := body["max_tokens"]) > 0 else m)
    ),
    "a stream repeats the first logprob": PlantedFault("stream", answer=_first_logprob_again),
    "a stream breaks characters": PlantedFault("utf8", answer=_broken_characters),
    "echoed logprobs are one token early": PlantedFault("echo", answer=_shifted_echo),
    "prompt_logprobs are one token early": PlantedFault("prompt_logprobs", answer=_shifted_scores),
    "token ids are made from the text again": PlantedFault("token_ids", answer=_other_id),
    "a cached prompt has other bits": PlantedFault(
        "cached_cold",
        answer=lambda answer, body, state: _numbers(answer, lambda x: x - 1e-4) if body["_times"] else answer,
    ),
    "a batch has other bits": PlantedFault(
        "batch_alone",
        answer=lambda answer, body, state: (
            _numbers(answer, lambda x: x - 1e-4) if body["_shared"] else answer
        ),
    ),
    "a temperature below 0 is clamped": PlantedFault(
        "limits",
        _with(
            temperature=lambda body, state: (
                max(0, t) if isinstance(t := body["temperature"], int | float) else t
            )
        ),
    ),
    "errors have FastAPI's shape": PlantedFault(
        "error_shape", error=lambda body: {"detail": body["error"]["message"]}
    ),
}
