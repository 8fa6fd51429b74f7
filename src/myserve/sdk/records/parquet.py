"""Completions as a Parquet file, a row each, and back. Needs pyarrow: `pip install myserve[parquet]`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import asdict

from myserve.sdk.types import SampledCompletion

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ROWS_PER_GROUP", "read_parquet", "write_parquet"]

ROWS_PER_GROUP = 1024  # held in memory at a time, when writing and when reading


def write_parquet(path: str | Path, completions: Iterable[SampledCompletion]) -> int:
    """Write every field of each completion to `path`, as they come; return how many there were.

    A field is a column of its name; lists are Parquet's own lists (`full_tokens` of int32, logprobs of float64), so
    pandas, Polars, DuckDB and datasets read them. A field that a completion does not have is null.

    >>> import tempfile
    >>> sample = SampledCompletion(text="4", full_tokens=[1, 2, 4], prompt_len=2, finish_reason="stop",
    ...     completion_len=1, inference_logprobs=[-0.5], seed=7)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_parquet(f"{folder}/run.parquet", [sample, sample])
    ...     list(read_parquet(f"{folder}/run.parquet")) == [sample, sample]
    2
    True
    """
    import pyarrow as pa
    from pyarrow import parquet

    count = 0
    with parquet.ParquetWriter(path, _schema()) as writer:
        rest = iter(completions)
        while rows := [_row(sample) for sample in islice(rest, ROWS_PER_GROUP)]:
            writer.write_table(pa.Table.from_pylist(rows, _schema()))
            count += len(rows)
    return count


def read_parquet(path: str | Path) -> Iterator[SampledCompletion]:
    """Yield the completions of a file that `write_parquet` wrote, equal to what went in.

    Raises ValueError for a row that is no completion.
    """
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS_PER_GROUP):
            for row in batch.to_pylist():
                yield SampledCompletion.from_json(
                    {name: _read(name, value) for name, value in row.items() if value is not None}
                )


def _row(sample: SampledCompletion) -> dict[str, object]:
    row = sample.to_json()
    if sample.top_logprobs is not None:
        row["top_logprobs"] = [[asdict(alternative) for alternative in at] for at in sample.top_logprobs]
    if sample.stop_reason is not None:  # a stop id or a stop string: a column has one type
        row["stop_reason"] = json.dumps(sample.stop_reason)
    return row | {"index": sample.index, "attempts": sample.attempts, "request_id": sample.request_id}


def _read(name: str, value: object) -> object:
    if name == "top_logprobs":
        assert isinstance(value, list)
        return [[tuple(alternative.values()) for alternative in at] for at in value]
    if name == "weight_version_spans":
        assert isinstance(value, list)
        return [{key: part for key, part in span.items() if part is not None} for span in value]
    if name == "stop_reason":
        assert isinstance(value, str)
        return json.loads(value)
    return value


def _schema() -> pa.Schema:
    import pyarrow as pa

    logprobs, ids = pa.list_(pa.float64()), pa.list_(pa.int32())
    alternative = pa.struct([("token_id", pa.int32()), ("logprob", pa.float64()), ("token", pa.string())])
    kept = pa.struct([("token_ids", ids), ("mass", pa.float64()), ("entropy", pa.float64())])
    span = pa.struct(
        {"start": pa.int64(), "end": pa.int64(), "weight_version": pa.int64(), "recomputed": pa.bool_()}
    )
    return pa.schema(
        {
            "text": pa.string(),
            "full_tokens": ids,
            "prompt_len": pa.int64(),
            "finish_reason": pa.string(),
            "completion_len": pa.int64(),
            "inference_logprobs": logprobs,
            "logprobs_echoed": pa.bool_(),
            "routing_matrices": pa.list_(pa.string()),
            "routing_shape": pa.list_(pa.int64()),
            "routing_dtype": pa.string(),
            "sampling_logprobs": logprobs,
            "top_logprobs": pa.list_(pa.list_(alternative)),
            "kept": pa.list_(kept),
            "index": pa.int64(),
            "seed": pa.uint64(),
            "stop_reason": pa.string(),
            "weight_version": pa.int64(),
            "weight_version_spans": pa.list_(span),
            "token_times": logprobs,
            "attempts": pa.int64(),
            "request_id": pa.string(),
        }
    )
