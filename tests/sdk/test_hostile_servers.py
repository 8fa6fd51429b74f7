"""A server that lies, floods or stalls: each is a `SamplingError` that says so, soon, in little memory.

The real transport against raw sockets: what a server's own library would not let it write is written here.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import resource
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

import pytest

from myserve.sdk import (
    DeploymentSampler,
    RetryPolicy,
    SamplingDeadlineError,
    SamplingError,
    WeightUpdateError,
)
from myserve.sdk.transport.http import unpacked

pytestmark = pytest.mark.asyncio
TWICE = RetryPolicy(max_attempts=2, first_pause=0.001, longest_pause=0.002)
VERSION = {"name": "myserve", "extensions": ["sample_index", "num_prior_tokens"]}
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"


class Seen(NamedTuple):
    """A request that a server got."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


Answer = Callable[[Seen, asyncio.StreamWriter], Awaitable[None]]


class Hostile:
    """A server on a socket whose completions are whatever `answer` writes; it keeps the requests that it saw."""

    def __init__(self, answer: Answer, version: object = VERSION) -> None:
        self.answer = answer
        self.version = version
        self.seen: list[Seen] = []
        self.url = ""

    @property
    def posts(self) -> list[Seen]:
        return [seen for seen in self.seen if seen.method == "POST"]

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            method, path, _ = head[0].split(" ")
            headers = {
                name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])
            }
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            seen = Seen(method, path, headers, json.loads(body) if body else None)
            self.seen.append(seen)
            if path.endswith("/version") and self.version is not None:
                writer.write(whole(json.dumps(self.version).encode()))
            else:
                await self.answer(seen, writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def hostile(answer: Answer, version: object = VERSION) -> AsyncIterator[Hostile]:
    server = Hostile(answer, version)
    listener = await asyncio.start_server(server._connected, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listener.close()


def whole(
    body: bytes, status: str = "200 OK", content_type: str = "application/json", more: str = ""
) -> bytes:
    headers = f"content-type: {content_type}\r\ncontent-length: {len(body)}\r\n{more}connection: close"
    return f"HTTP/1.1 {status}\r\n{headers}\r\n\r\n".encode() + body


def event(*choices: dict[str, Any], **more: Any) -> bytes:
    return b"data: " + json.dumps({"choices": list(choices), **more}).encode() + b"\n\n"


def token(token_id: int = 65, **more: Any) -> dict[str, Any]:
    return {"index": 0, "text": "A", "token_ids": [token_id], **more}


END = {"index": 0, "text": "", "finish_reason": "stop"}
DONE = b"data: [DONE]\n\n"


def stream(*parts: bytes) -> Answer:
    async def answer(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"".join(parts))

    return answer


def for_ever(part: bytes, pause: float = 0.0, first: bytes = b"") -> Answer:
    """Without a pause many parts at once: the bound is on bytes, however small a part is."""
    written = part if pause else part * (1 + 2**16 // len(part))

    async def answer(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + first)
        while not writer.is_closing():
            writer.write(written)
            await writer.drain()
            await asyncio.sleep(pause)

    return answer


async def sample(server: Hostile, **options: Any) -> Any:
    settings = {name: options.pop(name) for name in ("retry", "stall_timeout") if name in options}
    async with DeploymentSampler(server.url, "m", "secret", **{"retry": TWICE, **settings}) as sampler:
        async with asyncio.timeout(60):
            return await sampler.sample_with_prompt_tokens([1, 2], **{"max_tokens": 8, "seed": 7, **options})


async def test_the_servers_of_this_file_can_be_sampled_from():
    """Control: none of the errors below is about the sockets."""
    async with hostile(stream(event(token()), event(END), DONE)) as server:
        (c,) = await sample(server)
    assert (c.completion_tokens, c.text, c.attempts) == ([65], "A", 1)


@pytest.mark.parametrize(
    "status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"]
)
async def test_a_redirect_is_not_followed_and_says_where_to(status):
    async with hostile(stream()) as other:

        async def elsewhere(seen: Seen, writer: asyncio.StreamWriter) -> None:
            writer.write(whole(b"", status, more=f"location: {other.url}/take\r\n"))

        async with hostile(elsewhere) as server:
            with pytest.raises(
                SamplingError, match=rf"redirects to '{other.url}/take'.*pass it as inference_url"
            ):
                await sample(server)
            assert len(server.posts) == 1  # asking again would not help
        async with hostile(elsewhere, version=None) as server:  # GET /version redirects, too
            with pytest.raises(SamplingError, match="redirects to"):
                await sample(server)
            async with DeploymentSampler(server.url, "m", "secret") as sampler:
                with pytest.raises(WeightUpdateError, match="redirects to"):
                    await sampler.update_weights("step-1")
        assert other.seen == []  # neither key nor prompt


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (event(token()), "tokens came, and max_tokens is 8"),
        (event({"index": 0, "text": "A" * 1000}), r"more than [\d,]+ bytes"),
        (event({"index": 0}), r"more than [\d,]+ bytes"),
        (event(), r"more than [\d,]+ bytes"),
        (b": still here\n\n", r"more than [\d,]+ bytes"),
        (b"data: " + b"x" * 100_000, r"more than [\d,]+ bytes"),  # a line without an end
        (b"\n" * 100_000, r"more than [\d,]+ bytes"),
        (event({"index": 0, "logprobs": {"content": [{"logprob": -1}] * 100}}), "tokens came"),
    ],
)
async def test_an_endless_stream_ends_here(part, words):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with hostile(for_ever(part)) as server:
        with pytest.raises(SamplingError, match=words):
            await sample(server)
        assert len(server.posts) == 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


