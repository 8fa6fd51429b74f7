"""What the caller gets: which fields it must have, and that none is lost as JSON or between processes."""

from __future__ import annotations

import json
import pickle

import pytest

from myserve.sdk.types import Alternative, SampledCompletion


@pytest.mark.parametrize("name", ["text", "full_tokens", "prompt_len", "finish_reason", "completion_len"])
def test_the_seeds_required_fields_are_required(name):
    fields = {"text": "", "full_tokens": [1], "prompt_len": 1, "finish_reason": "stop", "completion_len": 0}
    del fields[name]
    with pytest.raises(TypeError, match=name):
        SampledCompletion(**fields)


def test_a_completion_survives_json():
    sample = SampledCompletion(
        text="4",
        full_tokens=[1, 4],
        prompt_len=1,
        finish_reason="stop",
        completion_len=1,
        inference_logprobs=[-0.1],
        top_logprobs=[
            (Alternative(token_id=4, logprob=-0.1, token="4"), Alternative(logprob=-2.5, token="5"))
        ],
        weight_version_spans=[{"start": 0, "end": 1, "weight_version": 3}],
        seed=2**63 - 1,
    )
    assert SampledCompletion.from_json(json.loads(json.dumps(sample.to_json()))) == sample
    assert SampledCompletion.from_json(sample.to_json() | {"from_the_future": 1}) == sample
    assert "routing_matrices" not in sample.to_json()
    assert pickle.loads(pickle.dumps(sample)) == sample
