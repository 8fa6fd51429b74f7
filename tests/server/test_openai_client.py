"""The unmodified openai client, with strict validation, gets what it asks for; streams say the same as wholes."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

USER = [{"role": "user", "content": "Count to three: Zß🦄你"}]

# Parameter sets over which a stream must equal the unstreamed answer.
MIXES: list[dict[str, Any]] = [
    {"temperature": 0},
    {"seed": 1},
    {"seed": 2, "temperature": 1.5, "n": 3},
    {"seed": 3, "top_p": 0.8, "frequency_penalty": 0.5, "presence_penalty": 0.5},
    {"seed": 4, "stop": ["e", "o", "a"], "n": 2},
    {"seed": 5, "max_tokens": 1},
    {"seed": 6, "extra_body": {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.2, "noise": "torch"}},
    {"seed": 7, "extra_body": {"ignore_eos": True, "skip_special_tokens": False}},
]


def chat(client: openai.OpenAI, **fields: Any) -> ChatCompletion:
    # its overloads cannot follow fields that a test puts together
    create: Any = client.chat.completions.create
    answer: ChatCompletion = create(**{"model": "tiny", "messages": USER, "max_tokens": 24} | fields)
    return answer


def chat_chunks(client: openai.OpenAI, **fields: Any) -> list[ChatCompletionChunk]:
    chunks: Any = chat(client, stream=True, **fields)
    return list(chunks)


def complete(client: openai.OpenAI, **fields: Any) -> Completion:
    create: Any = client.completions.create
    answer: Completion = create(**{"model": "tiny", "prompt": "Hello", "max_tokens": 24} | fields)
    return answer


def joined(chunks: list[ChatCompletionChunk]) -> dict[int, dict[str, Any]]:
    """Per choice: the text, the logprobs entries, the finish reason."""
    choices: dict[int, dict[str, Any]] = defaultdict(lambda: {"text": "", "logprobs": [], "finish": None})
    for chunk in chunks:
        for choice in chunk.choices:
            assert choices[choice.index]["finish"] is None, "nothing comes after the finish reason"
            choices[choice.index]["text"] += choice.delta.content or ""
            if choice.logprobs is not None:
                choices[choice.index]["logprobs"] += choice.logprobs.content or []
            choices[choice.index]["finish"] = choice.finish_reason
    return dict(choices)


@pytest.mark.parametrize("mix", MIXES, ids=range(len(MIXES)))
def test_a_chat_stream_joined_is_the_unstreamed_answer(client: openai.OpenAI, mix: dict[str, Any]) -> None:
    whole = chat(client, logprobs=True, top_logprobs=2, **mix)
    streamed = joined(chat_chunks(client, logprobs=True, top_logprobs=2, **mix))
    assert len(whole.choices) == mix.get("n", 1)
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert streamed[choice.index] == {
            "text": choice.message.content,
            "logprobs": choice.logprobs.content,
            "finish": choice.finish_reason,
        }


def test_another_seed_is_another_answer(client: openai.OpenAI) -> None:
    """The control of the test above: equality means something."""
    texts = {chat(client, seed=seed).choices[0].message.content for seed in range(4)}
    assert len(texts) > 1


@pytest.mark.parametrize("mix", MIXES, ids=range(len(MIXES)))
def test_a_completion_stream_joined_is_the_unstreamed_answer(
    client: openai.OpenAI, completion_stream_client: openai.OpenAI, mix: dict[str, Any]
) -> None:
    prompts = ["Hello", "Zß🦄"]
    whole = complete(client, prompt=prompts, logprobs=2, **mix)
    texts: dict[int, str] = defaultdict(str)
    logprobs: dict[int, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    finish: dict[int, str | None] = {}
    chunks: Any = complete(completion_stream_client, prompt=prompts, logprobs=2, stream=True, **mix)
    for chunk in chunks:
        for choice in chunk.choices:
            assert finish.get(choice.index) is None, "nothing comes after the finish reason"
            texts[choice.index] += choice.text
            finish[choice.index] = choice.finish_reason
            for name, values in choice.logprobs.model_dump().items():
                logprobs[choice.index][name] += values
    assert len(whole.choices) == 2 * mix.get("n", 1)
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert texts[choice.index] == choice.text
        assert finish[choice.index] == choice.finish_reason
        assert dict(logprobs[choice.index]) == choice.logprobs.model_dump()


def test_logprobs_are_ordered_and_hold_the_chosen_token_where_it_belongs(client: openai.OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=5, temperature=0)
    assert answer.choices[0].logprobs is not None
    for entry in answer.choices[0].logprobs.content or []:
        values = [alternative.logprob for alternative in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert len(values) == 5
        assert entry.top_logprobs[0].token == entry.token  # greedy takes the likeliest
        assert entry.top_logprobs[0].logprob == entry.logprob


def test_without_alternatives_the_list_is_empty(client: openai.OpenAI) -> None:
    logprobs = chat(client, logprobs=True).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    assert all(entry.top_logprobs == [] for entry in logprobs.content)


def test_no_logprobs_unless_asked(client: openai.OpenAI) -> None:
    answer = chat(client)
    assert answer.choices[0].logprobs is None
    assert "logprobs" not in (answer.model_extra or {})


def test_usage_counts_the_prompt_once_and_every_sampled_token(client: openai.OpenAI) -> None:
    answer = chat(client, n=3, max_tokens=5, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 15
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 15
    alone = chat(client, max_tokens=1).usage
    assert alone is not None
    assert alone.prompt_tokens == answer.usage.prompt_tokens


def test_a_streams_usage_comes_last_and_only_when_asked(client: openai.OpenAI) -> None:
    fields = {"max_tokens": 5, "seed": 1}
    chunks = chat_chunks(client, stream_options={"include_usage": True}, **fields)
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].choices == []
    last, whole = chunks[-1].usage, chat(client, **fields).usage
    assert last is not None
    assert whole is not None
    assert (last.prompt_tokens, last.completion_tokens) == (whole.prompt_tokens, whole.completion_tokens)
    assert all(chunk.usage is None for chunk in chat_chunks(client, **fields))


def test_every_chunk_has_the_same_id_and_time(client: openai.OpenAI) -> None:
    chunks = chat_chunks(client, n=2)
    assert len({(chunk.id, chunk.created, chunk.model, chunk.system_fingerprint) for chunk in chunks}) == 1
    assert chunks[0].id.startswith("chatcmpl-")
    assert chunks[0].choices[0].delta.role == "assistant"


@pytest.mark.parametrize("n", [1, 3])
def test_the_stream_helper_collects_what_create_gives(client: openai.OpenAI, n: int) -> None:
    """With logprobs on, where a list inside a delta would end it."""
    asked: Any = {"model": "tiny", "messages": USER, "seed": 3, "n": n, "logprobs": True, "top_logprobs": 2}
    asked |= {"stop": ["e", "o", "a"], "max_tokens": 400}
    with client.chat.completions.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    whole = chat(client, **asked)
    assert {"content.delta", "content.done", "logprobs.content.delta", "logprobs.content.done"} <= kinds
    for streamed, choice in zip(final.choices, whole.choices, strict=True):
        assert streamed.message.content == choice.message.content
        assert streamed.logprobs is not None and choice.logprobs is not None
        assert streamed.logprobs.content == choice.logprobs.content


def test_finish_reasons(client: openai.OpenAI) -> None:
    assert chat(client, max_tokens=2, extra_body={"ignore_eos": True}).choices[0].finish_reason == "length"
    eos = {"logit_bias": {"2": 100}}
    stopped = chat(client, **eos)
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content == ""  # EOS itself is no text
    assert stopped.usage is not None
    assert stopped.usage.completion_tokens == 1


def test_a_stop_string_is_cut_off_and_named(client: openai.OpenAI) -> None:
    free = chat(client, seed=9, extra_body={"ignore_eos": True}).choices[0]
    assert free.message.content
    stop = free.message.content[3:5]
    cut = chat(client, seed=9, stop=[stop, "never this"], extra_body={"ignore_eos": True}).choices[0]
    assert cut.message.content == free.message.content[: free.message.content.index(stop)]
    assert (cut.finish_reason, cut.model_extra["stop_reason"]) == ("stop", stop)  # type: ignore[index]


def test_choices_of_one_request_differ_and_can_be_had_again(client: openai.OpenAI) -> None:
    first = chat(client, n=4)
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) > 1
    (seed,) = {choice.model_extra["seed"] for choice in first.choices}  # type: ignore[index]
    again = chat(client, n=4, seed=seed)
    assert [choice.message.content for choice in again.choices] == texts
    third = chat(client, seed=seed, extra_body={"sample_index": 2})
    assert third.choices[0].message.content == texts[2]


def test_one_prompt_twice_in_a_list_is_sampled_twice(client: openai.OpenAI) -> None:
    both = complete(client, prompt=["Hello", "Hello"], seed=5)
    assert both.choices[0].text != both.choices[1].text
    seed = both.choices[1].model_extra["seed"]  # type: ignore[index]
    assert complete(client, seed=seed).choices[0].text == both.choices[1].text
    assert complete(client, seed=5).choices[0].text == both.choices[0].text


def test_prompts_as_text_and_as_ids_are_the_same(client: openai.OpenAI) -> None:
    asked = complete(client, seed=1, extra_body={"return_token_ids": True}).choices[0]
    ids = asked.model_extra["prompt_token_ids"]  # type: ignore[index]
    for prompt in (ids, [ids], ["Hello"]):
        assert complete(client, prompt=prompt, seed=1).choices[0].text == asked.text


def test_models(client: openai.OpenAI) -> None:
    cards = {card.id: card for card in client.models.list()}
    assert set(cards) == {"tiny", "accounts/a/deployments/d"}
    assert cards["tiny"].model_extra["max_model_len"] == 512  # type: ignore[index]
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_model_answers_to_each_of_its_names(client: openai.OpenAI) -> None:
    first, second = (chat(client, model=name, seed=1) for name in ("tiny", "accounts/a/deployments/d"))
    assert first.choices[0].message == second.choices[0].message
    assert (first.model, second.model) == ("tiny", "accounts/a/deployments/d")


def test_an_error_is_the_clients_own_exception(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        chat(client, temperature=-1)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as missing:
        chat(client, model="gpt-4")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        chat(client, max_tokens=100_000)
    assert long.value.code == "context_length_exceeded"
    # by which litellm knows the error
    assert "maximum context length is" in long.value.message
