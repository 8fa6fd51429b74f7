"""The sampler against a real server on a socket: the original specification's surface, and what lies past it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from myserve.sdk import (
    AdaptiveConcurrencyController,
    DeploymentSampler,
    FixedConcurrencyController,
    SamplingDeadlineError,
)
from myserve.sdk.seeds import index_seed
from myserve.sdk.testing import ScriptedTransport, ToyTokenizer, scripted, tiny_model

pytestmark = pytest.mark.asyncio
SUM = [{"role": "user", "content": "Solve: 2+2="}]


def without_times(completion: Any) -> dict[str, Any]:
    """A completion's JSON less what differs between two runs of the same sample."""
    drop = ("token_times", "request_id", "attempts")
    return {name: value for name, value in completion.to_json().items() if name not in drop}


async def test_the_original_specifications_fields(make_sampler, stub):
    sampler = make_sampler(concurrency_controller=AdaptiveConcurrencyController(initial_window=16))
    completions = await sampler.sample_with_tokens(messages=SUM, n=4, max_tokens=64, temperature=0.7, seed=7)
    prompt = ToyTokenizer().apply_chat_template(SUM, add_generation_prompt=True)
    assert len(completions) == 4
    for index, c in enumerate(completions):
        assert c.index == index
        assert c.full_tokens == prompt + list(c.text.encode())
        assert (c.prompt_len, c.completion_len) == (len(prompt), len(c.text))
        assert c.finish_reason in ("stop", "length")
        assert c.inference_logprobs is None and c.routing_matrices is None and not c.logprobs_echoed
    assert len({c.text for c in completions}) == 4  # each of the n has noise of its own


async def test_n_samples_are_one_request_and_so_one_prefill(make_sampler, stub):
    await make_sampler().sample_with_tokens(SUM, n=8, max_tokens=8)
    assert [body["n"] for body in stub.bodies] == [8]


async def test_more_samples_than_a_request_may_have_are_asked_for_in_parts(make_sampler, stub):
    whole = await make_sampler().sample_with_tokens(SUM, n=300, max_tokens=4, seed=7)
    parts = [(body.get("sample_index", 0), body["n"]) for body in stub.bodies]
    assert sorted(parts) == [(0, 128), (128, 128), (256, 44)]
    assert [c.index for c in whole] == list(range(300))
    stub.bodies.clear()
    narrow = make_sampler(concurrency_controller=FixedConcurrencyController(100))
    again = await narrow.sample_with_tokens(SUM, n=300, max_tokens=4, seed=7)
    assert list(map(without_times, again)) == list(map(without_times, whole))
    assert max(body["n"] for body in stub.bodies) <= 100


async def test_prompts_come_as_arrays_tensors_and_encodings(make_sampler, stub):
    import numpy as np
    import torch
    from transformers import BatchEncoding

    sampler = make_sampler()
    rows = [[1, 2], [3, 4]]
    options = {"max_tokens": 4, "seed": 7}
    plain = [[c.text for c in group] for group in await sampler.sample_batch(rows, **options)]
    encoding = {"input_ids": rows, "attention_mask": [[1, 1], [1, 1]]}
    together = [
        np.array(rows),
        torch.tensor(rows),
        BatchEncoding(encoding),
        BatchEncoding(encoding, tensor_type="pt"),
    ]
    apart = [list(map(np.array, rows)), [BatchEncoding({"input_ids": row}) for row in rows]]
    for prompts in (*together, *apart):
        assert [[c.text for c in group] for group in await sampler.sample_batch(prompts, **options)] == plain
    for prompt in (np.array(rows[0]), torch.tensor(rows[0]), BatchEncoding({"input_ids": rows[0]})):
        (c,) = await sampler.sample_with_prompt_tokens(prompt, **options)
        assert c.prompt_tokens == rows[0]
        assert [c.prompt_tokens async for c in sampler.stream_completions(prompt, **options)] == [rows[0]]
    for wrong in ("one text", {"text": ["a"]}, 7):
        with pytest.raises(TypeError, match="prompts"):
            sampler.sample_batch(wrong)


async def test_logprobs_are_aligned_with_the_tokens(make_sampler):
    (c,) = await make_sampler().sample_with_tokens(SUM, logprobs=True, top_logprobs=1, max_tokens=32)
    assert len(c.inference_logprobs) == len(c.sampling_logprobs) == len(c.top_logprobs) == c.completion_len
    assert all(logprob < 0 for logprob in c.inference_logprobs)
    assert [tops[0].token_id for tops in c.top_logprobs] == c.completion_tokens


