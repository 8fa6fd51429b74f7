"""A row that raises, or has no token, fails alone on every path of the sampler; the others keep their bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from myserve.core import sampling
from myserve.core.compiled import fast_path
from myserve.core.isolation import failure_of, raise_if_of_the_device
from myserve.core.rows import RowState
from myserve.core.sampling import Sampled, Sampler
from myserve.errors import ConstraintError, RequestFailedError

VOCAB, SICK = 131, 2
ASKS: list[dict[str, Any]] = [
    {},
    {"top_p": 0.9, "top_k": 40},
    {"temperature": 0.7, "min_p": 0.01},
    {"noise": "torch", "temperature": 1.2},
    {"typical_p": 0.9, "top_n_sigma": 0.5},
    {"temperature": 0.0, "repetition_penalty": 1.3},
]


class BrokenConstraint:
    """A grammar whose mask cannot be computed, or whose mask is empty."""

    error = None
    closes_early = ends = False

    def __init__(self, mask: Tensor | None = None) -> None:
        self._mask = mask

    def prepare(self) -> None:
        self.mask()

    def mask(self) -> Tensor:
        if self._mask is None:
            raise ZeroDivisionError("a fault put in by the test")
        return self._mask

    def append(self, token_id: int) -> None: ...

    def forced_token_ids(self) -> list[int]:
        return []


def make_rows(make_row: Callable[..., RowState], **of_the_sick: Any) -> list[RowState]:
    rows = [make_row(seed=b, completion=(4, 9), vocab=VOCAB, **ask) for b, ask in enumerate(ASKS)]
    if of_the_sick:
        rows[SICK] = make_row(seed=SICK, completion=(4, 9), vocab=VOCAB, **(ASKS[SICK] | of_the_sick))
    return rows


def logits() -> Tensor:
    return torch.randn(len(ASKS), VOCAB, generator=torch.Generator().manual_seed(1)) * 3


def broken_scores(monkeypatch: pytest.MonkeyPatch, rows: list[RowState]) -> None:
    rows[SICK].constraint = BrokenConstraint()


def broken_forbidden_ids(monkeypatch: pytest.MonkeyPatch, rows: list[RowState]) -> None:
    monkeypatch.setattr(
        RowState, "forbidden_token_ids", lambda row: [10**9] if row is rows[SICK] else [], raising=True
    )
    for row in rows:
        row._always_edits = True


def broken_report(monkeypatch: pytest.MonkeyPatch, rows: list[RowState]) -> None:
    reports = sampling.Reports

    def report(raw: Tensor, scaled: Tensor, behaviour: Tensor, params: Any) -> Any:
        if any(p is rows[SICK].params for p in params):
            raise IndexError("a fault put in by the test")
        return reports(raw, scaled, behaviour, params)

    monkeypatch.setattr(sampling, "Reports", report)


def broken_draw(monkeypatch: pytest.MonkeyPatch, rows: list[RowState]) -> None:
    key = RowState.counter_key.fget  # type: ignore[attr-defined]

    def counter_key(row: RowState) -> Any:
        if row is rows[SICK]:
            raise OverflowError("a fault put in by the test")
        return key(row)

    monkeypatch.setattr(RowState, "counter_key", property(counter_key))


def no_token_left(monkeypatch: pytest.MonkeyPatch, rows: list[RowState]) -> None:
    """The stages leave nothing, which by their definition cannot be."""
    truncate, draw = sampling.truncate, fast_path.draw

    def emptied(scaled: Tensor, params: Any) -> Tensor:
        left = truncate(scaled, params).clone()
        left[[b for b, p in enumerate(params) if p is rows[SICK].params]] = -torch.inf
        return left

    def lost(raw: Tensor, edited: Tensor, some: Any, places: Any = None) -> Any:
        drawn = draw(raw, edited, some, places)
        return drawn._replace(
            tokens=[-1 if row is rows[SICK] else t for row, t in zip(some, drawn.tokens, strict=True)]
        )

    monkeypatch.setattr(sampling, "truncate", emptied)
    monkeypatch.setattr(fast_path, "draw", lost)


@pytest.mark.parametrize("way", ["compiled", "tensors", "device"])
@pytest.mark.parametrize(
    "fault", [broken_scores, broken_forbidden_ids, broken_report, broken_draw, no_token_left]
)
def test_a_row_that_raises_fails_alone(
    way: str,
    fault: Callable[..., None],
    make_row: Callable[..., RowState],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if way == "device":
        request.getfixturevalue("as_on_a_device")
    sampler = Sampler(compiled=way == "compiled")
    well = sampler.sample(logits(), make_rows(make_row))
    assert all(isinstance(outcome, Sampled) for outcome in well)
    rows = make_rows(make_row)
    fault(monkeypatch, rows)
    spoiled = sampler.sample(logits(), rows)
    assert isinstance(spoiled[SICK], RequestFailedError)
    assert [x for b, x in enumerate(spoiled) if b != SICK] == [x for b, x in enumerate(well) if b != SICK]
    if fault is not no_token_left:  # the control: without isolation, one row takes the whole batch with it
        with torch.inference_mode(), pytest.raises((ZeroDivisionError, IndexError, OverflowError)):
            sampler._sample(logits(), rows)


@pytest.mark.parametrize("compiled", [True, False])
def test_the_next_draws_are_as_if_nothing_had_failed(
    compiled: bool, make_row: Callable[..., RowState], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch noise is a stream: a row that was drawn for twice must not have taken two draws from it."""
    sampler = Sampler(compiled=compiled)
    calm, struck = make_rows(make_row), make_rows(make_row)
    for step in range(4):
        expected = sampler.sample(logits(), calm)
        with monkeypatch.context() as patch:
            if step == 1:
                broken_report(patch, struck)
            got = sampler.sample(logits(), struck)
        for b, (e, g) in enumerate(zip(expected, got, strict=True)):
            assert isinstance(e, Sampled)
            calm[b].append(e.token_id)
            struck[b].append(g.token_id if isinstance(g, Sampled) else e.token_id)
            assert (e == g) != (b == SICK and step == 1)


def test_a_row_without_a_token_says_which_parameters_forbid_them_all(
    make_row: Callable[..., RowState],
) -> None:
    rows = make_rows(make_row)
    rows[SICK].constraint = BrokenConstraint(torch.zeros(-(-VOCAB // 32), dtype=torch.int32))
    outcome = Sampler().sample(logits(), rows)[SICK]
    assert isinstance(outcome, ConstraintError) and "no token is left" in str(outcome)


def test_what_the_caller_is_told_and_what_is_fatal(caplog: pytest.LogCaptureFixture) -> None:
    own = ConstraintError("loosen one of them")
    assert failure_of(own, "drawing its next token") is own
    told = failure_of(KeyError("secret"), "drawing its next token")
    assert isinstance(told, RequestFailedError)
    assert "secret" not in str(told) and "KeyError" in str(told)
    assert "secret" in caplog.text
    raise_if_of_the_device(KeyError("a row's own"))
    with pytest.raises(torch.AcceleratorError):
        raise_if_of_the_device(torch.AcceleratorError("an illegal memory access"))
