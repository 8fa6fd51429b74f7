"""The waterfall of one token: its distribution after each stage, and the race that chose it. Values alone: no torch."""

from __future__ import annotations

from dataclasses import dataclass

from myserve.core.ranges import MAX_TOKENS, check_ranges, ranged

__all__ = ["Draw", "Stage", "Waterfall", "WaterfallOptions", "WaterfallToken"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WaterfallOptions:
    """Name the token of a completion whose waterfall is reported, and how many tokens are listed in it.

    >>> WaterfallOptions(at=3).top
    20
    """

    at: int = ranged(0, 0, MAX_TOKENS)
    """The token that comes after so many of the completion."""
    top: int = ranged(20, 1, 200)
    """So many of the likeliest after every stage are listed, and so many of the first to arrive in the race."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, slots=True)
class Stage:
    """Hold what one stage left of the distribution. Listed are the waterfall's `tokens`; the rest is summed."""

    name: str  # of `docs/sampling.md`: raw, constraints, logit_bias, penalties, temperature, top_k, ...
    num_tokens: int  # that may still be drawn
    num_removed: int  # by this stage
    removed_mass: float  # their probability before it
    entropy: float  # nats
    rest_tokens: int  # that may still be drawn and are not listed
    rest_mass: float  # their probability


@dataclass(frozen=True, slots=True)
class WaterfallToken:
    """One listed token on its way through the stages. None after the stage that removed it."""

    token_id: int
    rank: int  # among all ids by the raw logits, 1 the likeliest
    scores: tuple[float | None, ...]  # a stage each
    probabilities: tuple[float | None, ...]
    removed_by: str | None  # the stage's name
    noise: float | None = None  # Exp(1) of this token; None at temperature 0, and where it cannot be drawn
    arrival: float | None = (
        None  # noise / (probability relative to the likeliest): the first to arrive is drawn
    )


@dataclass(frozen=True, slots=True)
class Draw:
    """Tell where the draw fell. `margin`: the second arrival over the first; at temperature 0 the scores' gap."""

    kind: str  # "race", or "argmax" at temperature 0
    token_id: int
    runner_up: int | None  # None: nothing else could be drawn
    margin: float | None


@dataclass(frozen=True, slots=True)
class Waterfall:
    """The stages that acted, raw first; the listed tokens, likeliest first; and the draw."""

    stages: tuple[Stage, ...]
    tokens: tuple[WaterfallToken, ...]
    draw: Draw
