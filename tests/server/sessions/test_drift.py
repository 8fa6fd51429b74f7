"""Where a conversation is not what its session keeps, the answer says where and what was used; nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

SAYS = {"max_tokens": 12, "return_token_ids": True}
SYSTEM = {"role": "system", "content": "Be brief."}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


@pytest.fixture
def chat(sessions_server: Any, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`chat(messages)`: the first choice, asked in this test's session."""

    def ask(messages: Any, status: int = 200, session: str | None = request.node.name, **fields: Any) -> Any:
        body = {"model": "agent", "messages": messages, "seed": len(messages), **SAYS, **fields}
        headers = {} if session is None else {"X-Session-ID": session}
        answered = httpx.post(
            f"{sessions_server.url}/v1/chat/completions", json=body, headers=headers, timeout=60
        )
        assert answered.status_code == status, answered.text
        return answered.json()["choices"][0] if status == 200 else answered.json()["error"]

    return ask


@pytest.fixture
def trajectories(sessions_server: Any, request: pytest.FixtureRequest) -> Callable[[], list[Any]]:
    """The trajectories of this test's session; each sampled token has its loss in exactly one."""

    def ask() -> list[Any]:
        body = httpx.get(f"{sessions_server.url}/v1/sessions/{request.node.name}").json()
        found: list[Any] = body["trajectories"]
        turns = {turn["turn"]: turn for one in found for turn in one["turns"]}
        assert len(turns) == body["num_turns"]
        assert sum(sum(one["loss_mask"]) for one in found) == sum(
            t["end"] - t["start"] for t in turns.values()
        )
        return found

    return ask


def ids_of(choice: Any) -> list[int]:
    return list(choice["prompt_token_ids"] + choice["token_ids"])


def said(choice: Any) -> dict[str, Any]:
    return dict(choice["message"])


def test_rendered_again_it_drifts_and_a_session_keeps_it(chat: Any, trajectories: Any) -> None:
    messages = [SYSTEM, user("Hello")]
    first = chat(messages)
    messages += [said(first), user("And?")]
    second, control = chat(messages), chat(messages, session=None)
    kept = ids_of(first)
    assert second["prompt_token_ids"][: len(kept)] == kept
    assert control["prompt_token_ids"][: len(kept)] != kept and "session" not in control
    (drift,) = second["session"]["drift"]
    at = drift["token"]
    assert second["prompt_token_ids"][:at] == control["prompt_token_ids"][:at]
    assert second["prompt_token_ids"][at] != control["prompt_token_ids"][at]
    assert drift == {"message": 2, "token": at, "reason": "retokenized", "used": "kept"}
    # new text is tokenized as it always is
    rest = second["prompt_token_ids"][len(kept) :]
    assert rest == control["prompt_token_ids"][-len(rest) :]
    assert second["session"] | {"drift": []} == {
        "id": "test_rendered_again_it_drifts_and_a_session_keeps_it",
        "turn": 1, "continues": 0, "kept_tokens": len(kept), "new_tokens": len(rest), "drift": [],
    }  # fmt: skip
    (made,) = trajectories()
    assert made["token_ids"] == ids_of(second) and not made["retried"] and made["branch"] is None


@pytest.mark.parametrize("change", ["user", "answer", "gone", "order"])
def test_an_edit_is_a_branch(chat: Any, trajectories: Any, change: str) -> None:
    messages = [SYSTEM, user("One"), None, user("Two"), None, user("Three")]
    for at in (2, 4):
        answer = chat(messages[:at])
        messages[at] = said(answer)
    edited: Any = {
        "user": [*messages[:3], user("Too"), *messages[4:]],
        "answer": [*messages[:4], said(answer) | {"content": "else"}, messages[5]],
        "gone": [SYSTEM, *messages[3:]],
        "order": [SYSTEM, *messages[3:5], *messages[1:3], messages[5]],
    }[change]
    left = {"user": 3, "answer": 4, "gone": 1, "order": 1}[change]
    kept = {"user": 0, "answer": 0, "gone": None, "order": None}[change]
    branch = chat(edited)
    drift = branch["session"]["drift"][-1]
    before = ids_of(answer)
    same = drift["token"]
    assert drift == {"message": left, "token": same, "reason": "edited", "used": "sent"}
    assert branch["prompt_token_ids"][:same] == before[:same]
    assert branch["prompt_token_ids"][same] != before[same]
    assert branch["session"]["continues"] == kept
    # the first conversation goes on as if nothing had been
    assert chat(messages)["session"]["continues"] == 1
    other, main = trajectories()
    assert sum(main["loss_mask"]) == sum(turn["end"] - turn["start"] for turn in main["turns"])
    assert other["token_ids"] == ids_of(branch)
    if kept is None:
        assert other["branch"] is None
    else:
        assert other["branch"] == {"trajectory": 1, "tokens": other["turns"][0]["end"]}
        assert sum(other["loss_mask"]) == len(branch["token_ids"])


