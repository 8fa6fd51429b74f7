"""Routing through the SDK: a row a token, over cuts and echoes, and as the arrays that a trainer takes."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from myserve import exact_forward, replay_routing
from myserve.core.logprobs import prompt_logprobs
from myserve.sdk import DeploymentSampler, RetryPolicy, SampledCompletion, SamplingError
from myserve.sdk.records.columns import to_columns
from myserve.sdk.records.routing import aligned_routing, routing_array
from myserve.sdk.testing import ScriptedTransport

PAGE = Path(__file__).parents[3] / "docs" / "routing.md"
PROMPT = [1, 67, 281, 5, 40]
OPTIONS = {"max_tokens": 12, "seed": 7, "temperature": 1.2, "include_routing_matrix": True}


@pytest.mark.asyncio
async def test_a_trainer_that_replays_them_has_the_servers_logprobs(server_url, tiny_model):
    async with DeploymentSampler(server_url, "moe") as sampler:
        samples = await sampler.sample_with_prompt_tokens(PROMPT, n=3, echo=True, logprobs=True, **OPTIONS)
    model = exact_forward(AutoModelForCausalLM.from_pretrained(tiny_model("mixtral")).eval())
    for sample in samples:
        assert (sample.routing_shape, sample.routing_dtype) == ([2, 2], "uint8")
        assert len(sample.routing_matrices) == len(sample.inference_logprobs) == len(sample.full_tokens) - 1

        def logprobs(routing, ids=sample.full_tokens):
            with replay_routing(model, routing), torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0]
            return [scored.logprob for scored in prompt_logprobs(logits[:-1], ids[1:])]

        routing = aligned_routing(sample)
        assert logprobs(routing) == sample.inference_logprobs
        late = np.roll(routing, 1, axis=0)  # control: the same rows, a token late
        assert logprobs(late) != sample.inference_logprobs


@pytest.mark.asyncio
async def test_without_an_echo_or_logprobs_there_is_a_row_for_each_sampled_token(server_url):
    async with DeploymentSampler(server_url, "moe") as sampler:
        (plain,) = await sampler.sample_with_prompt_tokens(PROMPT, **OPTIONS)
        (echoed,) = await sampler.sample_with_prompt_tokens(PROMPT, echo=True, **OPTIONS)
        (none,) = await sampler.sample_with_prompt_tokens(
            PROMPT, **OPTIONS | {"include_routing_matrix": False}
        )
    assert plain.inference_logprobs is None and none.routing_matrices is None
    assert len(plain.routing_matrices) == plain.completion_len
    assert len(echoed.routing_matrices) == len(PROMPT) + echoed.completion_len - 1
    assert echoed.routing_matrices[-plain.completion_len :] == plain.routing_matrices
    whole, part = aligned_routing(echoed), aligned_routing(plain)
    assert whole.shape == part.shape == (len(plain.full_tokens), 2, 2)
    assert (part[: len(PROMPT) - 1] == -1).all() and (part[-1] == -1).all() and (whole[-1] == -1).all()
    assert np.array_equal(part[len(PROMPT) - 1 :], whole[len(PROMPT) - 1 :])
    assert (whole[:-1] >= 0).all()


@pytest.mark.asyncio
async def test_ids_over_255(server_url):
    async with DeploymentSampler(server_url, "wide") as sampler:
        (sample,) = await sampler.sample_with_prompt_tokens(PROMPT, **OPTIONS)
    rows = routing_array(sample)
    assert (sample.routing_dtype, sample.routing_shape) == ("uint16", [2, 4])
    assert rows.dtype == np.uint16 and rows.shape == (sample.completion_len, 2, 4)
    assert 256 <= rows.max() < 300


@pytest.mark.asyncio
async def test_a_dense_model_is_final_in_the_servers_words(server_url):
    async with DeploymentSampler(server_url, "tiny") as sampler:
        with pytest.raises(SamplingError, match="dense") as refused:
            await sampler.sample_with_prompt_tokens(PROMPT, **OPTIONS)
    assert (refused.value.status, refused.value.attempts) == (400, 1)


@pytest.mark.asyncio
async def test_rows_survive_cuts(make_sampler, stub, fault):
    options = {"n": 3, "max_tokens": 30, "seed": 7, "include_routing_matrix": True}
    whole = await make_sampler().sample_with_prompt_tokens(PROMPT, **options)
    rng = random.Random(7)
    stub.faults = [fault(cut=True, after=rng.randrange(2, 12)) for _ in range(4)]
    sampler = make_sampler(retry=RetryPolicy(max_attempts=20, first_pause=0.001, longest_pause=0.01))
    cut = await sampler.sample_with_prompt_tokens(PROMPT, **options)
    assert sampler.stats.resumed > 0
    assert [c.routing_matrices for c in cut] == [c.routing_matrices for c in whole]


@pytest.mark.asyncio
async def test_a_missing_row_is_never_filled_in(make_sampler, stub, fault):
    def without_one(chunk):
        for entry in chunk["choices"][0].get("logprobs", {}).get("content", ()) if chunk["choices"] else ():
            del entry["routing_matrix"]
        return chunk

    stub.faults = [fault(edit=without_one)] * 6
    with pytest.raises(SamplingError, match="0 rows of routing for"):
        await make_sampler().sample_with_prompt_tokens(PROMPT, max_tokens=5, include_routing_matrix=True)


@pytest.mark.asyncio
async def test_columns_and_json_keep_them():
    sampler = DeploymentSampler("http://fake", "m", transport=ScriptedTransport(["abcd", "ef"]))
    samples = await sampler.sample_with_prompt_tokens(PROMPT, n=2, include_routing_matrix=True)
    columns = to_columns(samples)
    assert columns["routing"].shape == (len(columns["tokens"]), 2, 2)
    first = columns["routing"][: columns["offsets"][1]]
    assert np.array_equal(first, aligned_routing(samples[0]))
    assert (first[:, 0, 0] == [-1] * 4 + [5, 6, 7, 0, -1]).all()  # the fake's: a position's remainder by 8
    assert SampledCompletion.from_json(samples[0].to_json()) == samples[0]
    plain = await sampler.sample_with_prompt_tokens(PROMPT, n=1)
    assert "routing" not in to_columns([*samples, *plain])


def sample_of(**fields) -> SampledCompletion:
    return SampledCompletion(
        text="", full_tokens=[1, 2], prompt_len=1, finish_reason="stop", completion_len=1, **fields
    )


def test_another_servers_rows_need_the_number_of_layers():
    sample = sample_of(routing_matrices=["AAECAwQF"])
    assert routing_array(sample, num_moe_layers=3).tolist() == [[[0, 1], [2, 3], [4, 5]]]
    with pytest.raises(ValueError, match="pass num_moe_layers"):
        routing_array(sample)
    with pytest.raises(ValueError, match=r"\[6\] bytes"):
        routing_array(sample, num_moe_layers=4)
    with pytest.raises(ValueError, match=r"\[3, 6\] bytes"):
        routing_array(sample_of(routing_matrices=["AAECAwQF", "AAEC"]), num_moe_layers=3)
    with pytest.raises(ValueError, match="include_routing_matrix=True"):
        routing_array(sample_of())


def test_the_page_runs(server_url, tiny_model):
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    here = {"http://localhost:8000": server_url, "my-moe-folder": str(tiny_model("mixtral")), "my-moe": "moe"}
    for theirs, ours in here.items():
        block = block.replace(theirs, ours)
    page: dict[str, Any] = {}
    exec(compile(block, str(PAGE), "exec"), page)
    gates = [p.grad for name, p in page["model"].named_parameters() if "gate.weight" in name]
    assert len(gates) == 2 and all(gate.abs().sum() > 0 for gate in gates)
    scored = page["logprobs"][0, : len(page["samples"][0].full_tokens) - 1, 0].tolist()
    assert scored == pytest.approx(page["samples"][0].inference_logprobs, abs=1e-4)
