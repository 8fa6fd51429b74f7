"""What a request costs before it is admitted, and how large its answer may be, is bounded by what it says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from myserve.core.params import SamplingParams
from myserve.engine.config import EngineConfig
from myserve.engine.outputs import Delta, KeptSet, PromptLogprob, TokenOutput
from myserve.errors import RequestError
from myserve.server.answers import bursts, respond, size
from myserve.server.answers.logprobs import TokenWriter
from myserve.server.answers.size import check_known_size, delta_size
from myserve.server.answers.streaming import to_json, to_json_in_slices
from myserve.server.prompts import lengths
from myserve.server.routes import completions
from myserve.server.settings import Settings
from myserve.wire.sse import SSEDecoder

Open = Callable[[Settings], AbstractContextManager[Any]]


def post(url: str, route: str = "/v1/completions", **fields: Any) -> httpx.Response:
    return httpx.post(url + route, json={"model": "tiny", "seed": 1, "max_tokens": 2} | fields, timeout=120)


@pytest.fixture
def encoded(server: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that the tokenizer was given."""
    codec = server.model("tiny").codec
    seen: list[str] = []
    encode = type(codec).encode

    def spy(self: Any, text: str, **options: Any) -> list[int]:
        seen.append(text)
        ids: list[int] = encode(self, text, **options)
        return ids

    monkeypatch.setattr(type(codec), "encode", spy)
    return seen


