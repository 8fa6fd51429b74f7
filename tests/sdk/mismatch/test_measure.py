"""The monitor names each way in which a trainer's logprobs go wrong, and an exact zero where nothing did."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from myserve import exact_forward, exact_logprobs
from myserve.sdk import Completions, DeploymentSampler, SampledCompletion
from myserve.sdk.mismatch.measure import Gap, measure
from myserve.sdk.mismatch.plot import plot_mismatch

PROMPTS = [[5, 7, 100, 200, 33], [41, 90, 12], [300, 301, 9, 9]]


@pytest.fixture(scope="module")
def draw(server_url: str) -> Callable[..., list[SampledCompletion]]:
    def drawn(**options: Any) -> list[SampledCompletion]:
        async def run() -> list[Completions]:
            async with DeploymentSampler(server_url, "tiny") as sampler:
                asked = {"n": 4, "max_tokens": 24, "seed": 7, "logprobs": True, "kept": True, **options}
                return await sampler.sample_batch(PROMPTS, **asked)

        return [sample for group in asyncio.run(run()) for sample in group]

    return drawn


@pytest.fixture
def load(tiny_model: Callable[[str], Path]) -> Callable[..., Any]:
    return lambda **options: AutoModelForCausalLM.from_pretrained(tiny_model("qwen3"), **options).eval()


@torch.no_grad()
def scored(model: Any, samples: list[SampledCompletion], *, late: int = 0, **how: Any) -> list[list[float]]:
    """A trainer's logprobs. `late=1` reads the logits behind each token instead of those before it."""
    rows = []
    for s in samples:
        logits = model(torch.tensor([s.full_tokens]), use_cache=False).logits[0].float()
        begin = s.prompt_len - 1 + late
        ids = torch.tensor(s.completion_tokens)
        rows.append(exact_logprobs(logits[begin:][: len(ids)], ids, **how).tolist())
    return rows


def test_a_trainer_that_computes_as_the_engine_does_is_an_exact_zero(draw, load):
    samples = draw()
    found = measure(samples, scored(exact_forward(load()), samples))
    assert found.verdict.kind == "exact"
    assert (found.all.equal, found.all.kl_k1, found.all.max, found.all.ess) == (1.0, 0.0, 0.0, 1.0)
    # At a temperature the behaviour's own numbers are met, and of a truncated draw those over its support.
    hot = draw(temperature=1.3)
    assert measure(hot, scored(exact_forward(load()), hot, temperature=1.3), against="sampling").all.max == 0


def test_a_forgotten_temperature(draw, load):
    samples = draw(temperature=0.6)
    rows = scored(exact_forward(load()), samples)
    verdict = measure(samples, rows, against="sampling").verdict
    assert verdict.kind == "temperature" and "forgotten" in verdict.words
    assert measure(samples, rows).verdict.kind == "exact"  # they are right for temperature 1
    # in another precision too it is the temperature that counts
    rows = scored(load(dtype=torch.bfloat16), samples)
    assert measure(samples, rows, against="sampling").verdict.kind == "temperature"


def test_a_forgotten_truncation(draw, load):
    samples = draw(temperature=0.8, top_p=0.7)
    rows = scored(exact_forward(load()), samples, temperature=0.8)
    assert measure(samples, rows, against="sampling").verdict.kind == "truncation"


@pytest.mark.parametrize("move", [1, -1])
def test_logprobs_off_by_one(draw, load, move):
    samples = draw()
    rows = [np.roll(row, move).tolist() for row in scored(exact_forward(load()), samples)]
    found = measure(samples, rows)
    assert found.verdict.kind == "off by one" and ("late" if move > 0 else "early") in found.verdict.words


def test_labels_off_by_one(draw, load):
    samples = [s for s in draw(temperature=0.6) if s.completion_len > 1]
    rows = scored(load(), samples, late=1)
    assert measure(samples, rows).verdict.kind == "misaligned"


def test_stale_weights(draw, load):
    samples = draw()
    model = load()
    torch.manual_seed(7)
    with torch.no_grad():  # what a few steps of training change
        for parameter in model.parameters():
            parameter += 0.05 * parameter.std() * torch.randn_like(parameter)
    rows = scored(model, samples)
    assert measure(samples, rows).verdict.kind == "stale weights"


