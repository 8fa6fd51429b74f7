"""The client that the SDK is modelled on, as a user drives it; `benchmarks.client` runs this in another Python.

Prints the tokens that arrived and the CPU seconds that they took.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from fireworks.training.sdk import DeploymentSampler, FixedConcurrencyController


async def main(url: str, streams: int, tokens: int, logprobs: bool) -> None:
    controller = FixedConcurrencyController(streams)
    sampler = DeploymentSampler(
        inference_url=url, model="replay", api_key="none", tokenizer=None, concurrency_controller=controller
    )
    options = {"logprobs": True, "top_logprobs": 1} if logprobs else {}
    prompt = list(range(1, 129))
    # what is made at first use
    await sampler.sample_with_prompt_tokens(prompt, n=1, max_tokens=tokens, **options)
    began = time.process_time()
    calls = [
        sampler.sample_with_prompt_tokens(prompt, n=1, max_tokens=tokens, **options) for _ in range(streams)
    ]
    groups = await asyncio.gather(*calls)
    spent = time.process_time() - began
    got = sum(len(c.full_tokens) - c.prompt_len for group in groups for c in group)
    print(json.dumps({"tokens": got, "seconds": spent}))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "True"))
