"""verl: a rollout replica over a server that runs elsewhere. verl and Ray are imported when one is asked for."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlencode, urlsplit

import orjson

from myserve.sdk.errors import AttemptFailed, Failure, SamplingError
from myserve.sdk.retry import RetryPolicy, retrying
from myserve.sdk.seeds import SEED_BITS, random_seed
from myserve.sdk.transport.dialects import MYSERVE
from myserve.sdk.transport.http import AiohttpTransport
from myserve.sdk.transport.replies import failure_of, read_all

__all__ = ["RolloutServer", "register"]

STALL_SECONDS = 86_400.0  # an answer comes as a whole, however long it is drawn
ANSWER_BYTES = 1 << 30
ACTOR_CALLS = 16  # that may run beside the generations, as verl counts them

STOP_REASONS = {"stop": "completed", "length": "completed", "abort": "aborted"}


class RolloutServer:
    """Answer verl's calls to one rollout server by one that runs at `url`; what a Ray actor is made of.

    `config` is verl's RolloutConfig, `output` makes its TokenOutput. Every request has a seed: the caller's, with
    `full_determinism` one made of `config.seed` and the request's id, else a random one, which `extra_fields` says; a
    request that is sent again is the same sample. Raises SamplingError where a server refuses, or does not come back.
    """

    def __init__(
        self,
        url: str,
        config: Any,
        *,
        model: str | None = None,
        api_key: str = "",
        releases_memory: bool = False,
        output: Callable[..., Any] | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        self._url = url.rstrip("/")
        self._config = config
        self._model = model
        # a server that stands alone keeps its memory, as verl's own do then
        self._releases_memory = releases_memory and bool(getattr(config, "free_cache_engine", True))
        self._headers = {"content-type": "application/json", **MYSERVE.headers(api_key)}
        self._output = output or _token_output()
        self._retry = retry or RetryPolicy()
        self._transport = AiohttpTransport(STALL_SECONDS)
        self._running: set[str] = set()
        self._rejects = False
        self._global_steps: int | None = None

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling_params: Mapping[str, Any],
        request_id: str,
        image_data: Sequence[Any] | None = None,
        video_data: Sequence[Any] | None = None,
        audio_data: Sequence[Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
    ) -> Any:
        """Draw one completion of ids; return a TokenOutput. Logprobs are of the distribution that was drawn from."""
        if image_data or video_data or audio_data:
            raise ValueError("this server takes tokens alone: no images, videos or sounds")
        if self._rejects:
            return self._output(token_ids=[], stop_reason="aborted", extra_fields=self._steps())
        sampling = self._sampling(sampling_params, len(prompt_ids), request_id)
        body = {
            "token_ids": list(prompt_ids),
            "sampling_params": sampling,
            "request_id": request_id,
            "priority": priority,
            **({} if self._model is None else {"model": self._model}),
        }
        self._running.add(request_id)
        try:
            answer = await self._ask("/inference/v1/generate", body)
        finally:
            self._running.discard(request_id)
        return self._as_output(answer, sampling)

    async def abort_all_requests(
        self, reset_prefix_cache: bool = True, reject_request: bool = False
    ) -> dict[str, Any]:
        """End what is in flight with what it has; later requests wait for `resume_generation`, or are rejected."""
        self._rejects = reject_request
        ended = sorted(self._running)
        await self._ask("/pause", mode="abort")
        if reset_prefix_cache:
            await self.clear_kv_cache()
        return {"aborted_count": len(ended), "request_ids": ended}

    async def abort_request(self, request_id: str, reset_prefix_cache: bool = True) -> dict[str, Any]:
        """End one request with what it has."""
        answer = await self._ask("/abort_requests", {"request_ids": [request_id]})
        if reset_prefix_cache:
            await self.clear_kv_cache()
        return {"aborted": bool(answer.get("aborted")), "request_id": request_id}

    async def resume_generation(self) -> None:
        """Go on, and take requests again."""
        self._rejects = False
        await self._ask("/resume")

    async def clear_kv_cache(self) -> None:
        """Forget every cached prefix."""
        await self._ask("/reset_prefix_cache")

    async def sleep(self) -> None:
        """Give memory back, where this server `releases_memory` and verl's `free_cache_engine` asks for it."""
        if self._releases_memory:
            await self._ask("/sleep")

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Bring memory back, with the values that it had; cached prefixes are forgotten."""
        if self._releases_memory:
            await self._ask("/wake_up", tags=tags or ())
            await self.clear_kv_cache()

    async def release_kv_cache(self) -> None:
        """Give the KV cache's memory back; requests in flight are computed again later."""
        if self._releases_memory:
            await self._ask("/sleep", tags=["kv_cache"])

    async def resume_kv_cache(self) -> None:
        """Bring the KV cache's memory back."""
        await self.wake_up(["kv_cache"])

    async def update_weights_from_folder(self, folder: str, global_steps: int) -> None:
        """Put a folder's weights in place, inside the server's `--weights-dir`, as version `global_steps`."""
        await self._ask("/update_weights", {"weight_dir": folder, "weight_version": str(global_steps)})
        await self.set_global_steps(global_steps)

    async def set_global_steps(self, global_steps: int) -> None:
        """Remember which step's weights are served; every output says it."""
        self._global_steps = global_steps

    async def get_server_address(self) -> tuple[str, int]:
        """Return host and port, for agents that speak OpenAI's API."""
        parts = urlsplit(self._url)
        return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)

    def _of_config(self, name: str, otherwise: Any) -> Any:
        return getattr(self._config, name, otherwise)

    def _steps(self) -> dict[str, Any]:
        return {"global_steps": self._global_steps}

    def _sampling(self, asked: Mapping[str, Any], length: int, request_id: str) -> dict[str, Any]:
        """Return vLLM's parameters, with verl's defaults."""
        sampling = {name: value for name, value in asked.items() if value is not None}
        limits = [sampling.pop(name, None) for name in ("max_tokens", "max_new_tokens")]
        sampling["max_tokens"] = self._limit(
            next((each for each in limits if each is not None), None), length
        )
        wanted = sampling.pop("logprobs", None)
        if wanted is not None and wanted is not False:
            sampling["logprobs"] = 0
        for name, otherwise in (("repetition_penalty", 1.0), ("ignore_eos", False)):
            sampling.setdefault(name, self._of_config(name, otherwise))
        sampling.setdefault("seed", self._seed(request_id))
        if self._of_config("enable_rollout_routing_replay", False):
            sampling["include_routing_matrix"] = True
        return sampling

    def _limit(self, asked: int | None, length: int) -> int:
        """Return how many tokens: as verl's own servers have it, no more than the context leaves."""
        response, prompt = self._of_config("response_length", None), self._of_config("prompt_length", 0)
        longest = self._of_config("max_model_len", None)
        limits = [asked] if asked is not None else [response, response and prompt + response - length]
        limits += [None if longest is None else longest - length]
        left = [limit for limit in limits if limit is not None]
        if longest is not None and longest - length < 1:
            raise ValueError(f"a prompt of {length} tokens leaves no room in a context of {longest}")
        if not left:
            raise ValueError(
                "max_tokens, or the rollout's response_length, must say how many tokens may be drawn"
            )
        return int(max(1, min(left)))

    def _seed(self, request_id: str) -> int:
        if not self._of_config("full_determinism", False):
            return random_seed()
        # of the request and not of the replica: which one draws it depends on the others' load
        named = f"{self._of_config('seed', 0)}/{request_id}".encode()
        return int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "big") >> (64 - SEED_BITS)

    def _as_output(self, answer: Mapping[str, Any], sampling: Mapping[str, Any]) -> Any:
        (choice,) = answer["choices"]
        entries = (choice["logprobs"] or {}).get("content")
        extra = {
            **self._steps(),
            "seed": choice["seed"],
            "num_cached_tokens": answer["usage"]["prompt_tokens_details"]["cached_tokens"],
            "weight_versions": choice["weight_versions"],
        }
        if sampling.get("prompt_logprobs") is not None:
            extra |= _prompt_logprobs(answer["prompt_logprobs"], sampling["prompt_logprobs"])
        return self._output(
            token_ids=choice["token_ids"],
            log_probs=None if entries is None else [entry["sampling_logprob"] for entry in entries],
            routed_experts=_array(choice.get("routed_experts")),
            stop_reason=STOP_REASONS.get(choice["finish_reason"], choice["finish_reason"]),
            extra_fields=extra,
        )

    async def _ask(self, path: str, body: Mapping[str, Any] | None = None, **query: Any) -> Any:
        """Return the answer of a POST, asked again as the policy has it. Raises SamplingError."""
        url = self._url + path + (f"?{urlencode(query, doseq=True)}" if query else "")
        raw = b"" if body is None else orjson.dumps(body)

        async def attempt() -> Any:
            async with self._transport.request("POST", url, self._headers, raw) as reply:
                if reply.status != 200:
                    raise AttemptFailed(await failure_of(reply))
                read = await read_all(reply, ANSWER_BYTES)
            try:
                return orjson.loads(read)
            except ValueError:
                raise AttemptFailed(Failure("protocol", f"{path}: not JSON: {read[:200]!r}")) from None

        try:
            return await retrying(self._retry, attempt)
        except AttemptFailed as failed:
            raise SamplingError(failed.failure, index=0, attempts=1) from failed


