"""Every sample arrives once, as without the fault, or is reported by index in the server's own words."""

from __future__ import annotations

import asyncio
import random

import pytest

from myserve.sdk import DeploymentSampler, FixedConcurrencyController, RetryPolicy, SamplingError
from myserve.sdk.testing import scripted

pytestmark = pytest.mark.asyncio
SUM = [{"role": "user", "content": "Solve: 2+2="}]
OPTIONS = {"n": 4, "seed": 7, "logprobs": True, "max_tokens": 40}


async def draws(sampler: DeploymentSampler, **options: object) -> list[tuple[object, ...]]:
    completions = await sampler.sample_with_tokens(SUM, **{**OPTIONS, **options})
    return [
        (c.index, c.text, tuple(c.full_tokens), tuple(c.inference_logprobs), c.finish_reason)
        for c in completions
    ]


async def test_a_cut_stream_goes_on_from_its_last_token(make_sampler, stub, fault):
    faultless = await draws(make_sampler())
    stub.bodies.clear()
    stub.faults = [fault(after=30, cut=True)]
    sampler = make_sampler()
    assert await draws(sampler) == faultless
    resumed = [body for body in stub.bodies if "num_prior_tokens" in body]
    assert resumed and sampler.stats.resumed == len(resumed)
    for body in resumed:  # it asked for the rest of that very sample
        assert body["n"] == 1
        assert body["max_tokens"] == 40 - body["num_prior_tokens"]
    # Control: the rest without its position in the noise is another sample.
    stub.bodies.clear()
    stub.faults = [fault(after=30, cut=True)]
    original, stub.next_token = stub.next_token, lambda p, s, seed, i: original(p, s, seed + (len(s) > 12), i)
    assert await draws(make_sampler()) != faultless


async def test_wherever_a_stream_is_cut_its_samples_are_the_same(make_sampler, stub, fault):
    faultless = await draws(make_sampler(), max_tokens=6)
    sampler = make_sampler(concurrency_controller=FixedConcurrencyController(8))
    for after in range(40):  # before any token, between any two, behind the last sample, behind the end
        stub.faults = [fault(after=after, cut=True)]
        async with asyncio.timeout(10):  # a flight with nothing left to ask for once waited for ever
            assert await draws(sampler, max_tokens=6) == faultless


async def test_a_stream_that_is_cut_again_and_again_goes_on_each_time(make_sampler, stub, fault):
    stub.next_token = scripted(["0123456789" * 30])
    stub.faults = [
        fault(after=20, cut=True)
    ] * 12  # more cuts than attempts without progress would be allowed
    (c,) = await make_sampler().sample_with_tokens(SUM)
    assert c.text == "0123456789" * 30
    assert c.attempts == 13


@pytest.mark.parametrize("version", [None, {"version": "0.32"}, "ours"])
@pytest.mark.parametrize("after", [1, 2, 5])
async def test_streams_that_are_all_cut_early_end_at_max_attempts(make_sampler, stub, fault, version, after):
    stub.version = stub.version if version == "ours" else version
    stub.next_token = scripted(["0123456789" * 30])
    stub.faults = [fault(after=after, cut=True)] * 100
    sampler = make_sampler(retry=RetryPolicy(max_attempts=3, first_pause=0.001))
    with pytest.raises(SamplingError, match="the connection failed after 3 attempts") as caught:
        await sampler.sample_with_tokens(SUM)
    assert (caught.value.attempts, len(stub.bodies)) == (3, 3)


async def test_each_sample_of_a_group_has_its_own_count(make_sampler, stub, fault):
    stub.next_token = scripted(["0123456789" * 30, "x"])
    stub.faults = [fault(after=40, cut=True), *[fault(after=20, cut=True)] * 5]
    sampler = make_sampler(retry=RetryPolicy(max_attempts=2, first_pause=0.001))
    long, short = await sampler.sample_with_tokens(SUM, n=2)
    assert (long.text, short.text) == ("0123456789" * 30, "x")
    assert long.attempts == 7 and short.attempts == 1


@pytest.mark.parametrize("version", [None, {"version": "0.32"}])
async def test_a_server_that_cannot_resume_starts_the_same_sample_over(make_sampler, stub, fault, version):
    stub.version = version
    faultless = await draws(make_sampler())
    stub.faults = [fault(after=3, cut=True), fault(after=5, cut=True), None, fault(after=1, cut=True)]
    assert await draws(make_sampler()) == faultless