def test_stale_weights_by_their_version_however_small_the_difference(draw, load):
    """Half of the samples were drawn before the last update: the versions say so."""
    samples = draw()
    exact = scored(exact_forward(load()), samples)
    half = len(samples) // 2
    rows = exact[:half] + [[p + 0.004 for p in row] for row in exact[half:]]
    marked = [replace(s, weight_version=4 if i < half else 3) for i, s in enumerate(samples)]
    found = measure(marked, rows)
    assert found.verdict.kind == "stale weights" and "version 3" in found.verdict.words
    assert (found.by_version[4].max, found.by_version[3].equal) == (0.0, 0.0)
    marked = [replace(s, weight_version=3) for s in samples]
    rows = [[p + 0.004 for p in row] for row in exact]
    assert measure(marked, rows, trainer_version=4).verdict.kind == "stale weights"
    assert measure(marked, rows).verdict.kind == "precision"  # control: without the version it is just small


@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "precision"), (torch.float32, "rounding")])
def test_a_trainer_in_another_precision(draw, load, dtype, kind):
    samples = draw()
    assert measure(samples, scored(load(dtype=dtype), samples)).verdict.kind == kind


def test_the_numbers_are_the_definitions():
    rng = np.random.default_rng(7)
    d = rng.normal(-0.02, 0.2, 50_000)
    gap = Gap.of(d, (0.8, 1.25))
    ratio = np.exp(d)
    assert gap.kl_k1 == pytest.approx(0.02, abs=0.003)
    assert gap.kl_k3 == pytest.approx((ratio - 1 - d).mean())
    assert gap.ess == pytest.approx(ratio.mean() ** 2 / (ratio**2).mean())
    assert gap.ess == pytest.approx(np.exp(-0.04), abs=0.01)  # of log-normal weights: exp(-variance)
    assert gap.outside == pytest.approx(((ratio < 0.8) | (ratio > 1.25)).mean())
    assert (gap.median, gap.p99) == tuple(np.quantile(np.abs(d), (0.5, 0.99)))
    assert Gap.of(np.array([-2000.0, 900.0]), (0.5, 2.0)).ess == pytest.approx(0.5)  # nothing overflows


def test_what_does_not_fit_is_named(draw, load):
    samples = draw(max_tokens=4)
    rows = scored(load(), samples)
    broken = copy.deepcopy(rows)
    broken[2][1] = float("nan")
    with pytest.raises(ValueError, match="sample 2: the trainer's logprob of token 1 is not finite"):
        measure(samples, broken)
    broken[2] = rows[2][:-1]
    with pytest.raises(ValueError, match="sample 2 has 4 completion tokens"):
        measure(samples, broken)
    with pytest.raises(ValueError, match="sample 0 has no sampling_logprobs"):
        measure([replace(samples[0], sampling_logprobs=None)], rows[:1], against="sampling")


def test_it_prints_a_table_and_draws_a_plot(draw, load, tmp_path):
    samples = draw()
    found = measure(samples, scored(load(), samples))
    assert str(found).splitlines()[-1] == str(found.verdict)
    assert "from token 16" in str(found) and "version 0" in str(found)
    plot_mismatch(found, tmp_path / "mismatch.svg")
    chart = (tmp_path / "mismatch.svg").read_text()
    for words in (found.verdict.title, "99th percentile", "nats", "4–7", "16–31"):
        assert words in chart


# ---- spoiled harder: on distributions made here, where every cause can be mixed with every other


def log_softmax(z: Any) -> Any:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


