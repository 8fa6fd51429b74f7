"""A fleet gives the bits of one engine, whatever becomes of its replicas, and its weights change as one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.conftest import SmallFleet
from myserve.cluster.placed import PlacedPart
from myserve.core.params import SamplingParams
from myserve.engine.engine import Engine
from myserve.engine.requests.options import SubmitOptions
from myserve.errors import BadSnapshotError, ContextLengthError, OverloadedError, RequestError
from myserve.server.errors import EngineRestartingError
from runs import Asked, Completion, collect, mixed_requests, run

PROMPT = list(range(30, 70))


def requests() -> list[Asked]:
    grammar: dict[str, Any] = {"stop": ("e", "o the"), "min_tokens": 6}
    groups = [
        Asked(PROMPT, SamplingParams(max_tokens=20, seed=seed, frequency_penalty=0.9, ignore_eos=True), n=3)
        for seed in range(3)
    ]
    stopped = [Asked(PROMPT[:9], SamplingParams(max_tokens=24, seed=seed, **grammar)) for seed in range(4)]
    scored = [Asked(PROMPT, SamplingParams(max_tokens=9, seed=1, prompt_logprobs=2, min_tokens=8), n=2)]
    return [*mixed_requests(12), *groups, *stopped, *scored]


def told(answers: list[list[Completion]]) -> list[Any]:
    """All that a client may see of answers."""
    return [
        (
            c.text,
            c.numbers,
            c.finish_reason,
            c.stop_reason,
            [(len(d.tokens), d.prompt_logprobs) for d in c.deltas],
        )
        for choices in answers
        for c in choices
    ]


@pytest.fixture(scope="module")
def alone(make_engine: Callable[..., Engine]) -> list[Any]:
    """What one engine says."""
    return told(run(make_engine("llama", threads=1), requests()))


def test_a_fleet_says_what_one_engine_says(small_fleet: SmallFleet, alone: list[Any]) -> None:
    assert told(run(small_fleet.engine, requests())) == alone
    counts = small_fleet.engine.fleet.counts
    assert min(sum(counts[name].requests.values()) for name in ("one", "two")) > 0


@pytest.mark.parametrize("entries", [1, 40, 150])
def test_a_replica_that_is_lost_takes_no_byte_with_it(
    small_fleet: SmallFleet, alone: list[Any], monkeypatch: pytest.MonkeyPatch, entries: int
) -> None:
    moved = small_fleet.engine.fleet.num_moved
    lost = small_fleet.lose_after(monkeypatch, entries)
    assert told(run(small_fleet.engine, requests())) == alone
    assert lost and small_fleet.engine.fleet.num_moved > moved
    small_fleet.wait_for(2)


def test_control_without_its_past_a_stream_goes_on_otherwise(
    small_fleet: SmallFleet, alone: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken as a part of the prompt, what was drawn counts for no penalty, and torch's noise begins anew."""
    options = PlacedPart.options.fget
    assert options is not None
    monkeypatch.setattr(
        PlacedPart,
        "options",
        property(lambda part: replace(options(part), num_prior_tokens=0, counts_prior_tokens=False)),
    )
    small_fleet.lose_after(monkeypatch, 150)
    assert told(run(small_fleet.engine, requests())) != alone
    small_fleet.wait_for(2)


def test_streams_wait_where_no_replica_is_left_and_new_requests_are_told_to_come_again(
    small_fleet: SmallFleet, alone: list[Any]
) -> None:
    async def both_lost() -> list[list[Completion]]:
        engine = small_fleet.engine
        asked = requests()
        streams = [engine.submit(a.prompt, a.params, SubmitOptions(n=a.n)) for a in asked]
        coming = [asyncio.ensure_future(collect(stream)) for stream in streams]
        await asyncio.sleep(0.05)
        monkeypatch = pytest.MonkeyPatch()
        # nobody is connected to meanwhile
        monkeypatch.setattr(engine.fleet, "_connect_missing", lambda: None)
        for link in engine.links:
            engine._loop.call_soon_threadsafe(link.close)
        while engine.links:
            await asyncio.sleep(0.01)
        with pytest.raises(EngineRestartingError):
            engine.submit(PROMPT, SamplingParams(max_tokens=1))
        assert not all(task.done() for task in coming)
        monkeypatch.undo()
        return list(await asyncio.gather(*coming))

    assert told(asyncio.run(both_lost())) == alone
    small_fleet.wait_for(2)


