"""The commands' client: JSON and event streams over the SDK's transport, errors as one line."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from myserve.errors import MyserveError
from myserve.sdk.errors import AttemptFailed
from myserve.sdk.transport.http import AiohttpTransport
from myserve.sdk.transport.pool import root_of
from myserve.sdk.transport.replies import events_of, failure_of, object_of, read_all

__all__ = ["ServerClient", "ServerError"]


class ServerError(MyserveError):
    """The server refused a request, or did not answer."""


class ServerClient:
    """A server at `url` (its root, or OpenAI's base URL)."""

    def __init__(self, url: str, api_key: str = "") -> None:
        self.url = root_of(url)
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._transport = AiohttpTransport()

    async def get(self, path: str) -> Any:
        return await self._json("GET", path, None)

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        return await self._json("POST", path, json.dumps(body).encode())

    async def first_model(self) -> str:
        """Return the name of the first model that the server lists. Raises ServerError."""
        models = (await self.get("/v1/models"))["data"]
        if not models:
            raise ServerError(f"{self.url} serves no model")
        return str(models[0]["id"])

    async def stream_chat(self, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """Yield the choices of each chunk of a streamed chat completion. Raises ServerError."""
        raw = json.dumps({**body, "stream": True}).encode()
        try:
            async with self._transport.request(
                "POST", self.url + "/v1/chat/completions", self._headers, raw
            ) as reply:
                if reply.status != 200:
                    raise AttemptFailed(await failure_of(reply))
                async for events in events_of(reply):
                    for chunk in map(object_of, events):
                        for choice in chunk.get("choices") or ():
                            yield choice
        except AttemptFailed as ended:
            raise self._error(ended) from ended

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def _json(self, method: str, path: str, body: bytes | None) -> Any:
        try:
            async with self._transport.request(method, self.url + path, self._headers, body) as reply:
                if reply.status != 200:
                    raise AttemptFailed(await failure_of(reply))
                return json.loads(await read_all(reply))
        except AttemptFailed as ended:
            raise self._error(ended) from ended

    def _error(self, ended: AttemptFailed) -> ServerError:
        failure = ended.failure
        if failure.kind == "transport":
            return ServerError(
                f"no answer from {self.url} ({failure.message}); is `myserve serve` running there?"
            )
        return ServerError(f"{self.url} answered {failure.status or 'with an error'}: {failure.message}")