async def test_a_restart_is_announced_to_who_streams(make_sampler, stub, fault):
    stub.version = None
    stub.next_token = scripted(["hello"])
    stub.faults = [fault(after=3, cut=True)]
    text = ""
    async for delta in make_sampler().stream_tokens(SUM):
        text = "" if delta.restarted else text + delta.text
    assert text == "hello"


async def test_garbage_and_errors_in_mid_stream_are_retried(make_sampler, stub, fault):
    faultless = await draws(make_sampler())
    stub.faults = [fault(after=10, garbage=True), fault(after=2, error_event=True)]
    assert await draws(make_sampler()) == faultless


async def test_a_storm_of_429_and_503_passes_with_the_slot_released(make_sampler, stub, fault):
    faultless = await draws(make_sampler())
    controller = FixedConcurrencyController(4)
    stub.faults = [fault(status=429, headers={"retry-after": "0.2"}), fault(status=503), fault(status=502)]
    task = asyncio.create_task(draws(make_sampler(concurrency_controller=controller)))
    while len(stub.bodies) < 2:
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.05)
    assert controller.in_flight == 0  # it waits for the 0.2 s that the server asked for, and holds nothing
    assert await task == faultless
    assert controller.step_completed()["refused"] == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
async def test_what_is_the_requests_fault_is_final_at_once(make_sampler, stub, fault, status):
    stub.faults = [fault(status=status, message="the model 'gpt-9' does not exist")]
    with pytest.raises(
        SamplingError, match=r"after 1 attempt, HTTP 4\d\d: the model 'gpt-9' does not exist"
    ) as caught:
        await make_sampler().sample_with_tokens(SUM, n=2)
    error = caught.value
    assert (error.index, error.attempts, error.status, len(stub.bodies)) == (0, 1, status, 1)
    assert error.server_message == "the model 'gpt-9' does not exist"


async def test_what_fails_for_good_says_index_attempts_status_and_words(make_sampler, stub, fault):
    stub.version = None
    stub.faults = [None, *[fault(status=500, message="out of memory")] * 6]
    sampler = make_sampler(retry=RetryPolicy(max_attempts=3, first_pause=0.001))
    kept = await sampler.sample_with_tokens(SUM, n=3, on_error="keep")
    assert [c.index for c in kept] == [0]
    assert [(e.index, e.attempts, e.status, e.server_message) for e in kept.failures] == [
        (1, 3, 500, "out of memory"),
        (2, 3, 500, "out of memory"),
    ]


async def test_raise_aborts_the_siblings(make_sampler, stub, fault):
    stub.version = None
    stub.pause = 0.01
    stub.next_token = scripted(["a long answer " * 40])
    stub.faults = [None, fault(status=400), None]
    controller = FixedConcurrencyController(4)
    with pytest.raises(SamplingError, match="sample 1"):
        await make_sampler(concurrency_controller=controller).sample_with_tokens(SUM, n=2)
    await asyncio.sleep(0.05)
    assert (stub.aborted, stub.in_flight, controller.in_flight) == (1, 0, 0)


async def test_refill_asks_again_for_the_very_samples_that_failed(make_sampler, stub, fault):
    faultless = await draws(make_sampler())
    stub.faults = [fault(status=500)] * 2
    sampler = make_sampler(retry=RetryPolicy(max_attempts=2, first_pause=0.001))
    assert await draws(sampler, on_error="refill") == faultless
    stub.faults = [fault(status=500)] * 2
    with pytest.raises(SamplingError):  # control
        await draws(sampler)


def without_a_row(chunk):
    for choice in chunk["choices"]:
        choice.pop("logprobs", None)
    return chunk


def without_an_id(chunk):
    for choice in chunk["choices"]:
        if "raw_output" in choice:
            choice["raw_output"]["completion_token_ids"] = choice["raw_output"]["completion_token_ids"][1:]
    return chunk


def with_a_null(chunk):
    for choice in chunk["choices"]:
        for entry in choice.get("logprobs", {}).get("content", ()):
            entry["logprob"] = None
    return chunk


