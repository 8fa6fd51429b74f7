"""A configuration of the engine is in range, or an error that names the field."""

from __future__ import annotations

import pytest

from myserve.engine.config import MOST_SEQS, EngineConfig
from myserve.errors import RequestError


@pytest.mark.parametrize(
    ("name", "value"),
    [("dtype", "fp16"), ("exact", "maybe"), ("threads", 0), ("max_num_seqs", 0), ("prefill_chunk", 0), ("max_queue", 0),
     ("max_model_len", 0), ("kv_cache_bytes", 0), ("kv_cache_share", 0.0), ("kv_cache_share", 1.5), ("num_blocks", 0),
     ("kv_cache_share", float("nan")), ("max_num_batched_tokens", 1)],
)  # fmt: skip
def test_what_is_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        EngineConfig(**{name: value})
    assert caught.value.param == name


def test_the_edges_of_the_ranges_are_in() -> None:
    EngineConfig(
        max_num_seqs=1,
        max_num_batched_tokens=2,
        prefill_chunk=1,
        max_queue=1,
        kv_cache_share=1.0,
        num_blocks=1,
    )


@pytest.mark.parametrize("arch", ["qwen3", "qwen3_5_text"])
def test_a_cache_of_so_many_bytes_is_not_larger(arch: str, tiny_model) -> None:
    """The option's effect: the same model with two sizes. The states of recurrent layers are a part of it."""
    from myserve.engine.engine import Engine

    sizes = []
    for wanted in (1 << 20, 2 << 20):
        engine = Engine.from_pretrained(str(tiny_model(arch)), EngineConfig(kv_cache_bytes=wanted))
        cache = engine.runner.kv_cache
        sizes.append(cache.num_bytes + sum(states.nbytes for states in cache.states))
        engine.shutdown()
        assert wanted // 2 < sizes[-1] <= wanted
    assert sizes[0] < sizes[1]


def test_a_step_holds_more_tokens_than_requests_decode_in_it() -> None:
    """A prompt could wait for ever otherwise; a number that nobody asked for makes room."""
    with pytest.raises(RequestError, match="max_num_batched_tokens"):
        EngineConfig(max_num_seqs=64, max_num_batched_tokens=64)
    assert EngineConfig(max_num_batched_tokens=64).most_seqs == 63
    assert EngineConfig().most_seqs == MOST_SEQS
