"""Other trainers' interfaces: one row a prompt, in order, equal prompts in one request."""

from __future__ import annotations

import pytest

from myserve.sdk import DeploymentSampler
from myserve.sdk.adapters import SamplerTokenCompleter, trl_rollout_func
from myserve.sdk.testing import ScriptedTransport, ToyTokenizer, tiny_model


class Ids:
    def to_ints(self) -> list[int]:
        return [1, 2, 3]


def sampler(transport: ScriptedTransport) -> DeploymentSampler:
    return DeploymentSampler("http://test", "toy", tokenizer=ToyTokenizer(), transport=transport, run_seed=7)


def test_trl_gets_a_row_a_prompt_and_a_group_costs_one_request():
    transport = ScriptedTransport(model=tiny_model())
    prompts = ["2+2="] * 4 + [[{"role": "user", "content": "3+3="}]] * 4
    rollouts = trl_rollout_func(sampler(transport), max_tokens=16)(prompts, trainer=object())
    assert {len(rows) for rows in rollouts.values()} == {8}
    assert [body["n"] for body in transport.requests] == [4, 4]
    assert [len(row) for row in rollouts["logprobs"]] == [len(row) for row in rollouts["completion_ids"]]
    texts = [ToyTokenizer().decode(ids) for ids in rollouts["prompt_ids"]]
    assert all("2+2=" in text for text in texts[:4]) and all("3+3=" in text for text in texts[4:])
    assert len({tuple(ids) for ids in rollouts["completion_ids"]}) == 8


def test_trl_asked_again_gets_new_samples_and_the_run_can_be_repeated():
    runs = []
    for _ in range(2):
        rollout = trl_rollout_func(sampler(ScriptedTransport(model=tiny_model())), max_tokens=16)
        runs.append([rollout(["2+2="])["completion_ids"] for _ in range(2)])
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("stop", "sent"),
    [
        # A string, too, is among the tokens: tinker's renderers look for it there.
        (["x"], {"stop": ["x"], "include_stop_str_in_output": True}),
        ([7], {"stop_token_ids": [7]}),
        ([], {}),
    ],
)
async def test_tinkers_completer_takes_both_kinds_of_stops(stop, sent):
    transport = ScriptedTransport(model=tiny_model())
    done = await SamplerTokenCompleter(sampler(transport), max_tokens=16, temperature=0.5)(Ids(), stop)
    assert len(done.tokens) == len(done.logprobs)
    assert done.stop_reason in ("stop", "length")
    (body,) = transport.requests
    assert (body["prompt"], body["temperature"]) == ([1, 2, 3], 0.5)
    assert {key: body[key] for key in body if "stop" in key} == sent


@pytest.mark.asyncio
@pytest.mark.parametrize(("budget", "sent"), [(None, 16), (4, 4), (99, 16)])
async def test_a_turn_of_tinkers_can_shorten_and_not_lengthen(budget, sent):
    transport = ScriptedTransport(model=tiny_model())
    await SamplerTokenCompleter(sampler(transport), max_tokens=16)(Ids(), [7], max_tokens=budget)
    assert transport.requests[0]["max_tokens"] == sent