async def test_a_line_of_400_mib_is_not_held():
    async def answer(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b'data: {"choices": [{"index": 0, "text": "')
        for _ in range(400):
            writer.write(b"x" * 2**20)
            await writer.drain()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with hostile(answer) as server:
        with pytest.raises(SamplingError, match=r"more than [\d,]+ bytes"):
            await sample(server)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


async def test_bodies_that_are_not_streams_are_bounded_too():
    async def json_for_ever(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n")
        while not writer.is_closing():
            writer.write(b" " * 2**20)
            await writer.drain()

    async with hostile(json_for_ever) as server:
        with pytest.raises(SamplingError, match=r"more than [\d,]+ bytes"):
            await sample(server)
        async with DeploymentSampler(server.url, "m") as sampler:
            with pytest.raises(WeightUpdateError, match=r"more than [\d,]+ bytes"):
                await sampler.update_weights("step-1")


def packed(data: bytes, encoding: str = "gzip") -> Answer:
    async def answer(seen: Seen, writer: asyncio.StreamWriter) -> None:
        assert seen.headers["accept-encoding"] == "identity"
        more = f"content-encoding: {encoding}\r\n"
        writer.write(whole(data, content_type="text/event-stream", more=more))
        with suppress(ConnectionError):
            await writer.drain()

    return answer


STREAM = event(token()) + event(END) + DONE


@pytest.mark.parametrize(
    ("data", "encoding"),
    [(gzip.compress(STREAM), "gzip"), (gzip.compress(STREAM), "GZIP"), (zlib.compress(STREAM), "deflate")],
)
async def test_what_a_gateway_compressed_is_unpacked(data, encoding):
    async with hostile(packed(data, encoding)) as server:
        (c,) = await sample(server)
        assert (c.completion_tokens, c.attempts) == ([65], 1)


@pytest.mark.parametrize(
    ("data", "encoding", "words"),
    [
        (b"\x1f\x8b", "gzip", "ended early"),
        (gzip.compress(STREAM)[:-9], "gzip", "ended early"),
        (STREAM, "gzip", "compressed answer is broken"),
        (gzip.compress(STREAM) * 2, "gzip", "after the end of the compressed answer"),
        (STREAM, "br", r"compressed \(br\)"),
        (gzip.compress(b"data: " + b"a" * 2**28), "gzip", r"more than [\d,]+ bytes"),
    ],
)
async def test_a_compressed_answer_that_is_none_is_named_and_bounded(data, encoding, words):
    async with hostile(packed(data, encoding)) as server:
        with pytest.raises(SamplingError, match=words):
            await sample(server, retry=RetryPolicy(max_attempts=1))


async def test_unpacked_pieces_are_small_however_much_is_in_them():
    sizes = []
    original = bytes(range(256)) * 2**12 + b"a" * 2**24

    async def chunks():
        data = gzip.compress(original)
        for at in range(0, len(data), 1000):
            yield data[at : at + 1000]

    joined = bytearray()
    async for piece in unpacked(chunks()):
        sizes.append(len(piece))
        joined += piece
    assert joined == original and max(sizes) <= 2**18


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"choices": [{"index": 0, "text": "\xff\xfe"}]}', "broke the protocol .*not JSON"),
        (b"[" * 200_000, "broke the protocol"),
        (b'{"choices": ' + b"[" * 100_000, "broke the protocol"),
        (b'{"choices": [{"index": ' + b"9" * 5_000 + b"}]}", "broke the protocol"),
        (b'{"choices": [{"index": -1}]}', "broke the protocol"),
        (b'{"choices": [{"index": 0, "token_ids": [1.5]}]}', "broke the protocol"),
        (b'{"choices": [{"index": 0, "token_ids": ["A"]}]}', "broke the protocol"),
        (b'{"error": ' + b"[" * 500 + b"]" * 500 + b"}", "the server failed"),
        (b'{"error": {"code": 99999999, "message": {}}}', "the server failed"),
    ],
)
async def test_what_is_not_a_chunk_is_named(data, words):
    async with hostile(stream(b"data: " + data + b"\n\n", DONE)) as server:
        with pytest.raises(SamplingError, match=words):
            await sample(server)
        assert len(server.posts) == 2


