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
from myserve.engine.runner.draft_model import DraftModel
from myserve.engine.weights.loader import load
from myserve.errors import RequestError, UnsupportedModelError
from runs import Asked, mixed_requests, run

PROMPT = list(range(40, 85))
TinyModel = Callable[[str], Path]


@pytest.fixture(scope="module")
def make(tiny_model: TinyModel) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make_(draft: str, target: str = "llama", **config: Any) -> Engine:
        options = {"num_blocks": 64, "speculation": "4", "draft_model": str(tiny_model(draft))} | config
        engines.append(Engine.from_pretrained(str(tiny_model(target)), EngineConfig(**options)))
        return engines[-1]

    yield make_
    for engine in engines:
        engine.scheduler.check_integrity()
        check_states(engine)
        engine.shutdown()


def check_states(engine: Engine) -> None:
    """Assert that the slots of a draft model are held by what it follows, and by nothing else."""
    model = engine.draft_model
    assert model is not None
    if (states := model._tables.states) is not None:
        own = [
            (m.request.state_slot, m.request.next_state_slot, m.known_slot) for m in model._mirrors.values()
        ]
        states.check_integrity(slot for slots in own for slot in slots)


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
    ("draft", "speculation", "num_blocks"),
    [
        ("llama", "4", 64),
        ("gpt2", "auto", 64),
        ("qwen3", "3", 6),
        ("qwen3_next", "4", 64),
        pytest.param("mamba2", "3", 6, marks=pytest.mark.thorough),
    ],
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


# --- with recurrent layers -----------------------------------------------------------------------------------


def test_the_same_weights_with_states_draft_every_token(make: Callable[..., Engine]) -> None:
    engine = make("qwen3_next", "qwen3_next")
    assert accepted_share(engine, temperature=0.0) > 0.99
    assert accepted_share(engine, temperature=1.0) > 0.99


def drafts_and_fresh_ones(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Return each draft of a run, beside that of a model that reads its text anew."""
    model, found, draft = engine.draft_model, list[tuple[Any, Any]](), DraftModel.draft
    assert model is not None and engine.config.draft_model is not None
    fresh = DraftModel(load(engine.config.draft_model, engine.config), engine.config, 384)

    def both(self: DraftModel, asked: Any) -> Any:
        drafted = draft(self, asked)
        found.append((drafted, draft(fresh, asked)))
        for request, _, _ in asked:
            fresh.end(request)
        check_states(engine)
        return drafted

    monkeypatch.setattr(DraftModel, "draft", both)
    params = SamplingParams(max_tokens=30, seed=3, ignore_eos=True)
    run(engine, [Asked(PROMPT[:n], params, n=2) for n in (5, 20, 45)])
    fresh.close()
    return found


@pytest.mark.parametrize("draft", ["qwen3_next", pytest.param("mamba2", marks=pytest.mark.thorough)])
def test_behind_a_wrong_draft_a_model_drafts_as_one_that_reads_the_text_anew(
    draft: str, make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone_back: list[int] = []
    go_back = DraftModel._go_back
    monkeypatch.setattr(DraftModel, "_go_back", lambda *a: gone_back.append(1) or go_back(*a))
    found = drafts_and_fresh_ones(make(draft), monkeypatch)
    assert len(gone_back) > 20 and len(found) > 20
    assert [own for own, _ in found] == [anew for _, anew in found]


def test_control_with_the_state_of_a_wrong_draft_it_drafts_others(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DraftModel, "_go_back", lambda _, mirror, right: right)
    found = drafts_and_fresh_ones(make("qwen3_next"), monkeypatch)
    assert [own for own, _ in found] != [anew for _, anew in found]


def test_two_slots_of_states_are_enough_to_go_on(make: Callable[..., Engine]) -> None:
    """One request at a time: a draft ends where a third one would be needed, and nothing waits for it."""
    engine = make("qwen3_next", "qwen3_next", max_num_seqs=1)
    assert engine.draft_model is not None and engine.draft_model.runner.kv_cache.num_state_slots == 2
    assert accepted_share(engine, temperature=1.0) > 0.99


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
