"""One request's error is its own: a fault in any part of a step fails that request alone, and the engine goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from myserve.core.grammar import Grammar
from myserve.core.params import SamplingParams
from myserve.core.rows import RowState
from myserve.engine.constraints.grammar import GrammarConstraint
from myserve.engine.engine import Engine
from myserve.engine.requests import results
from myserve.engine.requests.detokenizer import Detokenizer
from myserve.engine.runner import model_runner
from myserve.errors import RequestFailedError
from runs import Asked, Completion, run

MakeEngine = Callable[..., Engine]
Patch = pytest.MonkeyPatch

SICK = [377, 9, 40, 41, 300, 8]
SEED = 666
WELL = [
    Asked([5, 7, 100, 200, 33], SamplingParams(max_tokens=12, seed=1, ignore_eos=True)),
    Asked([5, 7, 100], SamplingParams(max_tokens=12, seed=2, ignore_eos=True, noise="torch", top_p=0.9), n=2),
    Asked([61, 62] * 20, SamplingParams(max_tokens=9, seed=3, prompt_logprobs=1, ignore_eos=True)),
    Asked([90, 91, 92], SamplingParams(max_tokens=30, seed=4, grammar=Grammar("regex", "[a-z ]{20,30}"))),
]


def fault() -> None:
    raise ZeroDivisionError("a fault put in by the test")


def in_the_mask(engine: Engine, patch: Patch) -> None:
    prepare = GrammarConstraint.prepare

    def broken(self: GrammarConstraint) -> None:
        if self._compiled is engine.constraints._library.get(Grammar("regex", "[0-9]+")):
            fault()
        prepare(self)

    patch.setattr(GrammarConstraint, "prepare", broken)


def in_taking_in_a_token(engine: Engine, patch: Patch) -> None:
    append = RowState.append

    def broken(self: RowState, token_id: int) -> None:
        if self.params.seed == SEED and self.num_completion_tokens == 2:
            fault()
        append(self, token_id)

    patch.setattr(RowState, "append", broken)


def in_the_draw(engine: Engine, patch: Patch) -> None:
    key = RowState.counter_key.fget  # type: ignore[attr-defined]
    patch.setattr(
        RowState, "counter_key", property(lambda self: fault() if self.params.seed == SEED else key(self))
    )


def in_the_forward_pass(engine: Engine, patch: Patch) -> None:
    forward = engine.runner.forward

    def broken(batch: Any, wanted: list[int], **options: Any) -> torch.Tensor:
        if any(part.request.prompt_token_ids == SICK for part in batch.scheduled):
            fault()
        return forward(batch, wanted, **options)

    patch.setattr(engine.runner, "forward", broken)


def in_scoring_the_prompt(engine: Engine, patch: Patch) -> None:
    scores = model_runner.prompt_logprobs

    def broken(logits: Any, targets: list[int], *others: Any) -> Any:
        return fault() if targets[0] == SICK[1] else scores(logits, targets, *others)

    patch.setattr(model_runner, "prompt_logprobs", broken)


def in_reporting(engine: Engine, patch: Patch) -> None:
    outcome = results.outcome_of

    def broken(request: Any, *args: Any, **options: Any) -> Any:
        return fault() if request.prompt_token_ids == SICK else outcome(request, *args, **options)

    patch.setattr(results, "outcome_of", broken)


def in_turning_tokens_into_text(engine: Engine, patch: Patch) -> None:
    feed = Detokenizer.feed

    def broken(self: Detokenizer, token: Any) -> Any:
        return fault() if self._min_tokens == 3 else feed(self, token)

    patch.setattr(Detokenizer, "feed", broken)


def in_making_its_sampling_state(engine: Engine, patch: Patch) -> None:
    make = RowState.__init__

    def broken(self: RowState, params: SamplingParams, **options: Any) -> None:
        if params.seed == SEED:
            fault()
        make(self, params, **options)

    patch.setattr(RowState, "__init__", broken)


FAULTS = [
    (in_the_mask, {"grammar": Grammar("regex", "[0-9]+")}, 2),
    (in_taking_in_a_token, {}, 2),
    (in_the_draw, {}, 2),
    (in_the_forward_pass, {}, 2),
    (in_scoring_the_prompt, {"prompt_logprobs": 0}, 1),
    (in_reporting, {}, 2),
    (in_turning_tokens_into_text, {"min_tokens": 3}, 2),
    (in_making_its_sampling_state, {}, 2),
]


def told(done: list[list[Completion]]) -> list[list[Any]]:
    return [[(c.numbers, c.text, c.finish_reason) for c in choices] for choices in done]


@pytest.mark.parametrize(("put_in", "asking", "n"), FAULTS, ids=[put_in.__name__ for put_in, *_ in FAULTS])
def test_a_fault_of_one_request_is_its_own(
    put_in: Callable[[Engine, Patch], None],
    asking: dict[str, Any],
    n: int,
    make_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(max_num_seqs=8, max_num_batched_tokens=64, prefill_chunk=16)
    sick = Asked(SICK, SamplingParams(**({"max_tokens": 12, "seed": SEED} | asking)), n=n)
    *calm, before = told(run(engine, [*WELL, sick]))
    with monkeypatch.context() as patch:
        put_in(engine, patch)
        *well, struck = run(engine, [*WELL, sick])
        assert told(well) == calm
        assert [choice.finish_reason for choice in struck] == ["error"] * n
        assert all(isinstance(choice.error, RequestFailedError) for choice in struck)
        assert engine.is_alive
    engine.scheduler.check_integrity()
    assert told(run(engine, [sick])) == [before], "the engine has kept something of the fault"
    assert not engine.thread._owner and not engine.scheduler.has_work
    assert engine._queue.num_open == 0


def test_a_step_that_cannot_be_replayed_is_run_as_it_is(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(max_num_seqs=8, max_num_batched_tokens=64, prefill_chunk=16)
    calm = told(run(engine, WELL))
    monkeypatch.setattr(engine.runner.recorded_steps, "logits", lambda scheduled, wanted: fault())
    assert told(run(engine, WELL)) == calm


def test_an_accelerator_that_fails_ends_the_engine(
    tiny_model: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: what no later step can be trusted after is not taken for one request's."""
    engine = Engine.from_pretrained(str(tiny_model("llama")))

    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.AcceleratorError("an illegal memory access")

    monkeypatch.setattr(engine.runner, "forward", broken)
    [[choice]] = run(engine, [Asked(SICK, SamplingParams(max_tokens=3))])
    assert "AcceleratorError" in str(choice.error)
    assert not engine.is_alive
