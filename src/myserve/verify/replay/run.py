"""Replays a file of records on one server or several, many at a time, in the order of the file."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

from myserve.sdk.errors import AttemptFailed
from myserve.verify.replay.compare import ReplayResult, replay_record
from myserve.verify.replay.records import SampleRecord
from myserve.verify.replay.redraw import ReplayServer
from myserve.verify.subject import VerifyError

__all__ = ["replay", "replay_summary"]

_OPEN_RECORDS = 32


async def replay(
    records: Sequence[SampleRecord],
    urls: Sequence[str],
    *,
    model: str = "",
    api_key: str = "",
    on_result: Callable[[ReplayResult], None] = lambda result: None,
) -> list[list[ReplayResult]]:
    """Draw every record again on each server; return the results of each, in the order of the records.

    Raises VerifyError for a server that does not answer or that is not ours.
    """
    return [await _on_server(records, url, model, api_key, on_result) for url in urls]


async def _on_server(
    records: Sequence[SampleRecord],
    url: str,
    model: str,
    api_key: str,
    on_result: Callable[[ReplayResult], None],
) -> list[ReplayResult]:
    server = ReplayServer(url, model, api_key)
    places = asyncio.Semaphore(_OPEN_RECORDS)

    async def one(record: SampleRecord) -> ReplayResult:
        async with places:
            result = await replay_record(record, server)
        on_result(result)
        return result

    try:
        await server.open()
        return list(await asyncio.gather(*map(one, records)))
    except AttemptFailed as ended:
        raise VerifyError(f"no answer from {url} ({ended.failure.message})") from ended
    finally:
        await server.aclose()


def replay_summary(results: Sequence[ReplayResult]) -> str:
    """Return how many records came out how, in a sentence.

    >>> replay_summary([ReplayResult("a", "u", "identical", 3), ReplayResult("b", "u", "differs", 4)])
    'u: 2 records, 7 tokens: 1 identical, 1 differs'
    """
    counts = Counter(result.verdict for result in results)
    words = ", ".join(
        f"{counts[name]} {name}" for name in ("identical", "differs", "edited", "cannot") if counts[name]
    )
    return f"{results[0].url}: {len(results)} records, {sum(r.num_tokens for r in results):,} tokens: {words}"
