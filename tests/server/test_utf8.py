"""Emoji, CJK and combining marks: every chunk is valid UTF-8, and the bytes of the entries join to the text."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from myserve.wire.sse import SSEDecoder

# What a model that copies would write; a random one is made to write it by allowing nothing else.
TEXTS = ["Zß🦄你好", "👩‍👩‍👧‍👦 🇩🇪!", "e\u0301 na\u0308ive 世界", "日本語テキスト"]


def ids_of(server: Any, text: str) -> list[int]:
    ids: list[int] = httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json()["tokens"]
    return ids


def raw_stream(server: Any, **fields: Any) -> list[dict[str, Any]]:
    """The chunks, each decoded strictly: a broken character in any of them raises."""
    body = {"model": "tiny", "prompt": "x", "stream": True, "ignore_eos": True} | fields
    data = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30).content
    for event in data.split(b"\n\n"):
        event.decode("utf-8", "strict")
    return [event.json() for event in SSEDecoder().feed(data) if not event.is_done]


@pytest.mark.parametrize("text", TEXTS)
def test_characters_of_several_tokens_come_whole(server: Any, text: str) -> None:
    """Only the text's own tokens may be drawn, so characters are broken and finished all the time."""
    allowed = sorted(set(ids_of(server, text)))
    fields = {"allowed_token_ids": allowed, "max_tokens": 64, "seed": 1, "logprobs": True}
    chunks = [chunk["choices"][0] for chunk in raw_stream(server, **fields)]
    whole = httpx.post(
        f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "x", "ignore_eos": True} | fields
    ).json()["choices"][0]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    entries = [entry for chunk in chunks for entry in chunk["logprobs"]["content"]]
    joined = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert joined.decode("utf-8", "replace") == whole["text"]
    assert entries == whole["logprobs"]["content"]
    # Aligned chunk by chunk too: the text released so far is that of the tokens released so far.
    text_so_far, bytes_so_far = "", b""
    for chunk in chunks[:-1]:
        text_so_far += chunk["text"]
        bytes_so_far += b"".join(bytes(entry["bytes"]) for entry in chunk["logprobs"]["content"])
        assert bytes_so_far.decode("utf-8", "replace") == text_so_far


@pytest.mark.parametrize("text", TEXTS)
def test_an_echoed_prompt_is_the_prompt(client: openai.OpenAI, text: str) -> None:
    answer = client.completions.create(
        model="tiny", prompt=text, max_tokens=0, echo=True, extra_body={"logprobs": True}
    )
    assert answer.choices[0].text == text
    entries = json.loads(answer.choices[0].to_json())["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == text
    assert [entry["text_offset"] for entry in entries] == sorted(entry["text_offset"] for entry in entries)
