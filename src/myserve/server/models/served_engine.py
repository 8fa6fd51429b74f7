"""What the routes need of whatever answers: an `Engine`, or an echo."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from myserve.core.params import SamplingParams
from myserve.engine.meters import EngineLoad, EngineMeters
from myserve.engine.outputs import Delta, RequestMetrics, RoutingShape
from myserve.engine.token_bytes import TokenBytes


class ServedStream(Protocol):
    """What the routes use of a `RequestStream`."""

    seed: int

    def __aiter__(self) -> AsyncIterator[Delta]: ...
    def metrics(self, index: int) -> RequestMetrics: ...
    def abort(self) -> None: ...


class ServedEngine(Protocol):
    """What the routes use of an `Engine`."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def token_bytes(self) -> TokenBytes: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def weight_version(self) -> int: ...
    @property
    def is_alive(self) -> bool: ...
    @property
    def meters(self) -> EngineMeters: ...
    @property
    def load(self) -> EngineLoad: ...
    @property
    def routing_shape(self) -> RoutingShape | None: ...
    @property
    def exactness(self) -> Mapping[str, str | int | bool]: ...
    async def prepare(self, params: SamplingParams) -> None: ...
    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        n: int = 1,
        request_id: str | None = None,
        priority: int = 0,
        client: str = "",
        cache_salt: str = "",
        sample_index: int = 0,
        num_prior_tokens: int = 0,
    ) -> ServedStream: ...
    def update_weights(self, source: Any, **options: Any) -> Any: ...
    def shutdown(self) -> None: ...
