"""Answers of earlier turns stay the ids that they were drawn as, whatever their text would be tokenized as."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from chat_template_zoo import family_tokenizer
from myserve.engine.token_bytes import TokenBytes
from myserve.errors import RequestError
from myserve.server.prompts.codec import Codec
from myserve.server.prompts.required_prefix import keeping_prefix
from myserve.wire.chat import ChatMessage

ASKED = ChatMessage(role="user", content="What is it?")
RESULT = ChatMessage(role="user", content="And that?")


def answer(text: str, calls: bool = False) -> ChatMessage:
    call = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": "{}"}}
    return ChatMessage(role="assistant", content=text, tool_calls=(call,) if calls else None)


def pieces(codec: Codec, text: str) -> list[int]:
    """Return other ids of the same text: those of each character."""
    return [i for character in text for i in codec.encode(character, add_special_tokens=False)]


# those in which every turn ends with one of the special tokens that is named here
ENDS = {"chatml": "<|im_end|>", "headers": "<|eot_id|>"}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("is_whole", [True, False])
def test_an_answer_s_own_ids_stay_with_its_thoughts(name: str, is_whole: bool) -> None:
    tokenizer = family_tokenizer(name, "byte_level")
    codec = Codec(tokenizer, TokenBytes(tokenizer, len(tokenizer)))
    eos = tokenizer.convert_tokens_to_ids(ENDS[name])
    asked = codec.encode_chat([ASKED], {})
    thought = "<think>hm</think> \n" if name == "chatml" else ""
    drawn = pieces(codec, thought + "It is so.") + [eos] * is_whole
    messages = [ASKED, answer("It is so."), RESULT]
    rendered = codec.encode_chat(messages, {})
    made = keeping_prefix(rendered, asked + drawn, messages, codec, {}, {eos})
    assert made[: len(asked + drawn)] == asked + drawn != rendered[: len(asked + drawn)]
    # a control: its words alone make other ids
    rest = made[len(asked + drawn) :]
    assert rest == rendered[-len(rest) :] and (rest[0] == eos) is not is_whole
    # two turns further, the beginning is what was the whole before
    later = [*messages, answer("That too."), RESULT]
    second = made + pieces(codec, "That too.") + [eos]
    again = keeping_prefix(codec.encode_chat(later, {}), second, later, codec, {}, {eos})
    assert again[: len(second)] == second and len(again) > len(second)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([ChatMessage(role="user", content="Who is it?"), answer("It is so."), RESULT], "turn 2"),
        ([ASKED, answer("It was so."), RESULT], "turn 3"),
        ([ASKED], "has fewer"),
        ([ASKED, answer("It is so.", calls=True), RESULT], "turn 3"),
    ],
)
def test_another_conversation_s_ids_are_refused(messages: list[ChatMessage], said: str) -> None:
    tokenizer = family_tokenizer("chatml", "byte_level")
    codec = Codec(tokenizer, TokenBytes(tokenizer, len(tokenizer)))
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    prefix = [*codec.encode_chat([ASKED], {}), *pieces(codec, "It is so."), eos]
    with pytest.raises(RequestError, match=said) as caught:
        keeping_prefix(codec.encode_chat(messages, {}), prefix, messages, codec, {}, {eos})
    assert (caught.value.param, caught.value.code) == ("required_prefix_token_ids", "prefix_mismatch")
    with pytest.raises(RequestError, match="ids are 0 to"):
        keeping_prefix([1], [10**6], messages, codec, {}, {eos})


def chat(
    server: Any, messages: list[dict[str, Any]], status: int = 200, path: str = "", **fields: Any
) -> Any:
    body = {"model": "tiny", "messages": messages, **fields}
    answered = httpx.post(server.url + (path or "/v1/chat/completions"), json=body, timeout=60)
    assert answered.status_code == status, answered.text
    return answered.json()


def test_turns_over_the_wire_as_nemo_gym_sends_them(server: Any) -> None:
    """Gym's policy server asks so, and sends each message back as it was answered, ids included."""
    asks = {
        "logprobs": True,
        "top_logprobs": 0,
        "return_tokens_as_token_ids": True,
        "max_tokens": 12,
        "seed": 5,
        "return_token_ids": True,
    }
    messages = [{"role": "user", "content": "Hello"}]
    before: list[int] = []
    for turn in range(3):
        body = chat(server, messages, **asks)
        (choice,) = body["choices"]
        message = choice["message"]
        assert message["prompt_token_ids"] == body["prompt_token_ids"]
        assert message["generation_token_ids"] == choice["token_ids"]
        entries = choice["logprobs"]["content"]
        assert message["generation_log_probs"] == [entry["sampling_logprob"] for entry in entries]
        if before:
            assert message["prompt_token_ids"][: len(before)] == before
            tokenized = chat(server, messages, path="/tokenize")
            assert tokenized["tokens"] == message["prompt_token_ids"]
            explicit = chat(server, plain(messages), path="/tokenize", required_prefix_token_ids=before)
            assert explicit == tokenized
        before = message["prompt_token_ids"] + message["generation_token_ids"]
        messages += [message, {"role": "user", "content": f"And {turn}?"}]
    # a control: this model's answers are not what their text is tokenized as
    assert chat(server, plain(messages), path="/tokenize")["tokens"][: len(before)] != before
    changed = [{"role": "user", "content": "Hullo"}, *messages[1:]]
    refused = chat(server, changed, 400)["error"]
    assert refused["code"] == "prefix_mismatch" and "Hello" in refused["message"]
    del messages[-2]["generation_token_ids"]
    assert "generation_token_ids" in chat(server, messages, 400)["error"]["param"]


def plain(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": message["role"], "content": message["content"]} for message in messages]
