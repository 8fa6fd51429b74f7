"""What is written is what Google's protobuf library reads, for every field and for numbers of every width."""

from __future__ import annotations

import random

import pytest

from myserve.wire.dialects.tinker_protobuf import (
    FLOAT32,
    sample_response,
    sampled_sequence,
    tensor,
    topk_logprobs,
)
from wire.dialects.tinker_messages import SampleResponse

WIDTHS = (0, 1, 127, 128, 300, 16_383, 16_384, 2**31 - 1)


@pytest.mark.parametrize("number", WIDTHS)
def test_every_field_is_read_back(number: int) -> None:
    draw = random.Random(number)
    raw = [draw.randbytes(size) for size in (0, 1, 127, 128, 20_000, 4, 8)]
    topk = topk_logprobs(raw[3], raw[4], length=number, k=3)
    sequences = [sampled_sequence("stop", raw[1], raw[2]), sampled_sequence("length", raw[0], raw[0], topk)]
    dense = tensor(raw[5], FLOAT32, (number, 2))
    read = SampleResponse.FromString(
        sample_response(
            sequences,
            prompt_logprobs=raw[4],
            topk_prompt_logprobs=topk,
            target_prompt_logprobs=dense,
            prompt_cache_hit_tokens=number,
        )
    )
    first, second = read.sequences
    assert (first.stop_reason, first.tokens, first.logprobs) == (0, raw[1], raw[2])
    assert (second.stop_reason, second.tokens) == (1, b"")
    assert not first.HasField("topk_sampled_logprobs")
    for each in (second.topk_sampled_logprobs, read.topk_prompt_logprobs):
        assert (each.token_ids, each.logprobs, each.length, each.k) == (raw[3], raw[4], number, 3)
    assert (read.prompt_logprobs, read.prompt_cache_hit_tokens) == (raw[4], number)
    target = read.target_prompt_logprobs
    assert (target.dense, target.dtype, list(target.shape)) == (raw[5], FLOAT32, [number, 2])
    assert not target.HasField("sparse_csr")


def test_what_was_not_asked_for_is_not_there() -> None:
    read = SampleResponse.FromString(sample_response([sampled_sequence("stop", b"", b"")]))
    assert len(read.sequences) == 1 and read.prompt_cache_hit_tokens == 0 and read.prompt_logprobs == b""
    assert not read.HasField("topk_prompt_logprobs") and not read.HasField("target_prompt_logprobs")


def test_a_sparse_tensor_has_its_indices() -> None:
    sparse = tensor(b"val", FLOAT32, (2, 300), crow_indices=b"crow", col_indices=b"col")
    read = SampleResponse.FromString(
        sample_response([], target_prompt_logprobs=sparse)
    ).target_prompt_logprobs
    csr = read.sparse_csr
    assert (csr.values, csr.crow_indices, csr.col_indices) == (b"val", b"crow", b"col")
    assert (read.dense, list(read.shape)) == (b"", [2, 300])
