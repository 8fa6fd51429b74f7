"""Adapters: a request with one has the bits that it has alone, whatever other adapters share its steps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.adapters import write_adapter, write_expert_adapter
from engine.test_exactness import alone, together
from myserve.core.params import SamplingParams
from myserve.engine.engine import Engine
from myserve.engine.requests.options import SubmitOptions
from myserve.engine.scheduling import block_tables
from myserve.engine.weights.lora.adapter_files import prepare_adapter
from runs import Asked, Completion, collect, mixed_requests, thorough
from stepped import Stepped

MakeEngine = Callable[..., Engine]
PROMPT = list(range(100, 180))
MODELS = [("llama", "bfloat16"), thorough("gpt2", "float32"), ("odd_gemma3", "bfloat16")]
each_model = pytest.mark.parametrize(("arch", "dtype"), MODELS, ids=lambda value: str(value))


@pytest.fixture
def with_adapters(
    make_engine: MakeEngine, tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> MakeEngine:
    """Engines that have the adapters "a" of rank 4, "b" of rank 40 and "c", which changes two kinds of layers."""

    def make(arch: str, **config: Any) -> Engine:
        engine, model = make_engine(arch, **config), tiny_model(arch)
        if not engine.adapters:
            folder = tmp_path_factory.mktemp("adapters")
            few = ["c_attn"] if arch == "gpt2" else ["q_proj", "down_proj"]
            for name, seed, rank, targets in (("a", 1, 4, None), ("b", 2, 40, None), ("c", 3, 8, few)):
                write_adapter(folder / name, model, seed=seed, rank=rank, targets=targets)
                engine.load_adapter(name, folder / name).result()
        return engine

    return make


def requests(count: int, **options: Any) -> list[Asked]:
    """Requests with nothing in common, a quarter without an adapter."""
    names = [None, "a", "b", "c"]
    return [replace(one, adapter=names[i % 4]) for i, one in enumerate(mixed_requests(count, **options))]


@each_model
def test_alone_is_in_a_batch_of_many_adapters(arch: str, dtype: str, with_adapters: MakeEngine) -> None:
    engine, asked = with_adapters(arch, dtype=dtype, prefix_caching=False), requests(32)
    crowd = together(engine, asked)
    assert crowd == alone(engine, asked)
    plain = together(engine, [replace(one, adapter=None) for one in asked])
    same = [a == b for a, b in zip(crowd, plain, strict=True)]
    assert all(same[::4]), "requests without an adapter are as if there were none"
    assert not any(same[1::4] + same[2::4] + same[3::4]), "adapters change what is drawn"
    assert engine.runner.adapter_steps is not None and engine.runner.adapter_steps.usable


@pytest.mark.parametrize("arch", ["qwen3_moe", thorough("mixtral")])
def test_experts_have_adapters_in_both_of_their_forms(
    arch: str, make_engine: MakeEngine, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    engine = make_engine(arch, dtype="bfloat16", prefix_caching=False)
    for name, one_by_one, seed in (("a", False, 1), ("b", True, 1), ("c", False, 2)):
        folder = write_expert_adapter(tmp_path / name, tiny_model(arch), one_by_one=one_by_one, seed=seed)
        engine.load_adapter(name, folder).result()
    asked = requests(16)
    crowd = together(engine, asked)
    assert crowd == alone(engine, asked)
    other_form = {"a": "b", "b": "a"}
    swapped = [replace(one, adapter=other_form.get(one.adapter or "", one.adapter)) for one in asked]
    assert together(engine, swapped) == crowd
    plain = together(engine, [replace(one, adapter=None) for one in asked])
    assert [a == b for a, b in zip(crowd, plain, strict=True)] == [True, False, False, False] * 4


def test_whole_is_chunked_preempted_and_from_the_prefix_cache(with_adapters: MakeEngine) -> None:
    arch, dtype, asked = "llama", "bfloat16", requests(12, seed=2, max_tokens=60)
    calm = together(with_adapters(arch, dtype=dtype, prefix_caching=False), asked)
    tight = with_adapters(arch, dtype=dtype, num_blocks=6, max_num_seqs=8)
    assert together(tight, asked) == calm
    assert tight.scheduler.num_preemptions > 3, "the pool was not small enough to show anything"
    ragged = with_adapters(arch, dtype=dtype, max_num_seqs=8, max_num_batched_tokens=23, prefill_chunk=7)
    assert [together(ragged, asked) for _ in range(2)] == [calm, calm], "and the second time from the cache"


def test_drafts_change_nothing(with_adapters: MakeEngine) -> None:
    repeating = SamplingParams(max_tokens=60, seed=1, temperature=0.0, ignore_eos=True)
    asked = [Asked([7, 8, 9] * 9, repeating, adapter=name) for name in (None, "a", "b", "c")]
    drafted, plain = (with_adapters("llama", dtype="bfloat16", speculation=s) for s in ("4", "off"))
    assert together(drafted, asked) == alone(plain, asked)
    assert drafted.meters.drafts is not None and drafted.meters.drafts.accepted_tokens


@pytest.mark.parametrize("keyed", [True, False])
def test_a_cached_prefix_is_found_by_its_own_version_alone(
    keyed: bool, with_adapters: MakeEngine, tiny_model: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The control: without the version in their names, blocks of the one before are found, and numbers are wrong."""
    engine = with_adapters("llama", dtype="float32", num_blocks=64 + keyed)
    if not keyed:
        monkeypatch.setattr(block_tables, "_root", lambda request, version, adapter: request.cache_root)
    first, second = (write_adapter(tmp_path / str(s), tiny_model("llama"), seed=s) for s in (5, 6))
    params = SamplingParams(max_tokens=4, seed=1, ignore_eos=True)

    def ask(name: str | None, salt: str = "") -> Completion:
        async def just() -> Completion:
            options = SubmitOptions(adapter=name, cache_salt=salt)
            return (await collect(engine.submit(PROMPT, params, options)))[0]

        return asyncio.run(just())

    ask(None), ask("a")
    right, cached = [], []
    for folder in (first, second, first):
        version = engine.load_adapter("x", folder).result()
        found = [ask("x"), ask("x")]
        cached.append([c.metrics.cached_tokens for c in found if c.metrics is not None])
        right.append(all(c.numbers == ask("x", salt=f"cold {version.version}").numbers for c in found))
    if keyed:
        assert right == [True] * 3 and cached == [[0, 64]] * 3
    else:
        assert not all(right) and cached != [[0, 64]] * 3