def test_a_replica_that_leaves_hands_its_streams_over(small_fleet: SmallFleet, alone: list[Any]) -> None:
    async def one_leaves() -> list[list[Completion]]:
        asked = requests()
        streams = [small_fleet.engine.submit(a.prompt, a.params, SubmitOptions(n=a.n)) for a in asked]
        coming = [asyncio.ensure_future(collect(stream)) for stream in streams]
        await asyncio.sleep(0.05)
        small_fleet.replicas["one"].leave()
        answers = list(await asyncio.gather(*coming))
        assert small_fleet.replicas["one"].num_in_flight == 0
        return answers

    assert told(asyncio.run(one_leaves())) == alone
    # back again, over another connection
    (link,) = [link for link in small_fleet.engine.links if link.name == "one"]
    small_fleet.engine._loop.call_soon_threadsafe(link.close)
    while link in small_fleet.engine.links:
        pass
    small_fleet.wait_for(2)


def test_of_several_classes_of_bits_each_choice_says_its_own_and_a_session_stays_in_one(
    small_fleet: SmallFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def classes(session: str) -> set[str]:
        params = [SamplingParams(max_tokens=2, seed=seed) for seed in range(4)]
        streams = [
            small_fleet.engine.submit(PROMPT, each, SubmitOptions(session=session, n=2)) for each in params
        ]
        answers = await asyncio.gather(*map(collect, streams))
        return {choice.metrics.replica_class for choices in answers for choice in choices}

    assert asyncio.run(classes("a")) == {""}
    one, other = small_fleet.engine.links
    monkeypatch.setattr(other, "member", replace(other.member, bits="other"))
    of_sessions = [asyncio.run(classes(session)) for session in "abcdefgh"]
    assert {len(found) for found in of_sessions} == {1}
    assert set().union(*of_sessions) == {one.member.bits, "other"}


def test_what_cannot_be_asked_is_refused_before_it_is_sent(small_fleet: SmallFleet) -> None:
    async def submit(prompt: list[int], **params: Any) -> None:
        small_fleet.engine.submit(prompt, SamplingParams(**params))

    for prompt, params, error in [
        ([], {}, RequestError),
        ([10**6], {}, RequestError),
        ([1] * 500, {"max_tokens": 100}, ContextLengthError),
        (PROMPT, {"routed_experts": True}, RequestError),
    ]:
        with pytest.raises(error):
            asyncio.run(submit(prompt, **params))
    with pytest.raises(OverloadedError):
        small_fleet.engine.check_room(10**6)


def test_weights_change_everywhere_and_a_newcomer_has_them(
    small_fleet: SmallFleet, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    tensors = load_file(tiny_model("llama") / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    update = small_fleet.engine.update_weights(tmp_path, mode="keep")
    report = update.result(60)
    assert report.weight_version == 1 == small_fleet.engine.weight_version
    assert [server.engine.weight_version for server in small_fleet.replicas.values()] == [1, 1]
    newcomer = small_fleet.add("three")
    assert newcomer.engine.weight_version == 1
    small_fleet.wait_for(3)
    checksums = [asyncio.run(server.engine.weight_checksums()) for server in small_fleet.replicas.values()]
    assert checksums[0] == checksums[1] == checksums[2]


def test_weights_that_are_no_models_change_nothing(small_fleet: SmallFleet, tmp_path: Path) -> None:
    save_file({"strange": torch.zeros(2)}, tmp_path / "model.safetensors")
    version = small_fleet.engine.weight_version
    with pytest.raises(BadSnapshotError):
        small_fleet.engine.update_weights(tmp_path).result(60)
    assert {server.engine.weight_version for server in small_fleet.replicas.values()} == {version}
    with pytest.raises(RequestError, match="not over the wire"):
        small_fleet.engine.update_weights({"a": torch.zeros(1)})