def without_ids(chunk):
    for choice in chunk["choices"]:
        for name in ("token_ids", "logprobs", "raw_output"):
            choice.pop(name, None)
    return chunk


def of_another_shape(chunk):
    return {"choices": [{"index": 0, "text": 4}]}


def of_a_choice_that_was_not_asked_for(chunk):
    return {"choices": [{"index": 99}]}


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (without_a_row, r"0 rows of logprobs for \d+ tokens"),
        (without_an_id, r"streamed token ids are not the \d+ of raw_output"),
        (with_a_null, "the logprob of row 0 is null"),
        (without_ids, "text came without token ids"),
        (of_another_shape, r"a chunk of another shape: Expected .str.*choices\[0\].text"),
        (of_a_choice_that_was_not_asked_for, "a chunk for choice 99 of 4"),
    ],
)
async def test_lengths_that_do_not_fit_are_never_filled_in(make_sampler, stub, fault, edit, words):
    faultless = await draws(make_sampler())
    stub.faults = [fault(edit=edit)]
    assert await draws(make_sampler()) == faultless  # asked again, it is the same sample
    stub.faults = [fault(edit=edit)] * 50
    with pytest.raises(SamplingError, match=words):
        await draws(make_sampler())


async def test_a_choice_that_never_came_is_asked_for_alone(make_sampler, stub, fault):
    faultless = await draws(make_sampler())
    stub.bodies.clear()
    stub.faults = [fault(edit=lambda chunk: {"choices": [c for c in chunk["choices"] if c["index"] < 3]})]
    assert await draws(make_sampler()) == faultless
    assert [(body["n"], body.get("sample_index", 0)) for body in stub.bodies] == [(4, 0), (1, 3)]


async def test_a_server_that_is_not_there_is_named(make_sampler):
    sampler = make_sampler(
        inference_url="http://127.0.0.1:9", retry=RetryPolicy(max_attempts=2, first_pause=0.001)
    )
    with pytest.raises(
        SamplingError, match=r"sample 0: the connection failed after 2 attempts: .*127\.0\.0\.1:9"
    ):
        await sampler.sample_with_tokens(SUM)


async def test_a_silent_connection_counts_as_dead(make_sampler, stub, fault):
    stub.faults = [fault(hangs=True)] * 2
    sampler = make_sampler(stall_timeout=0.05, retry=RetryPolicy(max_attempts=2, first_pause=0.001))
    with pytest.raises(SamplingError, match="the connection failed after 2 attempts"):
        await sampler.sample_with_tokens(SUM)


async def test_under_random_faults_every_sample_arrives_once_and_unchanged(make_sampler, stub, fault):
    sampler = make_sampler()
    prompts = [[1, 2, number] for number in range(40)]

    async def run(sampler: DeploymentSampler) -> list[list[str]]:
        calls = [
            sampler.sample_with_prompt_tokens(p, n=4, seed=p[2], logprobs=True, max_tokens=30)
            for p in prompts
        ]
        return [[c.text for c in group] for group in await asyncio.gather(*calls)]

    faultless = await run(sampler)
    rng = random.Random(7)
    kinds = [
        lambda: fault(status=rng.choice([429, 500, 502, 503])),
        lambda: fault(after=rng.randrange(40), cut=True),
        lambda: fault(after=rng.randrange(40), garbage=True),
        lambda: fault(after=rng.randrange(40), error_event=True),
        lambda: None,
    ]
    stub.faults = [rng.choice(kinds)() for _ in range(300)]
    many = RetryPolicy(max_attempts=30, first_pause=0.001, longest_pause=0.01)
    assert (
        await run(make_sampler(retry=many, concurrency_controller=FixedConcurrencyController(24)))
        == faultless
    )
    assert not stub.faults or len(stub.bodies) > 80


async def test_a_dead_deployment_is_drained_without_losing_a_sample(make_sampler, stub, other_stub, fault):
    alone = await draws(make_sampler(), n=16)
    both = make_sampler(inference_url=[stub.url, other_stub.url])
    for server, dead in ((stub, other_stub), (other_stub, stub)):
        dead.faults = [fault(after=20, cut=True), *[fault(status=503)] * 100]
        server.faults = []
        assert await draws(both, n=16) == alone
