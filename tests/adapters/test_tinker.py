"""tinker-cookbook's interface: ids in, ids and logprobs out, both kinds of stops."""

from __future__ import annotations

import pytest

from myserve.adapters.tinker import SamplerTokenCompleter
from myserve.sdk import DeploymentSampler
from myserve.sdk.testing import ScriptedTransport, ToyTokenizer, tiny_model


class Ids:
    def to_ints(self) -> list[int]:
        return [1, 2, 3]


def sampler(transport: ScriptedTransport) -> DeploymentSampler:
    return DeploymentSampler("http://test", "toy", tokenizer=ToyTokenizer(), transport=transport, run_seed=7)


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
