"""Parquet gives every field back, to the bit, whatever a completion has and has not."""

from __future__ import annotations

from dataclasses import fields

import pytest
from pyarrow import parquet

from myserve.sdk import DeploymentSampler
from myserve.sdk.records.parquet import ROWS_PER_GROUP, read_parquet, write_parquet
from myserve.sdk.types import Alternative, SampledCompletion


def sample(**fields: object) -> SampledCompletion:
    required = {"text": "4", "full_tokens": [1, 4], "prompt_len": 1, "finish_reason": "stop"}
    return SampledCompletion(**{**required, "completion_len": 1, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"inference_logprobs": [-0.1 - 2**-50], "sampling_logprobs": [0.0], "seed": 2**63 - 1, "index": 3},
        {
            "top_logprobs": [
                (Alternative(token_id=4, logprob=-0.1, token="4"), Alternative(logprob=-2.5, token="\u2028")),
            ]
        },
        {
            "kept": [{"token_ids": [4, 5], "mass": 0.91, "entropy": 0.5}],
            "routing_matrices": ["AAE="],
            "routing_shape": [2, 1],
        },
        {"weight_version_spans": [{"start": 0, "end": 1, "weight_version": 3}], "weight_version": 3},
        {"stop_reason": 'it\'s "over"\n'},
        {"stop_reason": 7, "token_times": [0.25], "attempts": 3, "request_id": "req-1"},
        {"top_logprobs": [()]},
        {"logprobs_echoed": True, "full_tokens": [4], "prompt_len": 0, "inference_logprobs": []},
    ],
)
def test_every_field_survives(fields, tmp_path):
    path = tmp_path / "run.parquet"
    assert write_parquet(path, [sample(**fields), sample()]) == 2
    assert list(read_parquet(path)) == [sample(**fields), sample()]


def test_a_stream_is_written_in_groups_and_read_by_any_reader(tmp_path):
    count = 2 * ROWS_PER_GROUP + 1
    write_parquet(tmp_path / "run.parquet", (sample(full_tokens=[1, i]) for i in range(count)))
    file = parquet.ParquetFile(tmp_path / "run.parquet")
    assert (file.num_row_groups, file.metadata.num_rows) == (3, count)
    assert file.read(columns=["full_tokens"])["full_tokens"][count - 1].as_py() == [1, count - 1]


def test_what_a_real_server_gave_survives(server_url, tmp_path):
    sampler = DeploymentSampler(server_url, "tiny")
    drawn = sampler.sync.sample_with_prompt_tokens(
        [1, 2, 3], n=3, max_tokens=8, seed=7, logprobs=True, top_logprobs=2, kept=True, top_p=0.9
    )
    sampler.sync.close()
    write_parquet(tmp_path / "run.parquet", drawn)
    assert list(read_parquet(tmp_path / "run.parquet")) == drawn


def test_there_is_a_column_for_every_field(tmp_path):
    write_parquet(tmp_path / "run.parquet", [sample()])
    names = {field.name for field in fields(SampledCompletion)}
    assert set(parquet.ParquetFile(tmp_path / "run.parquet").schema_arrow.names) == names
