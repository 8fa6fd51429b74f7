"""What needs no server: dialects, deployments, retries, seeds, errors."""

from __future__ import annotations

import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from myserve.sdk import RetryPolicy
from myserve.sdk.errors import Failure
from myserve.sdk.request import SampleRequest, as_token_ids
from myserve.sdk.seeds import MAX_SEED, index_seed, prompt_seed
from myserve.sdk.transport.deployments import AFFINITY_SLACK, Deployment, choose
from myserve.sdk.transport.dialects import DIALECTS, FIREWORKS, MYSERVE, VLLM, detect

REQUEST = SampleRequest(
    prompt_token_ids=(1, 2), model="m", seed=7, max_tokens=8, logprobs=True, top_logprobs=2
)
seeds = st.integers(0, MAX_SEED)


@pytest.mark.parametrize(
    ("version", "dialect"),
    [
        ({"name": "myserve", "extensions": ["num_prior_tokens", "sample_index", "more"]}, MYSERVE),
        ({"name": "myserve", "extensions": []}, FIREWORKS),  # an older one: what is right everywhere
        ({"version": "0.11.2"}, VLLM),
        ({"detail": "Not Found"}, FIREWORKS),
        ("1.0", FIREWORKS),
        (None, FIREWORKS),
    ],
)
def test_a_server_is_known_by_its_version(version, dialect):
    assert detect(version) is dialect


def test_the_part_of_a_group_draws_what_it_draws_in_the_whole():
    assert MYSERVE.body(REQUEST, 4, 2)["sample_index"] == 4
    assert MYSERVE.body(REQUEST, 4, 2)["seed"] == 7
    assert VLLM.body(REQUEST, 4, 2)["seed"] == 11  # vLLM's i-th choice draws with seed + i
    assert FIREWORKS.body(REQUEST, 4, 1)["seed"] == index_seed(7, 4)


def test_a_first_whole_request_needs_no_extension():
    for dialect in DIALECTS.values():
        assert not {"sample_index", "num_prior_tokens"} & dialect.body(REQUEST, 0, 1).keys()


def test_each_dialect_asks_for_logprobs_in_its_own_way():
    assert FIREWORKS.body(REQUEST, 0, 1)["logprobs"] is True
    assert VLLM.body(REQUEST, 0, 1)["logprobs"] == 2


@given(seeds, st.integers(0, 1000), seeds, st.integers(0, 1000))
def test_no_two_samples_share_a_seed(seed, index, other_seed, other_index):
    same = (seed, index) == (other_seed, other_index)
    assert (index_seed(seed, index) == index_seed(other_seed, other_index)) == same
    assert 0 <= index_seed(seed, index) <= MAX_SEED


@given(seeds, st.lists(st.integers(0, 10**6), min_size=1), st.integers(0, 100))
def test_prompt_seeds_are_63_bits_and_differ_by_run_and_copy(run_seed, prompt, copy):
    seed = prompt_seed(run_seed, prompt, copy)
    assert 0 <= seed <= MAX_SEED
    assert seed != prompt_seed(run_seed, prompt, copy + 1)
    assert seed != prompt_seed(run_seed, [*prompt, 0], copy)


def test_digits_of_neighbouring_ids_do_not_run_together():
    assert prompt_seed(7, [1, 23], 0) != prompt_seed(7, [12, 3], 0)


def test_a_rested_deployment_is_passed_over_and_comes_back():
    one, two = Deployment("http://one"), Deployment("http://two")
    prompt = [1, 2, 3]
    favourite = choose([one, two], prompt, now=0.0)
    favourite.failed(now=0.0)
    assert choose([one, two], prompt, now=0.0) is favourite  # one failure may be anything
    favourite.failed(now=0.0)
    assert choose([one, two], prompt, now=1.0) is not favourite
    assert choose([one, two], prompt, now=3.0) is favourite
    favourite.failed(now=3.0)
    favourite.succeeded()
    assert choose([one, two], prompt, now=3.0) is favourite


def test_where_all_rest_one_is_asked_all_the_same():
    only = Deployment("http://one", failures=9, rests_until=100.0)
    other = Deployment("http://two", failures=9, rests_until=100.0)
    assert choose([only, other], [1], now=0.0) in (only, other)