async def test_the_same_seed_is_the_same_samples_and_another_is_not(make_sampler):
    sampler = make_sampler()
    runs = [await sampler.sample_with_tokens(SUM, n=3, seed=seed, logprobs=True) for seed in (7, 7, 8)]
    texts = [[c.text for c in run] for run in runs]
    assert texts[0] == texts[1] != texts[2]
    assert not set(texts[0]) & set(texts[2])


async def test_a_prompt_that_reaches_max_seq_len_is_not_sent(make_sampler, stub):
    sampler = make_sampler()
    length = len(ToyTokenizer().apply_chat_template(SUM, add_generation_prompt=True))
    assert await sampler.sample_with_tokens(SUM, n=4, max_seq_len=length) == []
    assert stub.bodies == []
    assert sampler.stats.dropped == 4


async def test_samples_over_max_seq_len_are_dropped_and_counted(make_sampler, stub):
    stub.next_token = scripted(["four", "4"])
    length = len(ToyTokenizer().apply_chat_template(SUM, add_generation_prompt=True))
    sampler = make_sampler()
    completions = await sampler.sample_with_tokens(SUM, n=2, max_seq_len=length + 1)
    assert [c.text for c in completions] == ["4"]
    assert completions.dropped == sampler.stats.dropped == 1


async def test_a_group_counts_as_n_against_the_window(make_sampler, stub):
    stub.pause = 0.001
    sampler = make_sampler(concurrency_controller=FixedConcurrencyController(5))
    whole = await make_sampler().sample_with_tokens(SUM, n=12, seed=7)
    stub.peak_samples = 0
    narrow = await sampler.sample_with_tokens(SUM, n=12, seed=7)
    assert stub.peak_samples <= 5
    # Cut into several requests by the window, the samples are the same ones.
    assert list(map(without_times, narrow)) == list(map(without_times, whole))
    assert sampler.concurrency_controller.in_flight == 0


async def test_tokens_stream_as_they_come(make_sampler, stub):
    stub.pause = 0.002
    texts = {0: "", 1: ""}
    order = []
    async for delta in make_sampler().stream_tokens(SUM, n=2, seed=7, max_tokens=16):
        texts[delta.index] += delta.text
        order.append(delta.index)
    whole = await make_sampler().sample_with_tokens(SUM, n=2, seed=7, max_tokens=16)
    assert [texts[0], texts[1]] == [c.text for c in whole]
    assert order[:4] == [0, 1, 0, 1]  # interleaved, so not read whole first


async def test_completions_come_as_they_finish_and_leaving_aborts_the_rest(make_sampler, stub):
    stub.pause = 0.002
    stub.next_token = scripted(["a long answer " * 40, "4"])
    controller = FixedConcurrencyController(2)
    sampler = make_sampler(concurrency_controller=controller)
    completions = sampler.stream_completions(SUM, n=2)
    first = await anext(completions)
    await completions.aclose()
    assert (first.index, first.text) == (1, "4")
    await asyncio.sleep(0.05)
    assert stub.aborted == 1
    assert controller.in_flight == 0


async def test_the_time_to_the_first_token_is_not_the_time_to_the_last(make_sampler, stub):
    stub.pause = 0.005
    (c,) = await make_sampler().sample_with_tokens(SUM, seed=7, max_tokens=30)
    assert c.completion_len > 5
    assert c.time_to_first_token < c.token_times[-1] - 0.005 * (c.completion_len - 2)
    assert c.token_times == sorted(c.token_times)


async def test_echo_gives_p_plus_c_minus_1_rows(make_sampler, stub, fault):
    prompt = ToyTokenizer().apply_chat_template(SUM, add_generation_prompt=True)
    rows = [{"token_id": i, "logprob": -1.0 if k else None, "token": ""} for k, i in enumerate(prompt)]
    state = {"first": True}

    def echoed(chunk: dict[str, Any]) -> dict[str, Any]:
        for choice in chunk["choices"]:
            choice.pop("token_ids", None)
            if state.pop("first", False):
                choice["logprobs"]["content"] = rows + choice["logprobs"]["content"]
            if "raw_output" in choice:
                choice["raw_output"]["completion_token_ids"] = (
                    prompt + choice["raw_output"]["completion_token_ids"]
                )
        return chunk

    stub.faults = [fault(edit=echoed)]
    (c,) = await make_sampler().sample_with_tokens(SUM, logprobs=True, echo=True, max_tokens=8)
    assert c.logprobs_echoed
    assert c.prompt_len == len(prompt)
    assert len(c.inference_logprobs) == c.prompt_len + c.completion_len - 1
    assert c.text == ToyTokenizer().decode(c.completion_tokens)


async def test_a_server_without_sample_indices_gets_one_request_and_one_seed_a_sample(make_sampler, stub):
    stub.version = None
    completions = await make_sampler().sample_with_tokens(SUM, n=3, seed=7)
    assert [body["n"] for body in stub.bodies] == [1, 1, 1]
    assert sorted(body["seed"] for body in stub.bodies) == sorted(index_seed(7, i) for i in range(3))
    assert not any("sample_index" in body or "return_token_ids" in body for body in stub.bodies)
    assert len({c.text for c in completions}) == 3