def register(
    urls: Sequence[str],
    *,
    name: str = "myserve",
    model: str | None = None,
    api_key: str = "",
    releases_memory: bool = False,
) -> None:
    """Make `actor_rollout_ref.rollout.name: myserve` a rollout of verl: replica i is the server at `urls[i]`.

    Call it in a module that `VERL_USE_EXTERNAL_MODULES` names. Servers are reached, not started: replicas are
    standalone, and have no workers that verl could send weights to. `api_key` must be an admin key where there are
    keys. `releases_memory`: servers with `--enable-memory-saver` give memory back when verl says sleep.
    """
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    options = {"model": model, "api_key": api_key, "releases_memory": releases_memory}
    make = functools.partial(_replica_class, tuple(urls), options)
    RolloutReplicaRegistry.register(name, make)


def _replica_class(urls: tuple[str, ...], options: Mapping[str, Any]) -> type[Any]:
    import ray
    from verl.workers.rollout.replica import RolloutMode, RolloutReplica

    class MyserveReplica(RolloutReplica):  # type: ignore[misc]
        """One server that runs already."""

        async def init_standalone(self) -> None:
            """Reach the server; there are no GPUs of verl's to reserve for it."""
            self.rollout_mode = RolloutMode.STANDALONE
            await self.launch_servers()

        async def init_hybrid(self, worker_group: Any) -> None:
            """Refuse."""
            raise _no_weights()

        async def init_hybrid_colocated(self, worker_group: Any, resource_pool: Any) -> None:
            """Refuse."""
            raise _no_weights()

        async def init_colocated(self, resource_pool: Any) -> None:
            """Reach the server, as standalone."""
            await self.init_standalone()

        async def launch_servers(self) -> None:
            """Make the actor through which this replica's server is reached."""
            if self.replica_rank >= len(urls):
                raise ValueError(
                    f"replica {self.replica_rank} has no server: {len(urls)} URLs were registered"
                )
            actor: Any = ray.remote(RolloutServer).options(
                name=f"myserve_server_{self.replica_rank}{self.name_suffix}",
                num_cpus=0,
                max_concurrency=self.max_concurrency + ACTOR_CALLS,
            )
            server = actor.remote(urls[self.replica_rank], self.config, **options)
            self.servers = [server]
            self._server_handle = server
            host, port = await server.get_server_address.remote()
            self._server_address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

        async def update_weights_from_folder(self, folder: str, global_steps: int) -> None:
            """Put a folder's weights in place on this replica's server."""
            calls = [
                server.update_weights_from_folder.remote(folder, global_steps) for server in self.servers
            ]
            await asyncio.gather(*calls)

    return MyserveReplica


