"""TRL's interface: one row a prompt, in order, equal prompts in one request."""

from __future__ import annotations

from myserve.adapters.trl import trl_rollout_func
from myserve.sdk import DeploymentSampler
from myserve.sdk.testing import ScriptedTransport, ToyTokenizer, tiny_model


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
