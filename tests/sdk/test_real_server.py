"""Our server and our SDK together, with a proxy between them that cuts, delays and trickles."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from myserve.sdk import (
    AdaptiveConcurrencyController,
    DeploymentSampler,
    FixedConcurrencyController,
    RetryPolicy,
)

pytestmark = pytest.mark.asyncio
PROMPTS = [[1, 67, 281, number] for number in range(5, 9)]
OPTIONS = {"n": 3, "max_tokens": 16, "seed": 7, "logprobs": True, "top_logprobs": 2, "top_p": 0.9}
# a cut that leaves fewer than 16 tokens counts as a failure, and here most do
MANY = RetryPolicy(max_attempts=200, first_pause=0.005, longest_pause=0.02)


@asynccontextmanager
async def proxy(url: str, *, cut: Callable[[], int | None], piece: int = 65536) -> AsyncIterator[str]:
    """Passes bytes both ways; resets a connection once `cut()` bytes of answers went through it."""
    port = int(url.rsplit(":", 1)[1])
    handlers: set[asyncio.Task[None]] = set()
    ends = asyncio.Event()

    async def one_way(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: int | None) -> None:
        while data := await reader.read(piece):
            writer.write(data[:left])
            await writer.drain()
            if left is not None and (left := left - len(data)) <= 0:
                # what was passed on is read before the reset comes
                await asyncio.sleep(0.01)
                return

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.add(asyncio.current_task())
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", port)
        ways = [
            asyncio.create_task(one_way(reader, upstream_writer, None)),
            asyncio.create_task(one_way(upstream_reader, writer, cut())),
            asyncio.create_task(ends.wait()),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for end in (writer, upstream_writer):
                end.transport.abort()

    listening = await asyncio.start_server(accept, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    listening.close()
    ends.set()
    await asyncio.gather(*handlers)
    await asyncio.sleep(0.01)  # the aborted transports' own turn


async def draw_all(sampler: DeploymentSampler, **options: object) -> list[list[tuple[object, ...]]]:
    async with sampler:
        calls = [sampler.sample_with_prompt_tokens(prompt, **{**OPTIONS, **options}) for prompt in PROMPTS]
        return [
            [
                (c.full_tokens, c.text, c.inference_logprobs, c.sampling_logprobs, c.finish_reason)
                for c in group
            ]
            for group in await asyncio.gather(*calls)
        ]


async def test_cut_anywhere_every_sample_is_bit_for_bit_the_faultless_one(server_url):
    faultless = await draw_all(DeploymentSampler(server_url, "tiny"))
    rng = random.Random(7)
    async with proxy(server_url, cut=lambda: rng.randrange(1_000, 20_000)) as url:
        sampler = DeploymentSampler(url, "tiny", retry=MANY)
        assert await draw_all(sampler) == faultless
    assert sampler.stats.resumed > 3  # it went on from the tokens that it had, and did not start over


async def test_text_survives_a_cut_between_the_bytes_of_a_character(server_url):
    whole = await draw_all(DeploymentSampler(server_url, "tiny"), temperature=1.7, top_p=1.0)
    assert any("�" in text or not text.isascii() for group in whole for _, text, *_ in group)
    rng = random.Random(8)
    async with proxy(server_url, cut=lambda: rng.randrange(800, 4_000)) as url:
        sampler = DeploymentSampler(url, "tiny", retry=MANY)
        assert await draw_all(sampler, temperature=1.7, top_p=1.0) == whole
    assert sampler.stats.resumed > 3


async def test_a_slow_drip_changes_nothing(server_url):
    faultless = await draw_all(DeploymentSampler(server_url, "tiny"))
    async with proxy(server_url, cut=lambda: None, piece=7) as url:
        assert await draw_all(DeploymentSampler(url, "tiny", retry=MANY)) == faultless


async def test_a_group_that_the_window_cuts_up_is_the_same_group(server_url):
    whole = await draw_all(DeploymentSampler(server_url, "tiny"), n=8)
    controller = FixedConcurrencyController(3)
    narrow = DeploymentSampler(server_url, "tiny", concurrency_controller=controller)
    assert await draw_all(narrow, n=8) == whole
    assert controller.step_completed()["peak_in_flight"] == 3


async def test_a_stream_interval_changes_the_chunks_and_nothing_else(server_url):
    options = {**OPTIONS, "n": 1, "ignore_eos": True}
    async with DeploymentSampler(server_url, "tiny") as sampler:
        (each,) = await sampler.sample_with_prompt_tokens(PROMPTS[0], **options)
        (eighth,) = await sampler.sample_with_prompt_tokens(PROMPTS[0], **options, stream_interval=8)
        deltas = [delta async for delta in sampler.stream_tokens(PROMPTS[0], **options, stream_interval=8)]
    assert (each.full_tokens, each.text, each.inference_logprobs, each.top_logprobs) == (
        eighth.full_tokens,
        eighth.text,
        eighth.inference_logprobs,
        eighth.top_logprobs,
    )
    assert [len(delta.token_ids) for delta in deltas] == [1, 8, 7]


async def test_echo_scores_the_prompt_too(server_url):
    async with DeploymentSampler(server_url, "tiny") as sampler:
        options = {**OPTIONS, "n": 2, "top_logprobs": None}
        plain = await sampler.sample_with_prompt_tokens(PROMPTS[0], **options)
        echoed = await sampler.sample_with_prompt_tokens(PROMPTS[0], echo=True, **options)
    for one, other in zip(plain, echoed, strict=True):
        assert other.logprobs_echoed
        assert (one.text, one.full_tokens) == (other.text, other.full_tokens)
        assert len(other.inference_logprobs) == one.prompt_len + one.completion_len - 1
        assert other.inference_logprobs[one.prompt_len - 1 :] == one.inference_logprobs


@pytest.mark.parametrize("logprobs", [False, True])
async def test_an_echos_text_is_the_same_with_a_tokenizer_and_without(server_url, tiny_model, logprobs):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model("qwen3"))
    # ids of half characters and control tokens, which a tokenizer's decode and a server's text may treat unlike
    options = {
        **OPTIONS,
        "n": 4,
        "temperature": 1.7,
        "top_p": 1.0,
        "logprobs": logprobs,
        "top_logprobs": None,
    }
    plain = await DeploymentSampler(server_url, "tiny").sample_with_prompt_tokens(PROMPTS[0], **options)
    for mine in (None, tokenizer):
        sampler = DeploymentSampler(server_url, "tiny", tokenizer=mine)
        echoed = await sampler.sample_with_prompt_tokens(PROMPTS[0], echo=True, **options)
        assert [c.text for c in echoed] == [c.text for c in plain]


async def test_a_group_beyond_the_servers_limit_is_the_group_of_its_parts(server_url):
    options = {**OPTIONS, "max_tokens": 3, "top_logprobs": None}
    async with DeploymentSampler(server_url, "tiny") as sampler:
        many = await sampler.sample_with_prompt_tokens(PROMPTS[0], **{**options, "n": 200})
        few = await sampler.sample_with_prompt_tokens(PROMPTS[0], **{**options, "n": 3})
    assert [c.index for c in many] == list(range(200))
    assert [c.full_tokens for c in many[:3]] == [c.full_tokens for c in few]


async def test_the_controller_hears_the_servers_queue(server_url):
    controller = AdaptiveConcurrencyController(initial_window=4)
    async with DeploymentSampler(server_url, "tiny", concurrency_controller=controller) as sampler:
        await sampler.sample_batch(PROMPTS, n=4, max_tokens=4)
    summary = controller.step_completed()
    assert summary["samples"] == 16
    assert summary["avg_pq"] is not None and summary["avg_pq"] >= 0
    assert summary["cache_hit_rate"] is not None


async def test_an_unknown_model_is_final_in_the_servers_words(server_url):
    async with DeploymentSampler(server_url, "gpt-9") as sampler:
        kept = await sampler.sample_with_prompt_tokens([1], on_error="keep")
    (error,) = kept.failures
    assert (error.attempts, error.status) == (1, 404)
    assert "gpt-9" in error.server_message
