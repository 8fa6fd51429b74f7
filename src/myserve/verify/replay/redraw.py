"""Draws a record's choice again on a server, and scores its tokens there: the two sides that a comparison needs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from myserve.sdk.sampler import DeploymentSampler
from myserve.sdk.sampling.group import Group
from myserve.verify.replay.outcome import choices_of
from myserve.verify.replay.records import SampleRecord
from myserve.verify.subject import COMPLETIONS, RefusedError, Subject, VerifyError

__all__ = ["OF_AN_ATTEMPT", "ReplayServer"]

OF_AN_ATTEMPT = (
    "token_times",
    "attempts",
    "request_id",
)  # of a journal: how a sample came, and not what it is


class ReplayServer:
    """Hold a server that records are drawn again on. `model`: its name there; "" for the one in each record."""

    def __init__(self, url: str, model: str = "", api_key: str = "") -> None:
        self.subject = Subject(url, model, api_key)
        self.url, self.model = self.subject.url, model
        self.version: Mapping[str, Any] = {}
        self._sampler = DeploymentSampler(self.url, model, api_key)

    async def open(self) -> None:
        """Ask what runs there. Raises VerifyError where nobody answers, `AttemptFailed` without a connection."""
        answer = await self.subject.call("GET", "/version")
        self.version = answer.json if answer.status == 200 and isinstance(answer.json, dict) else {}
        if "sample_index" not in (self.version.get("extensions") or ()):
            raise VerifyError(
                f"{self.url} does not take sample_index: only a server of ours can draw one choice again"
            )

    async def draw(self, record: SampleRecord) -> tuple[dict[str, Any], str | None]:
        """Return the choice drawn again, and the server's fingerprint. Raises RefusedError."""
        if record.journal is not None:
            return await self._draw_journal(record), None
        body = dict(record.request or {})
        if self.model:
            body["model"] = self.model
        answer = await self.subject.call("POST", record.route, body)
        if answer.status != 200:
            raise RefusedError(answer)
        response = answer.json
        return choices_of(response)[record.place], response.get("system_fingerprint")

    async def _draw_journal(self, record: SampleRecord) -> dict[str, Any]:
        """Draw a journal's sample by the SDK, as it was drawn."""
        assert record.journal is not None
        request = replace(record.journal, model=self.model) if self.model else record.journal
        group = Group(request, [record.index], self._sampler.backend)
        await group.run()
        (sample,) = group.samples
        assert sample.completion is not None
        return {
            name: value for name, value in sample.completion.to_json().items() if name not in OF_AN_ATTEMPT
        }

    async def score(self, model: str, ids: Sequence[int]) -> list[float] | None:
        """Return the raw logprob of each id but the first after those before it; None where it cannot be had."""
        body = {"model": self.model or model, "prompt": list(ids), "max_tokens": 0, "prompt_logprobs": 0}
        answer = await self.subject.call("POST", COMPLETIONS, body)
        if answer.status != 200:
            return None
        rows = choices_of(answer.json)[0].get("prompt_logprobs") or []
        return [row[str(token_id)]["logprob"] for row, token_id in zip(rows[1:], ids[1:], strict=True)]

    async def aclose(self) -> None:
        await asyncio.gather(self.subject.aclose(), self._sampler.aclose())