@pytest.mark.parametrize("mode", ["drain", "keep", "abort"])
def test_a_replacement_while_requests_run(
    mode: Any, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request keeps its version, or goes on with the new one and the keys it has; every token tells which it was."""
    stepped = Stepped(tiny_model("llama"), monkeypatch)
    engine, adapters = stepped.engine, stepped.engine.runner.adapters

    def put(seed: int, mode: Any = "drain") -> None:
        folder = write_adapter(tmp_path / str(seed), tiny_model("llama"), seed=seed)
        prepared = prepare_adapter(folder, engine.runner.model, engine._loaded.weight_names)
        engine.thread.put_adapter("x", prepared, path="", replaces=True, mode=mode)

    async def scene() -> list[Completion]:
        put(1)
        stepped.submit(PROMPT, seed=1, max_tokens=8, adapter="x")
        stepped.step(4)
        put(2, mode)
        assert len(adapters._in_memory) == (2 if mode == "drain" else 1)
        stepped.submit(PROMPT, seed=1, max_tokens=8, adapter="x")
        return await stepped.finish()

    one, two = asyncio.run(scene())
    versions = [token.adapter_version for token in one.tokens]
    assert versions == {"drain": [1] * 8, "keep": [1] * 4 + [2] * 4, "abort": [1] * 4}[mode]
    assert one.finish_reason == ("abort" if mode == "abort" else "length")
    assert [token.adapter_version for token in two.tokens] == [2] * 8
    assert len(adapters._in_memory) == 1 and not adapters._used_by, (
        "an old version goes with its last request"
    )
    adapters.remove("x")
    assert not adapters._in_memory and not adapters.current
    engine.shutdown()
