"""A passed self-test is taken over by the next start of the same weights, options, code and CPU, and by no other."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.runner import kept_self_test
from myserve.engine.weights.loader import LoadedModel, load

CONFIG = EngineConfig(self_test="kept", max_model_len=64)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(kept_self_test, "cache_folder", lambda: tmp_path)
    return tmp_path / "self-tests"


@pytest.fixture
def loaded(tiny_model: Callable[[str], Path]) -> LoadedModel:
    return load(str(tiny_model("qwen3")), CONFIG)


def times_checked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by each self-test that an engine runs."""
    ran: list[int] = []
    run = kept_self_test.choose_batch_invariant_mode

    def counted(*args: Any) -> bool:
        ran.append(1)
        return run(*args)

    monkeypatch.setattr(kept_self_test, "choose_batch_invariant_mode", counted)
    return ran


def test_the_second_start_takes_over_the_first_ones_result_and_says_when_that_was(
    folder: Path,
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "myserve.start")
    ran = times_checked(monkeypatch)
    first = Engine.from_pretrained(str(tiny_model("qwen3")), CONFIG)
    second = Engine.from_pretrained(str(tiny_model("qwen3")), CONFIG)
    assert len(ran) == 1
    assert first.exactness == second.exactness and second.exactness["rows_are_independent"]
    kept = kept_self_test.kept(next(iter(folder.iterdir())).stem)
    assert kept is not None and f"checked at {kept.at}" in caplog.text
    always = replace(CONFIG, self_test="always")
    Engine.from_pretrained(str(tiny_model("qwen3")), always)
    assert len(ran) == 2


def test_a_failed_self_test_is_not_kept(
    folder: Path, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_self_test, "choose_batch_invariant_mode", lambda *_: False)
    made = Engine.from_pretrained(str(tiny_model("qwen3")), CONFIG)
    assert not made.exactness["rows_are_independent"] and not folder.exists()


def test_other_weights_options_threads_and_environments_have_keys_of_their_own(
    folder: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [kept_self_test.key_of(loaded, CONFIG)]
    assert kept_self_test.key_of(loaded, CONFIG) == keys[0]
    keys.append(kept_self_test.key_of(loaded, replace(CONFIG, prefill_chunk=16)))
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")
    keys.append(kept_self_test.key_of(loaded, CONFIG))
    monkeypatch.setattr(kept_self_test, "_cpu", lambda: ["another"])
    keys.append(kept_self_test.key_of(loaded, CONFIG))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 61)
    keys.append(kept_self_test.key_of(loaded, CONFIG))
    with torch.no_grad():
        next(loaded.model.parameters()).view(-1)[0] += 1
    keys.append(kept_self_test.key_of(loaded, CONFIG))
    assert len(set(keys)) == 6 and None not in keys


def test_options_that_no_sum_depends_on_share_a_key(loaded: LoadedModel) -> None:
    others = replace(CONFIG, max_queue=7, prefix_caching=False, trust_remote_code=True)
    assert kept_self_test.key_of(loaded, others) == kept_self_test.key_of(loaded, CONFIG)
    assert {field.name for field in fields(CONFIG)} > kept_self_test.WITHOUT_EFFECT


def test_a_gpus_result_is_not_kept(loaded: LoadedModel) -> None:
    assert kept_self_test.key_of(replace(loaded, device=torch.device("cuda")), CONFIG) is None


def test_the_oldest_go_and_a_torn_file_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_self_test, "MOST_KEPT", 3)
    for number in range(5):
        kept_self_test.keep(f"{number:032x}", 0)
    assert len(list(folder.iterdir())) == 3
    torn = folder / f"{7:032x}.json"
    torn.write_text('{"mode": 0')
    assert kept_self_test.kept(torn.stem) is None
    torn.write_text('{"mode": 0, "until": "ever"}')
    assert kept_self_test.kept(torn.stem) is None
