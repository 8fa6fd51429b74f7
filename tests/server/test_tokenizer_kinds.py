"""A server with each kind of tokenizer: text, echo, offsets, logprobs, streams, stop strings and ids are one story."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import SMALL
from myserve.server.settings import Settings
from tokenizer_zoo import BYTEWISE, SCRIPTS, known_ids, tokenizer, vocab_size

SERVED = ("added_tokens", "holes", "sentencepiece", "unigram_bytes", "wordpiece", "end_of_word", "byt5")
TEXTS = ("the dog", SCRIPTS["accents"], SCRIPTS["Chinese"], SCRIPTS["emoji"])


def make_model(kind: str, folder: Path) -> Path:
    """A random two-layer Llama, whose logits are wider than the vocabulary."""
    torch.manual_seed(0)
    own = tokenizer(kind)
    ids = {
        "bos_token_id": own.bos_token_id,
        "eos_token_id": own.eos_token_id,
        "pad_token_id": own.pad_token_id,
    }
    config = AutoConfig.for_model("llama", **SMALL | {"vocab_size": vocab_size(kind)} | ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, open_server: Any) -> Iterator[httpx.Client]:
    models = {kind: str(make_model(kind, tmp_path_factory.mktemp(kind))) for kind in SERVED}
    with (
        open_server(Settings(models=models)) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        yield client


def post(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def complete(client: httpx.Client, kind: str, **fields: Any) -> dict[str, Any]:
    choice: dict[str, Any] = post(client, "/v1/completions", {"model": kind, **fields})["choices"][0]
    return choice


def own_text(kind: str, prompt: str, ids: list[int]) -> str:
    """What the tokenizer's own decoding makes of a completion; behind its prompt where tokens have bytes."""
    own = tokenizer(kind)
    if kind not in BYTEWISE:
        return str(own.decode(ids, skip_special_tokens=True))
    before = own.encode(prompt, add_special_tokens=False)
    whole = str(own.decode([*before, *ids], skip_special_tokens=True))
    return whole.removeprefix(own.decode(before, skip_special_tokens=True))


def misread(kind: str) -> list[int]:
    """Added tokens that the tokenizers library reads by the byte alphabet; ours have their own text."""
    added = tokenizer(kind).added_tokens_decoder
    return [
        i for i, token in added.items() if not token.special and tokenizer(kind).decode([i]) != str(token)
    ]


@pytest.mark.parametrize("kind", SERVED)
def test_text_is_the_tokenizers_own_streamed_or_not(client: httpx.Client, kind: str) -> None:
    for seed in range(2):
        fields = {
            "prompt": "the dog",
            "max_tokens": 24,
            "seed": seed,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        if kind in (
            "byt5",
            "added_tokens",
            "holes",
        ):  # ids on which the tokenizer's own decoding raises or is wrong
            fields["allowed_token_ids"] = sorted({*known_ids(kind)} - {*misread(kind)})
        whole = complete(client, kind, logprobs=0, **fields)
        assert whole["text"] == own_text(kind, "the dog", whole["token_ids"])
        streamed, tokens = "", []
        with client.stream(
            "POST", "/v1/completions", json={"model": kind, "stream": True, **fields}
        ) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])["choices"][0]
                    streamed, tokens = streamed + chunk["text"], tokens + chunk["token_ids"]
        assert (streamed, tokens) == (whole["text"], whole["token_ids"])
        special = tuple(map(str, tokenizer(kind).all_special_tokens))
        assert_tokens_stand_in_text(whole["text"], whole["logprobs"], special)


def assert_tokens_stand_in_text(text: str, logprobs: dict[str, Any], hidden: tuple[str, ...] = ()) -> None:
    """Each token's text stands at its offset."""
    if "\ufffd" in text:
        return  # letters in a run of bytes that is no UTF-8 are U+FFFD too
    for begin, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
        if "\ufffd" not in token and token.strip() not in hidden:
            assert text[begin:].startswith(token)


@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize("text", TEXTS)
def test_echo_is_the_prompt_as_sent_with_offsets_into_it(client: httpx.Client, kind: str, text: str) -> None:
    own = tokenizer(kind)
    special = tuple(map(str, own.all_special_tokens))
    echoed = complete(client, kind, prompt=text, max_tokens=1, echo=True, logprobs=0, seed=1)
    assert echoed["text"].startswith(text)
    logprobs = echoed["logprobs"]
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    decoded = own.decode(own.encode(text), skip_special_tokens=True)
    if decoded == text:  # a lowercased or unknown word stands otherwise in the text than in its tokens
        prompt = len(own.encode(text))
        first = {"text_offset": logprobs["text_offset"][1:prompt], "tokens": logprobs["tokens"][1:prompt]}
        assert_tokens_stand_in_text(text, first, hidden=special)
    ids = complete(client, kind, prompt=own.encode(text), max_tokens=1, echo=True, seed=1)
    assert ids["text"].startswith(decoded) or misread(kind)