async def test_where_each_sample_is_a_request_the_first_goes_ahead_to_warm_the_prefix(make_sampler, stub):
    stub.version = None
    stub.pause = 0.002
    peaks = []
    original = stub.next_token
    stub.next_token = lambda *args: (peaks.append(stub.in_flight), original(*args))[1]
    await make_sampler().sample_with_tokens(SUM, n=4, max_tokens=16)
    assert peaks[0] == 1 and max(peaks) == 4


async def test_vllm_is_asked_in_its_own_words(make_sampler, stub):
    stub.version = {"version": "0.32"}
    await make_sampler().sample_with_tokens(SUM, n=3, seed=7, max_tokens=4)
    (body,) = stub.bodies
    assert body["n"] == 3 and body["return_token_ids"] is True and "raw_output" not in body


async def test_what_the_original_specifications_client_sends_is_sent(make_sampler, stub):
    stub.version = None  # a server that does not say what it is
    await make_sampler(api_key="key", model="accounts/a/deployments/d").sample_with_tokens(
        SUM, max_tokens=3, temperature=0.5, min_p=0.1, extra={"prompt_cache_key": "k"}
    )
    (body,), (headers,) = stub.bodies, stub.headers
    sent = {"model": "accounts/a/deployments/d", "n": 1, "max_tokens": 3, "temperature": 0.5, "stream": True}
    sent |= {"perf_metrics_in_response": True, "raw_output": True, "top_p": 1.0, "top_k": 0, "min_p": 0.1}
    assert sent | {"prompt_cache_key": "k"} == {
        k: v for k, v in body.items() if k in sent or k == "prompt_cache_key"
    }
    assert headers["authorization"] == "Bearer key" and headers["x-api-key"] == "key"
    assert headers["x-request-id"]


@pytest.mark.parametrize("version", [{"name": "myserve", "extensions": ["sample_index", "num_prior_tokens"]},
                                     {"version": "0.32"}])  # fmt: skip
async def test_a_server_that_is_known_gets_the_key_in_one_form(make_sampler, stub, version):
    stub.version = version
    await make_sampler(api_key="key").sample_with_tokens(SUM, max_tokens=3)
    (headers,) = stub.headers
    assert headers["authorization"] == "Bearer key" and "x-api-key" not in headers


async def test_the_deadline_says_which_sample_and_how_far_it_was(make_sampler, stub):
    stub.pause = 0.02
    stub.next_token = scripted(["a long answer " * 40])
    controller = FixedConcurrencyController(4)
    sampler = make_sampler(concurrency_controller=controller)
    with pytest.raises(
        SamplingDeadlineError, match=r"sample 0: the deadline passed .* it had \d+ of up to 1024"
    ):
        await sampler.sample_with_tokens(SUM, n=2, timeout=0.2)
    kept = await sampler.sample_with_tokens(SUM, n=2, timeout=0.2, on_error="keep")
    assert kept == [] and [error.index for error in kept.failures] == [0, 1]
    assert controller.in_flight == 0


async def test_bytes_may_be_cut_anywhere(make_sampler, stub):
    stub.next_token = scripted(["zwölf Löwen 🦁"])
    stub.byte_by_byte = True
    (c,) = await make_sampler().sample_with_tokens(SUM)
    assert c.completion_tokens == list("zwölf Löwen 🦁".encode())


async def test_ten_thousand_cancelled_calls_leak_nothing():
    controller = FixedConcurrencyController(8)
    sampler = DeploymentSampler(
        "http://test",
        "toy",
        tokenizer=ToyTokenizer(),
        concurrency_controller=controller,
        transport=ScriptedTransport(model=tiny_model()),
    )
    tasks = [asyncio.create_task(sampler.sample_with_tokens(SUM, n=2, max_tokens=4)) for _ in range(10_000)]
    for turn in range(3):
        await asyncio.sleep(0)
        for task in tasks[turn::4]:
            task.cancel()
    for task in tasks[100:]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (controller.in_flight, controller.semaphore.waiting) == (0, 0)
    assert len(await sampler.sample_with_tokens(SUM, n=2, max_tokens=4)) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": 0}, "n must be at least 1"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"on_error": "ignore"}, "on_error must be one of raise, keep, refill"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs=True"),
        ({"stream": False}, "stream: set by the sampler itself"),
    ],
)
async def test_a_wrong_option_is_named(make_sampler, options, words):
    with pytest.raises(ValueError, match=words):
        await make_sampler().sample_with_tokens(SUM, **options)