def entry(logprob: float, **more: Any) -> dict[str, Any]:
    return {"logprobs": {"content": [{"logprob": logprob, "token_id": 65, **more}]}}


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (token(**entry(5.0)), "a logprob is above 0"),
        (token(**entry(-0.5, sampling_logprob=0.5)), "a logprob is above 0"),
        (token(**entry(-0.5, top_logprobs=[{"token_id": 3, "logprob": 1.0}])), "a logprob is above 0"),
        (token(66, **entry(-0.5)), "its logprobs are of other tokens than its ids"),
        (
            token(weight_version=1, weight_version_spans=[{"start": 0, "end": 10**9, "weight_version": 1}]),
            "spans",
        ),
        (
            token(weight_version=1, weight_version_spans=[{"start": -9, "end": 1, "weight_version": 1}]),
            "spans",
        ),
        (
            token(weight_version=1, weight_version_spans=[{"start": 1, "end": 0, "weight_version": 1}]),
            "spans",
        ),
    ],
)
async def test_what_cannot_be_is_not_passed_on(choice, words):
    async with hostile(stream(event(choice), event(END), DONE)) as server:
        with pytest.raises(SamplingError, match=f"does not add up: .*{words}"):
            await sample(server, logprobs=True, top_logprobs=1)


async def test_a_rounding_above_zero_is_a_logprob():
    choice = token(**entry(1e-6))
    async with hostile(stream(event(choice), event(END), DONE)) as server:
        (c,) = await sample(server, logprobs=True)
    assert c.inference_logprobs == [1e-6]


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (
            {**END, "raw_output": {"prompt_token_ids": [1, 3], "completion_token_ids": [65]}},
            "id 1 is 3, and 2 was sent",
        ),
        (
            {**END, "raw_output": {"prompt_token_ids": [0, 1, 2], "completion_token_ids": [65]}},
            "3 ids came for 2",
        ),
        ({**END, "seed": 8}, "with seed 8, and 7 was sent"),
    ],
)
async def test_the_answer_to_another_request_is_final(choice, words):
    async with hostile(stream(event(token()), event(choice), DONE)) as server:
        with pytest.raises(
            SamplingError, match=f"answered another request than was sent .*{words}"
        ) as caught:
            await sample(server)
        assert len(server.posts) == 1 and not caught.value.retryable


