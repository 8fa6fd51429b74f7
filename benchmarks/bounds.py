"""The largest request of each bound, sent to a server while /health is asked: how long does an answer of it take then?

`python -m benchmarks.bounds URL` prints a line for each: status, seconds, the slowest /health meanwhile. The bounds are
those of docs/operations.md; tests/server/test_loop_lag.py sends the same requests.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx

CHAT, COMPLETIONS, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize"
RESPONSES, MESSAGES, DECISIONS = "/v1/responses", "/v1/messages", "/v1/systemone"


class Case(NamedTuple):
    """One request at a bound, and whether the server may serve it or has to refuse it."""

    name: str
    route: str
    body: bytes


def cases(
    model: str, *, max_model_len: int, max_body_bytes: int = 16 << 20, max_queue: int = 4096
) -> Iterator[Case]:
    """Yield the largest request of each bound: bytes, values, strings, objects, fields, choices, the answer."""

    def case(name: str, route: str, **fields: Any) -> Case:
        return Case(name, route, json.dumps({"model": model, "max_tokens": 1, "seed": 1} | fields).encode())

    user = [{"role": "user", "content": "hi"}]
    text = "a " * (max_body_bytes // 2 - 1024)
    yield case("bytes of a prompt", COMPLETIONS, prompt=text)
    yield case("bytes of a message", CHAT, messages=[{"role": "user", "content": text}])
    yield case(
        "bytes of many messages", CHAT, messages=[{"role": "user", "content": text[: len(text) // 520]}] * 512
    )
    yield case("bytes of many prompts", COMPLETIONS, prompt=[text[: len(text) // 520]] * 512)
    yield case("bytes to tokenize", TOKENIZE, prompt=text)
    yield case("characters to tokenize", TOKENIZE, prompt="a " * max(4 * max_model_len, 1 << 15))
    yield case("ids of a prompt", COMPLETIONS, prompt=[5] * 499_000)
    yield case("prompts", COMPLETIONS, prompt=["a"] * 131_000)
    yield case("prompts of a full queue", COMPLETIONS, prompt=[[5, 6]] * max_queue)
    yield case("objects", CHAT, messages=user, metadata=[{}] * 65_000)
    yield case("messages", CHAT, messages=user * 16_384)
    yield case("wrong values", COMPLETIONS, prompt="a", bad_words=[1] * 400_000)
    yield case("bad_words", COMPLETIONS, prompt="a", bad_words=[f"word {i}" for i in range(1024)])
    yield case("logit_bias", COMPLETIONS, prompt="a", logit_bias={str(i): 1 for i in range(300)})
    allowed = {"allowed_token_ids": [5, 6] * 200_000, "n": 64, "max_tokens": 8}
    yield case("allowed_token_ids", COMPLETIONS, prompt="a", **allowed)
    yield case("stop", COMPLETIONS, prompt="a", stop=["x" * 4096] * 16, max_tokens=32)
    function = {
        "name": "f",
        "parameters": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(64)}},
    }
    tools = [{"type": "function", "function": function | {"name": f"f{i}"}} for i in range(128)]
    yield case("tools", CHAT, messages=user, tools=tools, tool_choice="auto")
    yield case("choices of a grammar", COMPLETIONS, prompt="a", choice=[f"option {i}" for i in range(20_000)])
    long = max_model_len - 64
    yield case("choices", COMPLETIONS, prompt=[5] * 16, n=128, max_tokens=64, ignore_eos=True)
    wide = {"n": 128, "max_tokens": 16, "ignore_eos": True, "logprobs": True, "top_logprobs": 20}
    yield case("bytes of an answer", CHAT, messages=user, **wide)
    yield case("bytes of a stream", CHAT, messages=user, stream=True, **wide)
    yield case("items of a response", RESPONSES, input=user * 16_384)
    yield case("bytes of a response's input", RESPONSES, input=text)
    yield case("turns of Messages", MESSAGES, messages=user * 16_384)
    choice = {"type": "choice", "instructions": "Which?", "criteria": dict.fromkeys("abcdefghijklmnop")}
    questions = {f"q{i}": choice for i in range(min(400, max_queue))}
    yield case("questions", DECISIONS, state="hi", questions=questions)
    states = {str(i): ["x" * 50] for i in range(60_000)}
    yield case("a state of many parts", DECISIONS, state=states, questions={"q": choice})
    yield case("scores of a prompt", COMPLETIONS, prompt=[5] * long, prompt_logprobs=1024)


class HealthWatch:
    """Asks /health all the time, in a thread; `slowest` is in seconds."""

    def __init__(self, url: str) -> None:
        self.slowest = 0.0
        self._url = url
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> HealthWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=300) as client:
            while not self._over.wait(0.02):
                began = time.perf_counter()
                client.get("/health").raise_for_status()
                self.slowest = max(self.slowest, time.perf_counter() - began)


def main(url: str) -> None:
    """Send each case and print what came of it."""
    card = httpx.get(url + "/v1/models").json()["data"][0]
    print(f"{'case':28} {'status':>6} {'seconds':>8} {'slowest /health, ms':>20}")
    for case in cases(card["id"], max_model_len=card["max_model_len"]):
        with HealthWatch(url) as watch:
            began = time.perf_counter()
            answer = httpx.post(url + case.route, content=case.body, timeout=600)
            seconds = time.perf_counter() - began
        print(
            f"{case.name:28} {answer.status_code:6} {seconds:8.2f} {watch.slowest * 1000:20.0f}", flush=True
        )


if __name__ == "__main__":
    main(sys.argv[1])
