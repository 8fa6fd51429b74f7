"""Fakes for users' own tests: the real sampler over a transport that never leaves the process.

Only the network is replaced. Requests, event streams, checks, retries and limits are the real ones.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from myserve.wire.sse import DONE, encode_event

__all__ = [
    "FakeToken",
    "NextToken",
    "ScriptedTransport",
    "ToyTokenizer",
    "fake_events",
    "scripted",
    "tiny_model",
]


class ToyTokenizer:
    """Tokenize without a file: ids 0-255 are bytes, 256 and 257 open and close a turn.

    >>> toy = ToyTokenizer()
    >>> toy.decode(toy.apply_chat_template([{"role": "user", "content": "hé"}], add_generation_prompt=True))
    '<|im_start|>user\\nhé<|im_end|>\\n<|im_start|>assistant\\n'
    """

    specials = ("<|im_start|>", "<|im_end|>")
    eos_token_id = 257

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        ids: list[int] = []
        while text:
            found = [(text.find(special), special) for special in self.specials if special in text]
            at, special = min(found, default=(len(text), ""))
            ids += text[:at].encode()
            ids += [256 + self.specials.index(special)] if special else []
            text = text[at + len(special) :]
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False, **_: Any) -> str:
        pieces = [
            bytes([i]) if i < 256 else b"" if skip_special_tokens else self.specials[i - 256].encode()
            for i in token_ids
        ]
        return b"".join(pieces).decode("utf-8", "replace")

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        **_: Any,
    ) -> Any:
        turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in conversation]
        text = "".join(turns) + ("<|im_start|>assistant\n" if add_generation_prompt else "")
        return self.encode(text) if tokenize else text


class FakeToken(NamedTuple):
    """Hold one token of a fake: its id and its log-probability."""

    token_id: int
    logprob: float


# (prompt ids, completion ids so far, seed, sample index) -> the next token, or None where the answer ends
NextToken = Callable[[Sequence[int], Sequence[int], int, int], FakeToken | None]


def scripted(answers: Sequence[str] | Callable[[Sequence[int], int], str]) -> NextToken:
    """Return answers given in advance: sample i gets `answers[i]` (around again), or `answers(prompt_ids, i)`.

    >>> scripted(["hi"])([1], [104], 0, 0)
    FakeToken(token_id=105, logprob=0.0)
    """
    encode = ToyTokenizer().encode

    def next_token(prompt: Sequence[int], so_far: Sequence[int], seed: int, index: int) -> FakeToken | None:
        text = answers(prompt, index) if callable(answers) else answers[index % len(answers)]
        ids = encode(text)
        return FakeToken(ids[len(so_far)], 0.0) if len(so_far) < len(ids) else None

    return next_token


def tiny_model(vocabulary: str = "abcdefgh ", mean_length: float = 24.0) -> NextToken:
    """Return a real distribution over a few letters: the next depends on the last, drawn by the Gumbel-max trick.

    Its noise depends on (seed, index, position), like the server's: the same request is the same sample.

    >>> draw = tiny_model()
    >>> draw([1], [97], seed=7, index=0) == draw([1], [97], seed=7, index=0)
    True
    """
    letters = list(vocabulary.encode())

    def next_token(prompt: Sequence[int], so_far: Sequence[int], seed: int, index: int) -> FakeToken | None:
        last = so_far[-1] if so_far else sum(prompt) % 256
        weights = [_uniform("weight", last, letter) for letter in letters]
        total = sum(weights)
        noise = [_uniform("noise", seed, index, len(so_far), letter) for letter in letters]
        best = max(range(len(letters)), key=lambda i: math.log(weights[i]) - math.log(-math.log(noise[i])))
        if so_far and _uniform("end", seed, index, len(so_far)) < 1 / mean_length:
            return None
        return FakeToken(letters[best], math.log(weights[best] / total))

    return next_token


def fake_events(body: Mapping[str, Any], next_token: NextToken) -> Iterator[bytes]:
    """Yield the event stream that our server would write: one token an event, choices in turn."""
    seed, first, prior = body["seed"], body.get("sample_index", 0), body.get("num_prior_tokens", 0)
    prompt = list(body["prompt"])
    so_far = [prompt[len(prompt) - prior :] for _ in range(body["n"])]
    prompt = prompt[: len(prompt) - prior]
    unfinished = list(range(body["n"]))
    while unfinished:
        for index in list(unfinished):
            ids = so_far[index]
            drawn = (
                next_token(prompt, ids, seed, first + index)
                if len(ids) - prior < body["max_tokens"]
                else None
            )
            choice = _choice(index, drawn, seed)
            if drawn is not None and body.get("include_routing_matrix"):
                choice |= {"routing_matrix_shape": [2, 2]}
                choice["logprobs"]["content"][0]["routing_matrix"] = _routing(len(prompt) + len(ids))
            if drawn is None:
                choice |= {"finish_reason": "length" if len(ids) - prior >= body["max_tokens"] else "stop"}
                choice |= {"raw_output": {"completion_token_ids": ids[prior:]}}
                unfinished.remove(index)
            else:
                ids.append(drawn.token_id)
            yield encode_event(json.dumps({"choices": [choice]}))
    metrics = {"prompt-tokens": len(prompt), "cached-prompt-tokens": 0, "prefill-queue-duration": 0.0}
    yield encode_event(json.dumps({"choices": [], "perf_metrics": metrics}))
    yield DONE


def _routing(position: int) -> str:
    """Return routing with two layers of eight experts, of which each token uses two."""
    first, second = position % 8, position // 8 % 8
    return base64.b64encode(bytes([first, (first + 1) % 8, second, (second + 3) % 8])).decode()


def _choice(index: int, drawn: FakeToken | None, seed: int) -> dict[str, Any]:
    if drawn is None:
        return {"index": index, "text": "", "seed": seed}
    token = ToyTokenizer().decode([drawn.token_id])
    entry = {
        "token": token,
        "token_id": drawn.token_id,
        "logprob": drawn.logprob,
        "sampling_logprob": drawn.logprob,
        "top_logprobs": [{"token": token, "token_id": drawn.token_id, "logprob": drawn.logprob}],
    }
    return {
        "index": index,
        "text": ToyTokenizer().decode([drawn.token_id], skip_special_tokens=True),
        "token_ids": [drawn.token_id],
        "logprobs": {"content": [entry]},
        "seed": seed,
    }


@dataclass(slots=True)
class ScriptedTransport:
    """Answer requests from a script, or from `tiny_model()`; keep the requests that came.

    >>> ScriptedTransport(["4"]).requests
    []
    """

    answers: Sequence[str] | Callable[[Sequence[int], int], str] | None = None
    model: NextToken | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)

    @asynccontextmanager
    async def request(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None
    ) -> AsyncIterator[_ScriptedAnswer]:
        if body is None:
            version = {"name": "myserve", "extensions": ["sample_index", "num_prior_tokens"]}
            yield _ScriptedAnswer([json.dumps(version).encode()])
            return
        asked = json.loads(body)
        self.requests.append(asked)
        next_token = self.model if self.model is not None else scripted(self.answers or [""])
        yield _ScriptedAnswer(fake_events(asked, next_token))

    async def aclose(self) -> None:
        """Nothing to close."""


class _ScriptedAnswer:
    status = 200
    headers: Mapping[str, str] = {"content-type": "text/event-stream"}  # never changed

    def __init__(self, parts: Iterator[bytes] | Sequence[bytes]) -> None:
        self._parts = parts

    async def chunks(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            yield part


def _uniform(*key: object) -> float:
    """Return a number in (0, 1) that depends on the key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") + 0.5) / 2.0**64
