"""The API as a type checker sees it: `mypy` reads this file with the package, and nothing runs it.

What is right passes. Each wrong line names the error that it must give: were it none, mypy's strict mode would
report the `ignore` as unused. (A test that ran mypy on such a program took half a minute.)
"""

from __future__ import annotations

from typing import assert_type

from myserve.sdk import (
    AdaptiveConcurrencyController,
    BatchGroup,
    Completions,
    DeploymentSampler,
    SampledCompletion,
    SampleDelta,
    StepSummary,
)

sampler = DeploymentSampler("http://x", "m", concurrency_controller=AdaptiveConcurrencyController())


async def right() -> None:
    completions = await sampler.sample_with_tokens([{"role": "user", "content": "x"}], n=2, logprobs=True)
    assert_type(completions, Completions)
    assert_type(completions[0], SampledCompletion)
    assert_type(completions[0].inference_logprobs, list[float] | None)
    assert_type(await sampler.sample_with_prompt_tokens([1], max_tokens=4, on_error="keep"), Completions)
    for row in completions[0].top_logprobs or ():
        assert_type(row[0].token_id, int | None)
    async for delta in sampler.stream_tokens("x", n=2):
        assert_type(delta, SampleDelta)
    assert_type(await sampler.sample_batch(["x"], n=2), list[Completions])
    async for group in sampler.sample_batch(["x"]):
        assert_type(group, BatchGroup)
    assert_type(sampler.sync.sample_with_prompt_tokens([1]), Completions)
    assert_type(AdaptiveConcurrencyController().step_completed(), StepSummary)


async def wrong() -> None:
    await sampler.sample_with_prompt_tokens([1], max_tokens="4")  # type: ignore[arg-type]  # a number
    await sampler.sample_with_prompt_tokens([1], on_error="ignore")  # type: ignore[arg-type]  # one of three
    await sampler.sample_with_prompt_tokens([1], max_token=4)  # type: ignore[call-arg]  # misspelt
    (await sampler.sample_with_prompt_tokens([1]))[0].tokens  # type: ignore[attr-defined]  # noqa: B018  # no such field
    DeploymentSampler("http://x", "m", concurrency_controller=16)  # type: ignore[arg-type]  # a controller
