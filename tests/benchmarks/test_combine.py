"""The fuzzer of combinations finds nothing, and finds what once ended the engine when its mends are taken out."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.combine import cases
from benchmarks.combine.cases import ROUTES, case_beyond, random_case
from benchmarks.combine.fuzzer import Finding, Report, fuzz
from myserve.core import params
from myserve.core.batched import behaviour
from myserve.core.ranges import ranges_of
from myserve.core.sampling import Sampler
from myserve.engine.requests.options import SubmitOptions


def run(folder: Path, *, seed: int, requests: int, most: int = 20) -> Report:
    return asyncio.run(fuzz(folder, seed=seed, requests=requests, most=most))


@pytest.mark.timeout(600)
def test_some_random_requests_are_what_the_plain_loop_draws(tmp_path: Path) -> None:
    """`python -m benchmarks.combine --seconds 3600` asks for longer."""
    report = run(tmp_path, seed=14, requests=96)
    assert report.findings == []
    assert report.statuses.keys() == {200, 400}
    assert report.statuses[200] > 20 and report.judged["plain loop"] > 20
    numbers = set(ranges_of(params.SamplingParams)) | set(ranges_of(SubmitOptions))
    assert numbers <= set(report.fields) | {"seed"}


def test_a_seed_gives_the_same_requests_on_every_route() -> None:

    drawn = [[random_case(random.Random(n), n) for n in range(60)] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert {case.route for case in drawn[0]} == set(ROUTES)
    assert {case.model for case in drawn[0]} == {"dense", "moe"}
    assert all(case_beyond(random.Random(n), n).must_be_refused for n in range(60))
    assert not any(case.must_be_refused for case in drawn[0])


def measured_from_the_untruncated_maximum(scores: Tensor, untruncated: Tensor, n: Tensor) -> Tensor:
    """How `keep_top_n_sigma` once was: empty where `keep_typical` has removed the likeliest token."""
    below = untruncated.amax(-1, keepdim=True).double() - untruncated.double()
    finite = below.isfinite()
    count = finite.sum(-1, keepdim=True)
    mean = below.where(finite, 0.0).sum(-1, keepdim=True) / count
    square = (below - mean).where(finite, 0.0).square().sum(-1, keepdim=True) / count
    return scores.masked_fill(below > n * square.sqrt(), -torch.inf)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("isolated", [True, False])
def test_it_finds_the_row_without_a_token(
    isolated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control, with the stage's mend taken out, and with the isolation of rows too: then the engine dies."""
    monkeypatch.setattr(cases, "ASKED", 0.6)  # many fields at once: it is found sooner
    monkeypatch.setattr(behaviour, "keep_top_n_sigma", measured_from_the_untruncated_maximum)
    if not isolated:
        monkeypatch.setattr(Sampler, "sample", without_isolation)
    report = run(tmp_path, seed=4, requests=400, most=1)
    assert any({"typical_p", "top_n_sigma"} <= asked(finding).keys() for finding in report.findings)
    assert any("a fault of the server" in finding.words for finding in report.findings)
    assert any("the engine is dead" in finding.words for finding in report.findings) != isolated


@pytest.mark.timeout(600)
def test_it_finds_a_number_without_a_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: `top_k` of 2**63 was accepted, and no tensor holds it."""
    check_ranges = params.check_ranges

    def all_but_top_k(instance: params.SamplingParams) -> None:
        top_k = instance.top_k
        object.__setattr__(instance, "top_k", None)
        try:
            check_ranges(instance)
        finally:
            object.__setattr__(instance, "top_k", top_k)

    monkeypatch.setattr(params, "check_ranges", all_but_top_k)
    monkeypatch.setattr(Sampler, "sample", without_isolation)
    report = run(tmp_path, seed=4, requests=400, most=1)
    assert any("top_k" in asked(finding) for finding in report.findings)


def asked(finding: Finding) -> dict[str, object]:
    return finding.body | finding.body.get("sampling_params", {})


def without_isolation(self: Sampler, logits: Tensor, rows: list[object]) -> object:

    with torch.inference_mode():
        return self._sample(logits.detach().to(torch.float32).contiguous(), rows)  # type: ignore[arg-type]
