"""Samples on disk and as arrays: a run's journal, columns, Parquet, routing. numpy and pyarrow are imported lazily."""

from myserve.sdk.records.columns import to_columns
from myserve.sdk.records.journal import Journal, JournalError
from myserve.sdk.records.parquet import read_parquet, write_parquet
from myserve.sdk.records.routing import aligned_routing, routing_array

__all__ = [
    "Journal",
    "JournalError",
    "aligned_routing",
    "read_parquet",
    "routing_array",
    "to_columns",
    "write_parquet",
]
