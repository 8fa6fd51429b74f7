"""verl's calls, over a real server; its registry and Ray's actors by their interfaces, for neither is installed here.

The libraries' own classes were run as docs/frameworks.md says.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from conftest import make_tiny_model
from myserve.adapters.verl import RolloutServer, register
from myserve.sdk.errors import SamplingError
from myserve.server.settings import Settings
from tests.server.conftest import run_server

IDS = [5, 6, 7, 8, 9, 10]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("verl")
    for seed in range(2):
        make_tiny_model("qwen3", folder / str(seed), seed=seed)
    with run_server(Settings(models={"tiny": str(folder / "0")}, weights_dir=str(folder))) as server:
        yield server


def config(**fields: Any) -> Any:
    asked = {
        "response_length": 8,
        "prompt_length": 16,
        "max_model_len": None,
        "seed": 5,
        "full_determinism": True,
    }
    return SimpleNamespace(**asked | fields)


def rollout(served: Any, **fields: Any) -> RolloutServer:
    return RolloutServer(served.url, config(**fields), output=SimpleNamespace)


def run(work: Any) -> Any:
    return asyncio.run(work)


def test_a_completion_is_the_request_s_own_whoever_draws_it(served: Any) -> None:
    async def outputs() -> list[Any]:
        servers = rollout(served), rollout(served)
        asked = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "logprobs": True}
        return [
            await server.generate(IDS, asked, request_id)
            for server, request_id in [(servers[0], "a"), (servers[1], "a"), (servers[0], "b")]
        ]

    first, again, other = run(outputs())
    assert (first.token_ids, first.log_probs) == (again.token_ids, again.log_probs)
    assert other.token_ids != first.token_ids
    assert len(first.token_ids) == len(first.log_probs) == 8 and first.stop_reason == "completed"
    assert first.extra_fields["weight_versions"] == [{"version": "0", "start": 0, "end": 8}]
    assert first.routed_experts is None and first.extra_fields["num_cached_tokens"] >= 0


def test_seeds_are_told_and_lengths_are_verl_s(served: Any) -> None:
    async def outputs() -> list[Any]:
        free, tight = rollout(served, full_determinism=False), rollout(served, max_model_len=len(IDS) + 3)
        one = await free.generate(IDS, {}, "a")
        again = await free.generate(IDS, {"seed": one.extra_fields["seed"]}, "c")
        return [
            one,
            again,
            await free.generate(IDS, {}, "a"),
            await tight.generate(IDS, {"max_tokens": 9}, "d"),
        ]

    one, again, other, short = run(outputs())
    assert one.token_ids == again.token_ids != other.token_ids and one.log_probs is None
    assert len(short.token_ids) == 3
    with pytest.raises(ValueError, match="no room"):
        run(rollout(served, max_model_len=3).generate(IDS, {}, "a"))
    with pytest.raises(ValueError, match="no images"):
        run(rollout(served).generate(IDS, {}, "a", image_data=["x"]))
    with pytest.raises(SamplingError, match="temperature must be"):
        run(rollout(served).generate(IDS, {"temperature": -1.0}, "a"))


def test_a_teacher_s_prompt_logprobs_are_lists_by_rank(served: Any) -> None:
    output = run(rollout(served).generate(IDS, {"prompt_logprobs": 2, "max_tokens": 1}, "a"))
    own = run(rollout(served).generate(IDS, {"prompt_logprobs": 0, "max_tokens": 1}, "a"))
    values = output.extra_fields["prompt_logprobs"]
    assert [len(row) for row in values] == [2] * len(IDS) and values[-1] == [0.0, 0.0]
    assert all(best >= second for best, second in values)
    assert own.extra_fields["prompt_ids"] == [*([i] for i in IDS[1:]), [0]]


def test_an_abort_ends_what_runs_and_later_requests_wait_or_are_rejected(
    served: Any, wait_until_async: Callable[[Callable[[], bool]], Any]
) -> None:
    async def scene() -> list[Any]:
        server, in_flight = rollout(served), served.model("tiny").in_flight
        await server._ask("/pause", mode="keep")  # so that it is in flight for sure
        running = asyncio.ensure_future(server.generate(IDS, {"max_tokens": 64}, "a"))
        await wait_until_async(lambda: len(in_flight) == 1)
        told = await server.abort_all_requests()
        ended = await running
        waiting = asyncio.ensure_future(server.generate(IDS, {}, "b"))
        await wait_until_async(lambda: len(in_flight) == 1)
        await server.abort_all_requests(reject_request=True)
        rejected = await server.generate(IDS, {}, "c")
        await server.update_weights_from_folder("1", global_steps=1)
        await server.resume_generation()
        return [told, ended, await waiting, rejected, await server.generate(IDS, {}, "b")]

    told, ended, waited, rejected, after = run(scene())
    run(rollout(served).sleep())  # nothing: it stands alone
    with pytest.raises(SamplingError, match="--enable-memory-saver"):
        run(RolloutServer(served.url, config(), output=SimpleNamespace, releases_memory=True).sleep())
    assert told == {"aborted_count": 1, "request_ids": ["a"]}
    assert ended.stop_reason == waited.stop_reason == rejected.stop_reason == "aborted"
    assert rejected.token_ids == [] and len(after.token_ids) == 8
    assert after.extra_fields["global_steps"] == 1
    assert after.extra_fields["weight_versions"][0]["version"] == "1"


@pytest.fixture
def wait_until_async() -> Callable[[Callable[[], bool]], Any]:
    async def wait(condition: Callable[[], bool]) -> None:
        for _ in range(12_000):
            if condition():
                return
            await asyncio.sleep(0.005)
        raise AssertionError("it never happened")

    return wait


class Actor:
    """A Ray actor: its methods' `remote` gives an awaitable."""

    def __init__(self, made: Any) -> None:
        self._made = made

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._made, name))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """verl's registry and replica, and Ray's `remote`, as far as the adapter knows them."""
    known: dict[str, Any] = {}

    class RolloutReplica:
        max_concurrency, name_suffix = 1000, ""

        def __init__(self, replica_rank: int, config: Any) -> None:
            self.replica_rank, self.config, self.servers = replica_rank, config, []

    replica: Any = ModuleType("verl.workers.rollout.replica")
    replica.RolloutReplica, replica.RolloutMode = RolloutReplica, SimpleNamespace(STANDALONE="standalone")
    replica.RolloutReplicaRegistry = SimpleNamespace(register=known.__setitem__)
    replica.TokenOutput = SimpleNamespace
    ray: Any = ModuleType("ray")
    ray.remote = lambda kind: SimpleNamespace(
        options=lambda **_: SimpleNamespace(remote=lambda *a, **k: Actor(kind(*a, **k)))
    )
    packages = ("verl", "verl.workers", "verl.workers.rollout")
    for name, module in {
        **{p: ModuleType(p) for p in packages},
        replica.__name__: replica,
        "ray": ray,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    return known


def test_a_replica_reaches_the_server_of_its_rank(
    served: Any, registry: dict[str, Any], tmp_path: Path
) -> None:
    register([served.url], model="tiny")
    kind = registry["myserve"]()

    async def scene() -> Any:
        replica = kind(0, config())
        await replica.init_standalone()
        assert replica._server_address == served.url.removeprefix("http://")
        with pytest.raises(ValueError, match="1 URLs were registered"):
            await kind(1, config()).launch_servers()
        with pytest.raises(NotImplementedError, match="standalone"):
            await replica.init_hybrid(None)
        return await replica._server_handle.generate.remote(IDS, {}, "a")

    assert len(run(scene()).token_ids) == 8
