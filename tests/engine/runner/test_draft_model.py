"""A draft model drafts what the target will draw, is told of another vocabulary, and changes no token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from myserve.core.params import SamplingParams
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.errors import RequestError, UnsupportedModelError
from runs import Asked, mixed_requests, run

PROMPT = list(range(40, 85))
TinyModel = Callable[[str], Path]


@pytest.fixture(scope="module")
def make(tiny_model: TinyModel) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make_(draft: str, **config: Any) -> Engine:
        options = {"num_blocks": 64, "speculation": "4", "draft_model": str(tiny_model(draft))} | config
        engines.append(Engine.from_pretrained(str(tiny_model("llama")), EngineConfig(**options)))
        return engines[-1]

    yield make_
    for engine in engines:
        engine.scheduler.check_integrity()
        engine.shutdown()


def accepted_share(engine: Engine, **params: Any) -> float:
    [choices] = run(
        engine, [Asked(PROMPT, SamplingParams(max_tokens=60, seed=3, ignore_eos=True, **params), n=4)]
    )
    metrics = [c.metrics for c in choices if c.metrics is not None]
    return sum(m.num_accepted_tokens for m in metrics) / max(1, sum(m.num_draft_tokens for m in metrics))


def test_the_same_weights_draft_every_token_at_any_temperature(make: Callable[..., Engine]) -> None:
    """They draw with the target's noise, so at temperature 1 too the same token wins both races."""
    engine = make("llama")
    assert accepted_share(engine, temperature=0.0) > 0.99
    assert accepted_share(engine, temperature=1.0) > 0.99
    assert accepted_share(engine, temperature=0.8, top_p=0.9, top_k=20) > 0.99


def test_control_with_noise_of_its_own_it_is_seldom_right(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    from myserve.engine.runner import draft_model

    with_its_noise = draft_model._with_its_noise

    def with_other_noise(row: Any, vocab_size: int) -> Any:
        state = with_its_noise(row, vocab_size)
        state.noise = type(state.noise)(state.noise.seed + 1, state.noise.sample_index)
        return state

    monkeypatch.setattr(draft_model, "_with_its_noise", with_other_noise)
    assert accepted_share(make("llama"), temperature=1.0) < 0.9


@pytest.mark.parametrize(
    ("draft", "speculation", "num_blocks"), [("llama", "4", 64), ("gpt2", "auto", 64), ("qwen3", "3", 6)]
)
def test_no_token_is_changed(
    draft: str,
    speculation: str,
    num_blocks: int,
    make: Callable[..., Engine],
    make_engine: Callable[..., Engine],
) -> None:
    asked = mixed_requests(16, seed=6, max_tokens=40)
    plain = run(make_engine("llama", speculation="off"), asked)
    drafted = run(make(draft, speculation=speculation, num_blocks=num_blocks, max_num_seqs=8), asked)
    assert [c.numbers for [c] in drafted] == [c.numbers for [c] in plain]


def test_another_vocabulary_is_refused_in_one_sentence(tiny_model: TinyModel, tmp_path: Path) -> None:
    from conftest import make_tiny_model

    folder = make_tiny_model("llama", tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        UnsupportedModelError, match=r"has another vocabulary \(1 tokens differ, the first '<another>'\)"
    ):
        Engine.from_pretrained(str(tiny_model("llama")), EngineConfig(num_blocks=8, draft_model=str(folder)))


def test_options_that_exclude_a_draft_model_are_refused() -> None:
    for other in ({"speculation": "off"}, {"exact": "off"}):
        with pytest.raises(RequestError, match="draft_model cannot be had with"):
            EngineConfig(draft_model="somewhere", **other)  # type: ignore[arg-type]