def test_prompts_of_one_prefix_go_together_until_it_is_too_busy_there():
    fleet = [Deployment(f"http://{name}") for name in "abcd"]
    prefix = list(range(64))
    favourite = choose(fleet, prefix, now=0.0)
    assert all(choose(fleet, [*prefix, turn], now=0.0) is favourite for turn in range(10))
    favourite.in_flight = AFFINITY_SLACK + 1
    assert choose(fleet, prefix, now=0.0) is not favourite
    favourite.in_flight = 0
    assert len({choose(fleet, [start, 1], now=0.0).url for start in range(64)}) == 4  # others spread


def test_a_pause_grows_is_jittered_and_honours_retry_after():
    policy = RetryPolicy(max_attempts=5, first_pause=1.0, longest_pause=4.0)
    reset = Failure("transport", "reset")
    for attempt, least, most in [(1, 0.5, 1), (2, 1, 2), (3, 2, 4), (4, 2, 4)]:
        pauses = {policy.pause(attempt, reset) for _ in range(20)}
        assert len(pauses) > 1 and all(pause is not None and least <= pause <= most for pause in pauses)
    assert policy.pause(5, reset) is None
    asked = policy.pause(1, Failure.of_status(429, "slow down", {"retry-after": "7"}))
    assert asked is not None and 7 <= asked <= 7.1


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "refused"), (401, "refused"), (404, "refused"), (413, "refused"), (408, "busy"), (425, "busy"),
     (429, "busy"), (503, "busy"), (500, "server"), (502, "server"), (504, "server")],
)  # fmt: skip
def test_whose_fault_a_status_is(status, kind):
    failure = Failure.of_status(status, "words")
    assert (failure.kind, failure.retryable) == (kind, kind != "refused")


@pytest.mark.parametrize("header", ["soon", "-1", "nan", "Wed, 21 Oct 2026 07:28:00 GMT", "1e9"])
def test_a_retry_after_that_is_no_number_of_seconds_is_left_to_the_backoff(header):
    assert Failure.of_status(429, "", {"retry-after": header}).retry_after is None


def test_token_ids_come_out_of_whatever_a_tokenizer_gives():
    import numpy as np
    import torch
    from transformers import BatchEncoding

    encoding = {"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}
    for prompt in (
        torch.tensor([[1, 2]]), torch.tensor([1, 2], dtype=torch.int32), [torch.tensor([1, 2])], (1, 2), range(1, 3),
        np.array([1, 2]), np.array([[1, 2]], np.uint16), [np.int64(1), np.int64(2)], array.array("q", [1, 2]),
        BatchEncoding(encoding), BatchEncoding(encoding, tensor_type="pt"), BatchEncoding(encoding, tensor_type="np"),
    ):  # fmt: skip
        ids = as_token_ids(prompt)
        assert ids == [1, 2] and {type(token_id) for token_id in ids} == {int}


@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        ([1.0, 2.0], TypeError, "integers; this one has 1.0"),
        (["1", "2"], TypeError, "integers; this one has '1'"),
        ("1 2", TypeError, "token ids come in .* not in str"),
        (b"ab", TypeError, "not in bytes"),
        ({1, 2}, TypeError, "not in set"),
        (7, TypeError, "not in int"),
        ([[1, 2], [3]], ValueError, "a batch of 2 prompts .* sample_batch"),
        ([1, -100], ValueError, "token id -100"),
        ({"input_ids": [0, 0, 5], "attention_mask": [0, 0, 1]}, ValueError, "padded"),
        ({"input_ids": [[0, 5]], "attention_mask": [[0, 1]]}, ValueError, "padded"),
    ],
)
def test_what_is_no_prompt_is_named(prompt, error, words):
    with pytest.raises(error, match=words):
        as_token_ids(prompt)


def test_arrays_of_the_wrong_kind_are_named():
    import numpy as np
    import torch

    for prompt in (np.array([1.5]), torch.tensor([1.0]), np.array(["a"])):
        with pytest.raises(TypeError, match="token ids are integers"):
            as_token_ids(prompt)