def test_a_full_queue_is_said_before_anything_is_tokenized(
    open_server: Open, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = EngineConfig(max_queue=3)
    with open_server(Settings(models={"tiny": str(tiny_model("qwen3"))}, engine=engine)) as server:
        codec = type(server.model("tiny").codec)
        monkeypatch.setattr(codec, "encode", lambda *_, **__: pytest.fail("it was tokenized"))
        for fields in ({"prompt": ["a"] * 4}, {"prompt": ["a", "b"], "n": 2}, {"prompt": "a", "n": 4}):
            answer = post(server.url, **fields)
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
        chat = {"messages": [{"role": "user", "content": "a"}], "n": 4}
        assert post(server.url, "/v1/chat/completions", **chat).status_code == 429
        monkeypatch.undo()
        assert post(server.url, prompt=["a", "b", "c"]).status_code == 200


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_a_text_that_no_tokens_of_the_context_can_spell_is_not_tokenized(
    server: Any, encoded: list[str], route: str
) -> None:
    model = server.model("tiny")
    text = "a" * (model.engine.max_model_len * model.codec.token_bytes.longest + 1)
    fields = (
        {"prompt": text} if route == "/v1/completions" else {"messages": [{"role": "user", "content": text}]}
    )
    answer = post(server.url, route, **fields).json()
    assert answer["error"]["code"] == "context_length_exceeded"
    assert answer["error"]["param"] == next(iter(fields))
    assert "maximum context length is" in answer["error"]["message"]
    assert not encoded


def test_of_a_long_text_the_beginning_is_enough(
    server: Any, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lengths, "TRIED_FROM_CHARACTERS", 100)
    limit = server.model("tiny").engine.max_model_len
    longest = server.model("tiny").codec.token_bytes.longest
    text = ("a b c d e f g " * 2**20)[: limit * longest]
    assert len(text) > 8 * limit
    answer = post(server.url, prompt=["short", text]).json()
    assert answer["error"]["code"] == "context_length_exceeded"
    assert max(map(len, encoded)) == 8 * limit


def test_a_text_that_fits_is_never_refused_by_its_length(server: Any) -> None:
    """The control: as many of the longest token as the context holds."""
    model = server.model("tiny")
    ids = [max(range(model.engine.vocab_size), key=lambda i: len(model.codec.token_bytes[i]))]
    text = model.codec.decode(ids * (model.engine.max_model_len // 2), skip_special_tokens=False)
    assert post(server.url, prompt=text).status_code == 200


@pytest.mark.parametrize("route", ["/v1/completions", "/inference/v1/generate"])
def test_a_prompts_scores_have_a_size_that_is_known(server: Any, route: str) -> None:
    ids = [5] * 400
    asked = {"prompt_logprobs": 1024, "n": 4, "max_tokens": 1, "seed": 1}
    fields = {"token_ids": ids, "sampling_params": asked} if "generate" in route else {"prompt": ids} | asked
    answer = post(server.url, route, **fields)
    assert answer.status_code == 400, answer.text[:200]
    assert answer.json()["error"]["code"] == "answer_too_large"
    assert "ask for fewer alternatives" in answer.json()["error"]["message"]


def known(vocab_size: int = 150_000, n: int = 1, prompt: int = 10, **params: Any) -> None:
    check_known_size(
        [[5] * prompt], [SamplingParams(**params)], n=n, vocab_size=vocab_size, max_model_len=32_768
    )


def test_the_support_of_draws_that_nothing_truncates_has_a_size_that_is_known() -> None:
    for free in ({}, {"top_k": 100_000}, {"max_tokens": 2000}, {"top_p": 1.0, "temperature": 1.5}):
        with pytest.raises(RequestError, match="truncate the distribution") as caught:
            known(kept=True, **free)
        assert (caught.value.param, caught.value.code) == ("kept", "answer_too_large")
    for truncated in (
        {"top_k": 20},
        {"top_p": 0.99},
        {"min_p": 0.01},
        {"top_n_sigma": 1.0},
        {"temperature": 0.0},
    ):
        known(kept=True, **truncated)
    known(kept=True, allowed_token_ids=tuple(range(50)))
    known(kept=True, max_tokens=10)
    known(kept=True, vocab_size=400, max_tokens=1000)


@given(
    tokens=st.lists(
        st.builds(
            lambda top, ids, kept: TokenOutput(
                65,
                -1.25,
                -1.5,
                top_logprobs=tuple((66 + i, -2.5) for i in range(top)),
                token_id_logprobs=tuple((i, -3.5) for i in range(ids)),
                kept=KeptSet(tuple(range(100, 100 + kept)), 0.5, 1.5) if kept else None,
            ),
            st.integers(0, 20),
            st.integers(0, 50),
            st.integers(0, 3000),
        ),
        max_size=4,
    )
)
def test_the_size_that_is_counted_is_the_size_that_is_sent(tokens: list[TokenOutput]) -> None:
    """Within half and twice: numbers are longer or shorter."""
    table: Any = type("Bytes", (), {"special_ids": frozenset(), "__getitem__": lambda _, i: b"%4d" % i})()
    writer = TokenWriter(table, skip_special_tokens=True, as_ids=False)
    sent = sum(len(to_json(dict(writer.entry(token)))) for token in tokens)
    counted = delta_size(Delta(0, tokens=tuple(tokens)))
    assert counted / 2 <= sent <= counted * 2 or sent == counted == 0


def test_prompt_scores_are_counted_too() -> None:
    scores = tuple(PromptLogprob(7, -1.0, tuple((i, -2.0) for i in range(100))) for _ in range(10))
    assert delta_size(Delta(0, prompt_logprobs=scores)) > 10 * 100 * 50


def test_an_answer_that_grows_too_large_is_refused_and_its_stream_is_not(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(size, "MAX_ANSWER_BYTES", 20_000)
    asked = {"prompt": "a", "max_tokens": 40, "logprobs": True, "top_logprobs": 20, "ignore_eos": True}
    answer = post(server.url, **asked)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "answer_too_large")
    assert "or stream it" in answer.json()["error"]["message"]
    events = SSEDecoder().feed(post(server.url, **asked, stream=True).content)
    assert events[-1].is_done
    assert server.model("tiny").engine.load.num_running == 0
    assert post(server.url, **asked | {"max_tokens": 3}).status_code == 200


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The threads in which large answers were written."""
    seen: list[str] = []

    def spy(value: Any, depth: int = 6) -> bytes:
        seen.append(threading.current_thread().name)
        return to_json_in_slices(value, depth)

    for module in (respond, bursts):
        monkeypatch.setattr(module, "to_json_in_slices", spy)
    yield seen


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_large_is_written_in_a_thread_and_is_the_same(
    server: Any, threads: list[str], monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    asked = {"prompt": ["ab", "Zß🦄"], "n": 2, "max_tokens": 20, "logprobs": True, "top_logprobs": 3}
    asked |= {"prompt_logprobs": 2, "return_token_ids": True, "stream": stream}

    def answers() -> list[Any]:
        answer = post(server.url, **asked)
        events = [event.data for event in SSEDecoder().feed(answer.content)] if stream else [answer.text]
        told = [orjson.loads(event) for event in events if event != "[DONE]"]
        for one in told:
            del one["id"], one["created"]
        return sorted(told, key=lambda one: one["choices"][0]["index"])

    inline = answers()
    assert not threads
    for module in (respond, bursts):
        monkeypatch.setattr(module, "WRITTEN_INLINE_BYTES", 0)
    assert answers() == inline
    assert threads and "MainThread" not in threads


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers(-(2**60), 2**60) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES, st.integers(0, 3))
def test_json_in_slices_is_json(value: Any, depth: int) -> None:
    assert to_json_in_slices(value, depth) == orjson.dumps(value)
    assert to_json_in_slices([value] * 300, depth) == orjson.dumps([value] * 300)


def test_thousands_of_choices_are_a_grammar(server: Any) -> None:
    choices = [f"option {i}" for i in range(3000)]
    answer = post(server.url, prompt="a", choice=choices, max_tokens=40)
    assert answer.json()["choices"][0]["text"] in choices
    too_long = [f"{i} " + "x" * 100 for i in range(3000)]
    refused = post(server.url, prompt="a", guided_choice=too_long).json()["error"]
    assert "3000 choices have" in refused["message"]
    assert refused["param"] == "guided_choice"


def test_many_messages_are_one_text_to_the_context(server: Any, encoded: list[str]) -> None:
    """Each is short enough alone."""
    model = server.model("tiny")
    part = "ab" * 1000
    turns = [{"role": "user", "content": part}] * (
        1 + model.engine.max_model_len * model.codec.token_bytes.longest // len(part)
    )
    answer = post(server.url, "/v1/chat/completions", messages=turns)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert not encoded


def test_the_first_prompt_that_is_too_long_ends_it_and_others_go_in_between(
    server: Any, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completions, "CHARS_AT_ONCE", 1)
    long = "x y " * server.model("tiny").engine.max_model_len
    answer = post(server.url, prompt=["a", long, "b", "c"]).json()
    assert answer["error"]["code"] == "context_length_exceeded"
    assert encoded == ["a", long]


def test_prompts_in_groups_are_the_prompts_in_order(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[Any] = ["ab", "c" * 300, "Z", "d" * 250, "e"]
    asked = {"prompt": texts, "max_tokens": 3, "return_token_ids": True}

    def choices() -> list[Any]:
        made: list[Any] = post(server.url, **asked).json()["choices"]
        return made

    at_once = choices()
    monkeypatch.setattr(completions, "CHARS_AT_ONCE", 260)
    assert choices() == at_once
    assert [choice["index"] for choice in at_once] == [0, 1, 2, 3, 4]