def _no_weights() -> Exception:
    return NotImplementedError(
        "a hybrid rollout sends weights by CUDA IPC, and this server takes none: run it standalone "
        "(actor_rollout_ref.hybrid_engine: false) and put weights in place with update_weights_from_folder"
    )


def _token_output() -> Callable[..., Any]:
    from verl.workers.rollout.replica import TokenOutput

    made: Callable[..., Any] = TokenOutput
    return made


def _prompt_logprobs(scored: Sequence[Mapping[str, Any] | None], k: int) -> dict[str, Any]:
    """Return verl's lists: of each token but the first its k likeliest, best first, or for k = 0 itself; zeros last."""
    ids: list[list[int]] = []
    values: list[list[float]] = []
    for own in scored[1:]:
        by_id = [(int(i), entry) for i, entry in (own or {}).items()]
        listed = sorted(by_id, key=lambda pair: pair[1]["rank"])[:k] if k else by_id[:1]
        ids.append([token_id for token_id, _ in listed])
        values.append([entry["logprob"] for _, entry in listed])
    width = max(k, 1)
    return {"prompt_ids": [*ids, [0] * width], "prompt_logprobs": [*values, [0.0] * width]}


def _array(npy: str | None) -> Any:
    """Return an array [P + C - 1, layers, experts per token], or None."""
    if npy is None:
        return None
    import numpy as np

    return np.load(io.BytesIO(base64.b64decode(npy)), allow_pickle=False)