async def test_tokens_after_the_end_are_not_taken():
    more = [event({"index": 0, "finish_reason": "stop", "token_ids": [65], "text": "A"}), event(token(66))]
    other = event({"index": 1, "text": "B", "token_ids": [66], "finish_reason": "stop"})
    async with hostile(stream(*more, other, DONE)) as server:
        with pytest.raises(SamplingError, match="after its finish reason"):
            await sample(server, n=2, retry=RetryPolicy(max_attempts=1))
    async with hostile(stream(event(token()), event(END), DONE, event(token()))) as server:
        with pytest.raises(SamplingError, match="events came after the end"):
            await sample(server)


@pytest.mark.parametrize("part", [b": keep-alive\n\n", event(), b": keep", event({"index": 0, "text": ""})])
async def test_signs_of_life_without_tokens_do_not_count_for_ever(part):
    async with hostile(for_ever(part, pause=0.02)) as server:
        began = time.monotonic()
        with pytest.raises(SamplingError, match=r"no token, for more than 0\.8 s \(stall_timeout\)"):
            await sample(server, stall_timeout=0.2)
        waited = time.monotonic() - began
    assert waited >= 2 * 0.8  # in a queue they count for four timeouts, twice
    async with hostile(for_ever(part, pause=0.02, first=event(token()))) as server:
        with pytest.raises(SamplingError, match=r"no token, for more than 0\.2 s"):
            await sample(server, stall_timeout=0.2)


async def test_a_queue_that_says_that_it_lives_is_waited_for():
    async def queued(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        for _ in range(25):
            writer.write(b": waiting\n\n")
            await asyncio.sleep(0.02)
        writer.write(event(token()) + event(END) + DONE)

    async with hostile(queued) as server:
        (c,) = await sample(server, stall_timeout=0.2)
        assert (c.attempts, len(server.posts)) == (1, 1)


@pytest.mark.parametrize(
    "version",
    [{"extensions": 5}, {"extensions": [[], {}]}, {"extensions": "sample_index"}, [1], "x", {"version": {}}],
)
async def test_a_version_that_makes_no_sense_is_an_unknown_server(version):
    async with hostile(
        stream(event(token(), perf_metrics={"prompt-tokens": "nan"}), event(END), DONE), version
    ) as server:
        await sample(server)
        assert "sample_index" not in server.posts[0].body and "x-api-key" in server.posts[0].headers


@pytest.mark.parametrize(
    "report", [b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"replicas": []}', b'{"replicas": [7]}']
)
async def test_reports_of_weights_that_make_no_sense_are_named(report):
    async def answer(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(whole(report))

    async with hostile(answer) as server, DeploymentSampler(server.url, "m") as sampler:
        with pytest.raises(WeightUpdateError, match=server.url):
            await sampler.hot_load("step-1")
        if report[:1] != b"{":
            with pytest.raises(WeightUpdateError, match=server.url):
                await sampler.update_weights("step-1")


async def test_a_deadline_says_what_the_server_last_said():
    async def busy(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(
            whole(b'{"error": {"message": "the queue is full"}}', "429 Too Many", more="retry-after: 60\r\n")
        )

    async with hostile(busy) as server:
        with pytest.raises(SamplingDeadlineError, match=r"HTTP 429: the queue is full") as caught:
            await sample(server, timeout=0.3)
        assert caught.value.status == 429


async def test_an_address_that_is_none_is_named_at_once():
    for wrong in ("localhost:8000", "", "ftp://x", "http://"):
        with pytest.raises(ValueError, match="is no address: write http"):
            DeploymentSampler(wrong, "m")
