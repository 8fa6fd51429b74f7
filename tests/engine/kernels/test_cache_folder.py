"""Where compiled kernels are kept is known, a note says which are complete, and no place for them is said once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from myserve.core.compiled import entry_points
from myserve.engine.kernels import cache_folder


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    # held here: a test's monkeypatch may still stand in its place at the end
    asked = cache_folder.cache_folder
    asked.cache_clear()
    yield
    asked.cache_clear()


class _Nowhere:
    """Numba's cache on a machine where it may write nowhere."""

    def __init__(self, function: Any) -> None:
        raise RuntimeError("cannot cache function: no locator available")


def test_it_is_the_folder_that_numba_writes_to() -> None:
    from myserve.engine.kernels.replay import replay_kernel

    replay_kernel()
    folder = cache_folder.cache_folder()
    assert folder is not None and list(folder.glob("replay.*.nbi"))


def test_a_note_counts_for_its_types_and_these_sources_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_folder, "cache_folder", lambda: tmp_path)
    assert not cache_folder.is_complete("bfloat16")
    cache_folder.mark_complete("bfloat16")
    assert cache_folder.is_complete("bfloat16") and not cache_folder.is_complete("float32")
    monkeypatch.setattr(cache_folder, "fingerprint", lambda *_: 7)
    assert not cache_folder.is_complete("bfloat16")


def test_no_place_is_said_once_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache_folder, "FunctionCache", _Nowhere)
    with caplog.at_level(logging.WARNING, "myserve.start"):
        for _ in range(3):
            assert cache_folder.cache_folder() is None
            assert not cache_folder.is_complete("bfloat16")
            cache_folder.mark_complete("bfloat16")
    (record,) = caplog.records
    assert "NUMBA_CACHE_DIR" in record.getMessage()


def test_without_a_place_the_sampler_compiles_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []

    def njit(*, cache: bool = False, **_: Any) -> Any:
        kept.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(entry_points, "njit", njit)
    assert callable(entry_points.kept(lambda: None))
    assert kept == [True, False]