@pytest.mark.parametrize("kind", SERVED)
def test_logprobs_bytes_are_the_texts(client: httpx.Client, kind: str) -> None:
    choice = complete(client, kind, prompt="the dog", max_tokens=30, logprobs=True, seed=3, ignore_eos=True)
    joined = b"".join(bytes(entry["bytes"] or ()) for entry in choice["logprobs"]["content"])
    if "\ufffd" not in choice["text"]:
        assert joined.decode("utf-8", "ignore") == choice["text"]


@pytest.mark.parametrize("kind", SERVED)
def test_a_stop_string_ends_the_text(client: httpx.Client, kind: str) -> None:
    fields = {"prompt": "the dog", "max_tokens": 60, "seed": 5, "ignore_eos": True}
    text = complete(client, kind, **fields)["text"]
    stop = next(text[i : i + 2] for i in range(8, len(text)) if "\ufffd" not in text[i - 1 : i + 3])
    stopped = complete(client, kind, stop=[stop], **fields)
    assert (stopped["text"], stopped["finish_reason"]) == (text[: text.index(stop)], "stop")


@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize("text", TEXTS)
def test_tokenize_and_detokenize_are_the_tokenizers(client: httpx.Client, kind: str, text: str) -> None:
    own = tokenizer(kind)
    for add in (True, False):
        body = {"model": kind, "prompt": text, "add_special_tokens": add}
        tokens = post(client, "/tokenize", body)["tokens"]
        assert tokens == own.encode(text, add_special_tokens=add)
        prompt = post(client, "/detokenize", {"model": kind, "tokens": tokens})["prompt"]
        assert prompt == (text if misread(kind) else own.decode(tokens))


@pytest.mark.parametrize("kind", SERVED)
def test_control_text_in_a_message_stays_text(client: httpx.Client, kind: str) -> None:
    own = tokenizer(kind)
    control = str(own.eos_token)
    answers = [
        post(
            client,
            "/v1/chat/completions",
            {
                "model": kind,
                "messages": [{"role": "user", "content": content}],
                "max_tokens": 1,
                "return_token_ids": True,
            },
        )
        for content in ("say it", f"say {control} it")
    ]
    plain, hostile = (
        answer["choices"][0].get("prompt_token_ids") or answer["prompt_token_ids"] for answer in answers
    )
    assert hostile.count(own.eos_token_id) == plain.count(own.eos_token_id) > 0
    assert hostile != plain


def test_a_grammar_needs_tokens_with_bytes(client: httpx.Client) -> None:
    body = {"prompt": "x", "max_tokens": 20, "choice": ["é"], "temperature": 0}
    assert complete(client, "byt5", **body)["text"] == "é"
    assert complete(client, "sentencepiece", **body)["text"] == "é"
    refused = client.post("/v1/completions", json={"model": "wordpiece", **body})
    assert refused.status_code == 400
    assert "WordPiece" in refused.json()["error"]["message"]


def test_padding_of_the_vocabulary_can_be_drawn_and_has_no_text(client: httpx.Client) -> None:
    for kind in SERVED:
        fields = {
            "allowed_token_ids": [vocab_size(kind) - 1],
            "temperature": 0,
            "max_tokens": 2,
            "ignore_eos": True,
        }
        choice = complete(client, kind, prompt="x", return_token_ids=True, **fields)
        assert (choice["text"], choice["token_ids"]) == ("", [vocab_size(kind) - 1] * 2)


def test_ids_beyond_a_hole_and_foreign_letters_are_drawn_as_their_text(client: httpx.Client) -> None:
    for kind in ("holes", "added_tokens"):
        token_id = tokenizer(kind).convert_tokens_to_ids("čaj")
        drawn = {"allowed_token_ids": [token_id], "temperature": 0, "ignore_eos": True}
        assert complete(client, kind, prompt="x", max_tokens=3, **drawn)["text"] == "čaj" * 3
        stopped = complete(client, kind, prompt="x", max_tokens=3, stop=["čaj"], **drawn)
        assert (stopped["text"], stopped["finish_reason"]) == ("", "stop")
        assert complete(client, kind, prompt="x", max_tokens=9, choice=["čaj"])["text"] == "čaj"
