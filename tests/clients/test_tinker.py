"""Tinker's own client: samples, seeds, scores of prompts, and what it says of training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

tinker = pytest.importorskip("tinker", reason="tinker is not installed: tests/clients/conftest.py says how")

IDS = [5, 6, 7, 8, 9, 10]


@pytest.fixture(scope="module")
def service(served: Any) -> Iterator[Any]:
    with tinker.ServiceClient(base_url=served.base_url.removesuffix("/v1"), api_key="tml-any") as client:
        yield client


@pytest.fixture(scope="module")
def sampler(service: Any, served: Any) -> Any:
    return service.create_sampling_client(base_model=served.model).result()


def sample(sampler: Any, num_samples: int = 2, **fields: Any) -> Any:
    asked = {
        name: fields.pop(name) for name in ("max_tokens", "seed", "stop", "temperature") if name in fields
    }
    params = tinker.SamplingParams(**{"max_tokens": 8, **asked})
    prompt = tinker.ModelInput.from_ints(IDS)
    return sampler.sample(prompt, num_samples, params, **fields).result(timeout=60)


def test_a_sequence_is_drawn_again_by_what_its_id_says(sampler: Any) -> None:
    first = sample(sampler)
    names = [sequence.sequence_id for sequence in first.sequences]
    assert [name.rsplit(":", 1)[1] for name in names] == ["0", "1"]
    again = sample(sampler, seed=int(names[0].split(":seed:")[1].split(":")[0]))
    for one, other in zip(first.sequences, again.sequences, strict=True):
        assert (one.tokens, one.logprobs, one.stop_reason) == (other.tokens, other.logprobs, "length")
    assert first.sequences[0].tokens != first.sequences[1].tokens


def test_a_completion_scored_as_a_prompt_has_the_logprobs_it_was_drawn_with(sampler: Any) -> None:
    answer = sample(sampler, 1, topk_sample_logprobs=3, include_prompt_logprobs=True, topk_prompt_logprobs=2)
    (drawn,) = answer.sequences
    whole = tinker.ModelInput.from_ints(IDS + drawn.tokens)
    scored = sampler.compute_logprobs(whole).result(timeout=60)
    assert scored[0] is None and scored[len(IDS) :] == drawn.logprobs
    end = sampler.compute_logprobs(whole, prompt_logprobs_last_n=3).result(timeout=60)
    assert end == [None] * (len(scored) - 3) + scored[-3:]
    assert answer.prompt_logprobs == scored[: len(IDS)]
    assert [best and len(best) for best in answer.topk_prompt_logprobs] == [None] + [2] * (len(IDS) - 1)
    assert [len(best) for best in drawn.topk_logprobs] == [3] * 8


def test_named_ids_are_scored(sampler: Any) -> None:
    ids = [[-1], [-1], [8], [-1], [10]]
    asked = tinker.TensorData(data=[i for row in ids for i in row], dtype="int64", shape=[5, 1])
    answer = sample(sampler, 1, include_prompt_logprobs=True, target_prompt_logprobs=asked)
    values = answer.target_prompt_logprobs.to_numpy()[:, 0].tolist()
    own = answer.prompt_logprobs
    assert values == [0.0, 0.0, own[3], 0.0, own[5]]


def test_what_it_cannot_do_is_said(service: Any, sampler: Any, served: Any) -> None:
    with pytest.raises(tinker.BadRequestError, match="samples and does not train"):
        service.create_lora_training_client(base_model=served.model).result(timeout=60)
    with pytest.raises(tinker.BadRequestError, match="temperature must be"):
        sample(sampler, temperature=-1.0)
    with pytest.raises(tinker.NotFoundError, match="not served here"):
        service.create_sampling_client(base_model="other").result(timeout=60)
