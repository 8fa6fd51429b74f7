"""An agent with tools over twenty turns, by the openai client alone: one trajectory that a trainer can use."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import torch
from transformers import AutoModelForCausalLM

from myserve import exact_forward, exact_logprobs

WHERE = {"type": "string", "pattern": "^[a-z🦄]{1,3}$"}
SCHEMA = {"type": "object", "properties": {"at": WHERE}, "required": ["at"], "additionalProperties": False}
TOOLS: Any = [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}]
START: Any = [{"role": "system", "content": "Look twice."}, {"role": "user", "content": "What is there?"}]


def ask(client: openai.OpenAI, messages: Any, seed: int, *, stream: bool, **fields: Any) -> tuple[Any, Any]:
    """Return an answer's message, as the client sends it back, and what it says of its session."""
    asked: Any = {
        "model": "agent",
        "messages": messages,
        "seed": seed,
        "max_tokens": 100,
        "tools": TOOLS,
    } | fields
    if not stream:
        (choice,) = client.chat.completions.create(**asked).choices
        return choice.message.model_dump(exclude_none=True), (choice.model_extra or {}).get("session")
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    calls: list[Any] = []
    told = []
    for chunk in client.chat.completions.create(**asked, stream=True):
        (part,) = chunk.choices
        message["content"] += part.delta.content or ""
        for call in part.delta.tool_calls or ():
            if call.id:
                calls.append(call.model_dump(exclude={"index"}))
            else:
                calls[call.index]["function"]["arguments"] += call.function.arguments
        told += [part.model_extra["session"]] if "session" in part.model_extra else []
    assert len(told) <= 1 and (not told or part.finish_reason), "with the last chunk"
    return message | ({"tool_calls": calls} if calls else {}), told[0] if told else None


def run_agent(client: openai.OpenAI, turns: int, *, stream: bool = False) -> tuple[list[Any], list[Any]]:
    """Return the conversation of an agent that calls a tool in most turns, and what was told of its session."""
    messages, told = list(START), []
    for turn in range(turns):
        calls = turn % 4 < 3
        choice: Any = {"tool_choice": "required"} if calls else {"tool_choice": "auto", "max_tokens": 8}
        message, session = ask(client, messages, turn, stream=stream, **choice)
        told.append(session)
        messages.append(message)
        if calls:
            for call in message["tool_calls"]:
                at = json.loads(call["function"]["arguments"])["at"]
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": f"{at}: é{turn}"})
        else:
            messages.append({"role": "user", "content": f"And {turn}?"})
    return messages, told


def session_of(server: Any, name: str, **query: Any) -> Any:
    answered = httpx.get(f"{server.url}/v1/sessions/{name}", params=query)
    assert answered.status_code == 200, answered.text
    return answered.json()


def without_request_ids(body: Any) -> Any:
    return [
        trajectory | {"turns": [turn | {"request_id": ""} for turn in trajectory["turns"]]}
        for trajectory in body["trajectories"]
    ]


def test_twenty_turns_are_one_trajectory_with_a_trainers_bits(
    sessions_server: Any, session_client: openai.OpenAI, agent_folder: str
) -> None:
    messages, told = run_agent(session_client, 20)
    body = session_of(sessions_server, "test_twenty_turns_are_one_trajectory_with_a_trainers_bits")
    (made,) = body["trajectories"]
    ids, mask = made["token_ids"], made["loss_mask"]
    assert {
        len(made[name]) for name in ("loss_mask", "logprobs", "sampling_logprobs", "weight_versions")
    } == {len(ids)}
    # what was told: each turn goes on from the last, with exactly its ids
    assert [each["turn"] for each in told] == list(range(20))
    assert [each["continues"] for each in told] == [None, *range(19)]
    spans = [(turn["start"], turn["end"]) for turn in made["turns"]]
    assert [each["kept_tokens"] for each in told] == [0, *(end for _, end in spans[:-1])]
    assert [each["kept_tokens"] + each["new_tokens"] for each in told] == [start for start, _ in spans]
    # only what was sampled has a loss, and numbers
    assert [i for i, one in enumerate(mask) if one] == [i for start, end in spans for i in range(start, end)]
    for name in ("logprobs", "sampling_logprobs", "weight_versions"):
        assert [value is not None for value in made[name]] == [bool(one) for one in mask]
    # a trainer's forward over the whole has the server's logprobs
    model = exact_forward(AutoModelForCausalLM.from_pretrained(agent_folder))
    logits = model(torch.tensor([ids])).logits[0, :-1]
    scored = exact_logprobs(logits, torch.tensor(ids[1:])).tolist()
    sampled = [i for i, one in enumerate(mask) if one]
    assert [scored[i - 1] for i in sampled] == [made["logprobs"][i] for i in sampled]
    # the control: rendered anew, the same conversation is another one, and the trainer's numbers others
    rendered = httpx.post(
        f"{sessions_server.url}/tokenize",
        json={"model": "agent", "messages": messages, "tools": TOOLS, "add_generation_prompt": False},
    ).json()["tokens"]
    assert rendered[: len(ids)] != ids
    assert all(each["drift"] and each["drift"][0]["used"] == "kept" for each in told[1:])


def test_streamed_is_the_same(sessions_server: Any) -> None:
    made = []
    for name, stream in (("whole", False), ("streamed", True)):
        client = openai.OpenAI(
            base_url=f"{sessions_server.url}/v1", api_key="any", default_headers={"X-Session-ID": name}
        )
        with client:
            _, told = run_agent(client, 6, stream=stream)
        body = without_request_ids(session_of(sessions_server, name))
        made.append((body, [{**each, "id": ""} for each in told]))
    assert made[0] == made[1]


def test_each_token_has_the_version_that_drew_it(sessions_server: Any, session_client: openai.OpenAI) -> None:
    ask(session_client, START, 1, stream=False, tool_choice="none")
    message, _ = ask(session_client, START, 1, stream=False, tool_choice="none")
    update = httpx.post(
        f"{sessions_server.url}/v1/weights", json={"path": "model", "model": "agent"}, timeout=60
    )
    assert update.status_code == 200, update.text
    _, told = ask(session_client, [*START, message, START[1]], 2, stream=False, tool_choice="none")
    assert told["continues"] == 0
    (made,) = session_of(sessions_server, "test_each_token_has_the_version_that_drew_it")["trajectories"]
    first, second = made["turns"]
    versions = made["weight_versions"]
    old = versions[first["start"]]
    assert versions[first["start"] : first["end"]] == [old] * (first["end"] - first["start"])
    assert versions[second["start"] :] == [old + 1] * (second["end"] - second["start"])
    assert versions[first["end"] : second["start"]] == [None] * (second["start"] - first["end"])
