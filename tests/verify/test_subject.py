"""Answers of other servers, read into the one form that checks look at; and servers that lack most of it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from myserve.verify.run import verify
from myserve.verify.subject import VerifyError, read_choice


def test_both_shapes_of_logprobs_are_read_alike() -> None:
    lists = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5, "b": -1.0}]}
    alternatives = [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1.0}]
    content = [{"token": "a", "logprob": -0.5, "top_logprobs": alternatives}]
    of_completion = read_choice({"text": "a", "logprobs": lists}, {})
    of_chat = read_choice({"message": {"content": "a"}, "logprobs": {"content": content}}, {})
    of_chunk = read_choice({"delta": {"content": "a"}, "logprobs": {"content": content}}, {})
    assert of_completion.tokens == of_chat.tokens == of_chunk.tokens
    assert (of_completion.text, of_chat.text, of_chunk.text) == ("a", "a", "a")


@pytest.fixture
def echoing() -> Iterator[str]:
    """A chat server with a fixed answer, or one for each seed: no logprobs, no n, and every field taken."""
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"data": [{"id": "fixed"}]}

    @app.post("/v1/chat/completions")
    async def chat(body: dict[str, Any]) -> JSONResponse:
        text = f"always {body.get('seed')}" if body.get("model") == "seeded" else "<b>always</b>"
        message = {"role": "assistant", "content": text}
        return JSONResponse({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    listener.close()


def test_what_a_server_lacks_is_skipped_and_said(echoing: str) -> None:
    results = {result.id: result for result in asyncio.run(verify(echoing, seed=1)).results}
    assert results["draws_match"].status == "skipped" and "logprobs" in results["draws_match"].evidence
    assert results["seed_alone"].status == "skipped" and "one answer" in results["seed_alone"].evidence
    assert results["echo"].status == "skipped"
    # it takes what no server may take
    assert (
        results["temperature"].status == "failed"
        and "one text for 16 seeds" in results["temperature"].evidence
    )
    assert results["limits"].status == "failed"
    assert all(
        f"{bad} is answered with 200" in results["limits"].evidence for bad in ("temperature -1", "n 0")
    )
    # all that it refused: no object, in words of its framework's
    assert results["error_shape"].status == "failed"
    assert "for half a JSON object has not OpenAI's shape" in results["error_shape"].evidence


def test_texts_are_not_counted_as_tokens(echoing: str) -> None:
    (result,) = asyncio.run(verify(echoing, model="seeded", seed=1, only=["seed_alone"])).results
    assert (result.status, result.evidence) == ("passed", "4 seeds, each twice: the same texts")


def test_a_server_that_lists_no_models_says_with_what_it_answered(echoing: str) -> None:
    with pytest.raises(VerifyError, match=r"GET /v1/models is answered with 404\): pass --model"):
        asyncio.run(verify(f"{echoing}/elsewhere", seed=1))