class Drawn:
    """Samples of random logits, as a sampler at `temperature` and `top_p` draws and reports them."""

    def __init__(
        self, count: int, length: int, *, temperature: float = 1.0, top_p: float = 1.0, kept: bool = True
    ):
        self.rng = np.random.default_rng(7)
        self.logits = self.rng.normal(0, 3, (count, length, 32))
        scaled = log_softmax(self.logits / temperature)
        if top_p < 1:
            order = np.argsort(-scaled, -1)
            before = np.cumsum(np.take_along_axis(np.exp(scaled), order, -1), -1) - np.exp(
                np.take_along_axis(scaled, order, -1)
            )
            cut = np.zeros(scaled.shape, bool)
            np.put_along_axis(cut, order, before >= top_p, -1)
        else:
            cut = np.zeros(scaled.shape, bool)
        mass = np.where(cut, 0, np.exp(scaled)).sum(-1)
        behaviour = np.where(cut, -np.inf, scaled) - np.log(mass)[..., None]
        self.ids = (behaviour + self.rng.gumbel(size=behaviour.shape)).argmax(-1)
        inference, sampling = self.at(log_softmax(self.logits)), self.at(behaviour)
        self.samples = [
            SampledCompletion(
                text="", full_tokens=[1, *self.ids[i].tolist()], prompt_len=1, finish_reason="stop",
                completion_len=length, inference_logprobs=inference[i].tolist(), sampling_logprobs=sampling[i].tolist(),
                kept=[{"mass": float(m)} for m in mass[i]] if kept and top_p < 1 else None,
            )
            for i in range(count)
        ]  # fmt: skip

    def at(self, logprobs: Any) -> Any:
        return np.take_along_axis(logprobs, self.ids[..., None], -1)[..., 0]

    def trainer(
        self, *, temperature: float = 1.0, noise: float = 0.0, drift: float = 0.0, stale: float = 1.0
    ) -> Any:
        """A trainer's numbers: `noise` of its arithmetic; a share `stale` was drawn with weights `drift` away."""
        moved = self.rng.normal(0, drift, self.logits.shape)
        moved[int(stale * len(moved)) :] = 0
        return self.at(log_softmax((self.logits + moved) / temperature)) + self.rng.normal(
            0, noise, self.ids.shape
        )


SPOILED = {
    "bfloat16 hides a mild temperature": (Drawn(32, 16, temperature=0.95), {"noise": 0.02}, "temperature"),
    "greedy draws": (Drawn(32, 16, temperature=1e-3), {}, "temperature"),
    "truncation at temperature 1": (Drawn(32, 16, top_p=0.8), {}, "truncation"),
    "truncation at temperature 1, mass untold": (Drawn(32, 16, top_p=0.8, kept=False), {}, "truncation"),
    "truncation and temperature": (Drawn(32, 16, top_p=0.8, temperature=0.7), {"temperature": 0.7}, "truncation"),
    "truncation, in bfloat16": (Drawn(32, 16, top_p=0.8), {"noise": 0.01}, "truncation"),
    "temperature, on other weights": (Drawn(32, 16, temperature=0.6), {"drift": 0.2}, "temperature"),
    "other weights at its temperature": (
        Drawn(32, 16, temperature=0.6), {"temperature": 0.6, "drift": 0.3}, "stale weights"
    ),
    "other weights for a fifth": (Drawn(40, 16), {"drift": 0.3, "stale": 0.2}, "unclear"),
    "other weights for a fifth of short answers": (Drawn(200, 1), {"drift": 0.3, "stale": 0.2}, "unclear"),
    "a few tokens": (Drawn(2, 3), {"noise": 0.01}, "unclear"),
    "a few tokens, on other weights": (Drawn(2, 3), {"drift": 0.3}, "unclear"),
    "a few tokens, temperature forgotten": (Drawn(2, 3, temperature=0.7), {}, "temperature"),
    "short answers in bfloat16": (Drawn(200, 1), {"noise": 0.01}, "precision"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_harder_it_names_the_cause_or_says_that_it_cannot(case):
    drawn, how, kind = SPOILED[case]
    assert measure(drawn.samples, drawn.trainer(**how).tolist(), against="sampling").verdict.kind == kind


def test_samples_of_two_versions_are_told_apart_in_any_precision():
    drawn = Drawn(40, 16)
    marked = [replace(sample, weight_version=3 if i < 8 else 4) for i, sample in enumerate(drawn.samples)]
    stale = measure(marked, drawn.trainer(drift=0.3, stale=0.2, noise=0.005).tolist(), trainer_version=4)
    assert stale.verdict.kind == "stale weights" and "version 3" in stale.verdict.words
    fresh = measure(marked, drawn.trainer(noise=0.005).tolist())
    assert fresh.verdict.kind == "precision"  # a version of few tokens is not blamed for its noise