def test_thoughts_that_the_template_drops_are_kept(chat: Any, trajectories: Any) -> None:
    asks = {"model": "thinker", "thinking_token_budget": 4, "max_tokens": 14}
    messages = [user("Why?")]
    first = chat(messages, **asks)
    thought = first["message"]["reasoning_content"]
    assert thought
    for sent in (thought, None):  # a client sends it back, or does not
        message = said(first) | {"reasoning_content": sent}
        second = chat([*messages, message, user("So?")], **asks)
        (drift,) = second["session"]["drift"]
        assert drift | {"token": 0} == {"message": 1, "token": 0, "reason": "rerendered", "used": "kept"}
        assert second["prompt_token_ids"][: len(ids_of(first))] == ids_of(first)
    (made,) = trajectories()
    assert made["token_ids"] == ids_of(second)
    # one that the client changed is another answer
    other = chat([*messages, said(first) | {"reasoning_content": "no"}, user("So?")], **asks)
    assert other["session"]["drift"][-1]["reason"] == "edited"
    assert other["session"]["drift"][-1]["message"] == 1 and other["session"]["continues"] is None


def test_a_call_is_known_whatever_its_json_looks_like(chat: Any, trajectories: Any) -> None:
    digits = {name: {"type": "integer", "minimum": 0, "maximum": 9} for name in "ab"}
    schema = {"type": "object", "properties": digits, "required": ["a", "b"], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "add", "parameters": schema}}]
    asks = {"tools": tools, "max_tokens": 90}
    first = chat([user("Add")], **asks, tool_choice={"type": "function", "function": {"name": "add"}})
    (call,) = first["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    written = json.dumps(dict(reversed(arguments.items())), indent=3)
    call["function"]["arguments"] = written
    result = {"role": "tool", "tool_call_id": call["id"], "content": "7"}
    second = chat([user("Add"), said(first), result], **asks, tool_choice="none")
    assert second["session"]["continues"] == 0
    assert second["prompt_token_ids"][: len(ids_of(first))] == ids_of(first)
    # other arguments are another call; other tools another prompt
    call["function"]["arguments"] = '{"a": 11, "b": 1}'
    third = chat([user("Add"), said(first), result], **asks, tool_choice="none")
    assert third["session"]["continues"] is None and third["session"]["drift"][-1]["message"] == 1
    tools[0]["function"]["description"] = "sums"
    fourth = chat([user("Add"), said(first), result], **asks, tool_choice="none")
    assert fourth["session"]["drift"] == [
        {"message": 0, "token": fourth["session"]["drift"][0]["token"], "reason": "tools", "used": "sent"}
    ]
    assert len(trajectories()) == 3


def test_a_retry_is_not_counted_twice(chat: Any, trajectories: Any) -> None:
    first = chat([user("Hi")])
    again = chat([user("Hi")])
    assert again["session"] == first["session"] and again["session"]["turn"] == 0
    other = chat([user("Hi")], seed=99)
    assert other["session"]["turn"] == 1 and other["session"]["drift"] == []
    chat([user("Hi"), said(other), user("On")])
    left, main = trajectories()
    assert (left["retried"], main["retried"]) == (True, False)
    assert left["token_ids"] == ids_of(first) and len(main["turns"]) == 2
    assert left["branch"] is None


def test_of_n_choices_the_conversation_goes_on_from_the_one_that_was_sent_back(
    sessions_server: Any, chat: Any, trajectories: Any
) -> None:
    body = {"model": "agent", "messages": [user("Say")], "n": 3, "seed": 4, **SAYS}
    name = {"X-Session-ID": "test_of_n_choices_the_conversation_goes_on_from_the_one_that_was_sent_back"}
    answered = httpx.post(f"{sessions_server.url}/v1/chat/completions", json=body, headers=name).json()
    choices = answered["choices"]
    assert sorted(choice["session"]["turn"] for choice in choices) == [0, 1, 2]
    second = chat([user("Say"), said(choices[1]), user("On")])
    assert second["session"]["continues"] == choices[1]["session"]["turn"]
    found = trajectories()
    assert len(found) == 3 and not any(one["retried"] for one in found)
    assert sorted(map(len, (one["turns"] for one in found))) == [1, 1, 2]


def test_requests_side_by_side_are_branches(chat: Any, trajectories: Any) -> None:
    first = chat([user("Go")])
    asked = [[user("Go"), said(first), user(f"Way {way}")] for way in range(4)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(chat, asked))
    assert [answer["session"]["continues"] for answer in answers] == [0] * 4
    assert sorted(answer["session"]["turn"] for answer in answers) == [1, 2, 3, 4]
    found = trajectories()
    assert [len(one["turns"]) for one in found] == [2] * 4
    assert [one["branch"] is None for one in found] == [False, False, False, True]


def test_an_answer_that_did_not_end_is_not_kept(
    sessions_server: Any, chat: Any, trajectories: Any, wait_until: Any
) -> None:
    chat([user("Hi")])
    body = {
        "model": "agent",
        "messages": [user("Long")],
        "max_tokens": 4000,
        "ignore_eos": True,
        "stream": True,
    }
    url, name = f"{sessions_server.url}/v1/chat/completions", "test_an_answer_that_did_not_end_is_not_kept"
    with httpx.stream("POST", url, json=body, headers={"X-Session-ID": name}) as stream:
        next(stream.iter_lines())
    wait_until(lambda: sessions_server.model("agent").engine.load.num_running == 0)
    refused = chat([user("Hi"), user("x" * 40_000)], 400)
    assert refused["code"] == "context_length_exceeded"
    assert chat([user("Hi")], 400, temperature=-1.0)
    (made,) = trajectories()
    assert len(made["turns"]) == 1


@pytest.mark.parametrize("ends", ["length", "eos within"])
def test_answers_that_end_otherwise_are_kept_whole(chat: Any, trajectories: Any, ends: str) -> None:
    fields: Any = (
        {"logit_bias": {"2": -100}} if ends == "length" else {"ignore_eos": True, "logit_bias": {"2": 5}}
    )
    first = chat([user("Hi")], **fields)
    assert first["finish_reason"] == "length" and len(first["token_ids"]) == 12
    assert (2 in first["token_ids"][:-1]) is (ends == "eos within")
    messages = [user("Hi"), said(first), user("On")]
    second = chat(messages)
    assert second["prompt_token_ids"][: len(ids_of(first))] == ids_of(first)
    (made,) = trajectories()
    assert made["token_ids"] == ids_of(second)


def test_a_cut_answer_goes_on_from_its_ids(chat: Any, trajectories: Any) -> None:
    whole = chat([user("Hi")], session=None, logit_bias={"2": -100}, max_tokens=20)
    first = chat([user("Hi")], logit_bias={"2": -100}, max_tokens=8)
    asks = {"add_generation_prompt": False, "continue_final_message": True, "num_prior_tokens": 8, "seed": 1}
    second = chat([user("Hi"), said(first)], logit_bias={"2": -100}, **asks)
    assert second["prompt_token_ids"] == ids_of(first) and second["session"]["new_tokens"] == 0
    assert ids_of(second) == ids_of(whole)
    message = said(second) | {"content": said(first)["content"] + said(second)["content"]}
    third = chat([user("Hi"), message, user("On")])
    assert third["session"]["continues"] == 1
    (made,) = trajectories()
    assert made["token_ids"] == ids_of(third)


def test_an_answer_that_had_ended_is_rendered_to_go_on(chat: Any, trajectories: Any) -> None:
    first = chat([user("Hi")], structured_outputs={"choice": ["abc"]})
    assert first["finish_reason"] == "stop" and said(first)["content"] == "abc"
    asks = {"add_generation_prompt": False, "continue_final_message": True}
    second = chat([user("Hi"), said(first)], **asks)
    (drift,) = second["session"]["drift"]
    assert drift | {"token": 0} == {"message": 1, "token": 0, "reason": "template", "used": "sent"}
    assert second["session"]["continues"] is None and len(trajectories()) == 2


def test_a_template_without_eos_says_that_it_does_not_show_where_a_turn_ends(
    chat: Any, trajectories: Any
) -> None:
    first = chat([user("Hi")], model="plain")
    second = chat([user("Hi"), said(first), user("On")], model="plain")
    (drift,) = second["session"]["drift"]
    assert drift | {"token": 0} == {"message": 1, "token": 0, "reason": "template", "used": "sent"}
    assert second["session"]["continues"] is None
    assert [one["token_ids"] for one in trajectories()] == [ids_of(first), ids_of(second)]


def test_ids_are_run_as_they_are_and_kept(sessions_server: Any, chat: Any, trajectories: Any) -> None:
    name = {"X-Session-ID": "test_ids_are_run_as_they_are_and_kept"}

    def post(path: str, body: dict[str, Any]) -> Any:
        return httpx.post(sessions_server.url + path, json=body, headers=name, timeout=60).json()

    prompt = [5, 6, 7]
    body = {"model": "agent", "seed": 1, "max_tokens": 6, "return_token_ids": True}
    (first,) = post("/v1/completions", body | {"prompt": prompt})["choices"]
    prompt = [*prompt, *first["token_ids"], 9]
    sampling = {"max_tokens": 6, "seed": 2}
    (second,) = post("/inference/v1/generate", {"token_ids": prompt, "sampling_params": sampling})["choices"]
    assert second["session"]["continues"] == 0
    prompt = [*prompt, *second["token_ids"]]
    native = post(
        "/generate", {"input_ids": prompt, "sampling_params": {"max_new_tokens": 6, "sampling_seed": 3}}
    )
    (made,) = trajectories()
    assert made["token_ids"] == [*prompt, *native["output_ids"]] and len(made["turns"]) == 3
    (last,) = post("/v1/completions", body | {"prompt": [5, 6, 8]})["choices"]
    assert last["session"]["drift"] == [{"message": None, "token": 2, "reason": "edited", "used": "sent"}]
    # another model's name never goes on from these
    (other,) = post("/v1/completions", body | {"prompt": prompt, "model": "plain"})["choices"]
    assert other["session"]["continues"] is None


def test_ids_that_messages_carry_are_the_prompt(chat: Any, trajectories: Any) -> None:
    """NeMo-RL's way, in a session: the client's own ids count, and are found to be those that are kept."""
    asks = {"logprobs": True, "return_tokens_as_token_ids": True}
    first = chat([user("Hi")], **asks)
    second = chat([user("Hi"), said(first), user("On")], **asks)
    assert second["session"]["continues"] == 0 and second["session"]["drift"] == []
    # without them in the messages, the third turn goes on all the same
    plain = [{"role": m["role"], "content": m["content"]} for m in (said(first), said(second))]
    third = chat([user("Hi"), plain[0], user("On"), plain[1], user("More")])
    assert third["session"]["continues"] == 1
    (made,) = trajectories()
    assert made["token_ids"] == ids_of(third)


def test_in_another_context_an_answer_is_still_what_was_sampled(chat: Any, trajectories: Any) -> None:
    """Compaction: what is left of the conversation is context, with the ids that its answers were sampled as."""
    messages = [SYSTEM, user("One")]
    answers = []
    for text in ("Two", "Three", "Four"):
        answers.append(chat(messages))
        messages += [said(answers[-1]), user(text)]
    fields: Any = {"add_generation_prompt": True}
    foreign = {"role": "assistant", "content": "not sampled"}
    compacted = [SYSTEM, user("Of One and Two"), foreign, user("Go on"), *messages[4:]]
    branch, control = chat(compacted, **fields), chat(compacted, session=None, **fields)
    ids = branch["prompt_token_ids"]

    def at(drawn: list[int], within: list[int]) -> int:
        return next((i for i in range(len(within)) if within[i : i + len(drawn)] == drawn), -1)

    for answer in answers[1:]:
        assert at(answer["token_ids"], ids) > 0 and at(answer["token_ids"], control["prompt_token_ids"]) < 0
    _, main = trajectories()
    assert main["token_ids"] == ids_of(branch)
    assert main["loss_mask"] == [0] * len(ids) + [1] * len(branch["token_ids"])
    # the text is what was sent
    assert branch["session"]["drift"][-1] | {"token": 0} == {
        "message": 1,
        "token": 0,
        "reason": "edited",
        "used": "sent",
    }
    more = chat([*compacted, said(branch), user("More")])
    assert more["session"]["continues"] == branch["session"]["turn"]
