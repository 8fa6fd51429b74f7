"""Kernels are made ready under the eyes of whoever waits, and a second process can compile a part of them."""

from __future__ import annotations

import logging

import pytest
import torch

from myserve.engine.kernels import cache_folder, warm


def test_every_kernel_is_read_and_noted(caplog: pytest.LogCaptureFixture) -> None:
    warm.warm(torch.float32)
    assert cache_folder.is_complete("float32") and cache_folder.is_complete("sampler")
    with caplog.at_level(logging.INFO, "myserve.start"):
        warm.warm(torch.float32)
    assert caplog.records[0].getMessage() == "reading compiled kernels"


def test_the_work_names_each_type_and_ends_with_the_sampler() -> None:
    both = [what for what, _ in warm._work((torch.bfloat16, torch.float32))]
    one = [what for what, _ in warm._work((torch.float32,))]
    assert len(both) == 2 * (len(one) - 2) + 2 and both[-1] == one[-1] == "the sampler"


def test_the_process_beside_compiles_the_sampler() -> None:
    beside = warm._compile_sampler_beside()
    assert beside is not None and beside.wait(timeout=100) == 0
