"""A grammar as a value: its kind and its source. `myserve.grammar` compiles it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from myserve.errors import RequestError

__all__ = ["MAX_SOURCE", "Grammar", "Reasoning"]

Kind = Literal["json_schema", "regex", "lark"]

MAX_SOURCE = 1 << 18  # characters; the largest schemas that people send are a tenth of it


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar in one of three notations; equal sources are compiled once.

    `source` is a JSON schema as JSON, a regular expression without look-around (Rust's `regex` syntax), or a
    grammar in Lark's notation (GBNF is taken too). Whether it means anything is found out by compiling it.

    >>> print(Grammar.choice(["yes", "no"]).source)
    start: CHOICE
    CHOICE: "yes" | "no"
    >>> Grammar("regex", "")
    Traceback (most recent call last):
    ...
    myserve.errors.RequestError: a grammar must have between 1 and 262144 characters, this one has 0
    """

    kind: Kind
    source: str

    def __post_init__(self) -> None:
        if not 0 < len(self.source) <= MAX_SOURCE:
            raise RequestError(
                f"a grammar must have between 1 and {MAX_SOURCE} characters, this one has {len(self.source)}",
                param="grammar",
            )

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool) -> Grammar:
        """Return the grammar of the JSON values that a schema admits."""
        return cls("json_schema", json.dumps(schema, ensure_ascii=False))

    @classmethod
    def json_object(cls) -> Grammar:
        """Return the grammar of any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Grammar:
        """Return the grammar of one of these strings. Raises RequestError for none, and for too many."""
        if not choices:
            raise RequestError("choice must have at least one string, got none", param="choice")
        # Lark's strings are JSON's. As one terminal: of alternatives of a rule a parser takes 2,000 at most.
        source = "start: CHOICE\nCHOICE: " + " | ".join(
            json.dumps(text, ensure_ascii=False) for text in choices
        )
        if len(source) > MAX_SOURCE:
            raise RequestError(
                f"{len(choices)} choices have {len(source)} characters together, and {MAX_SOURCE} are the limit",
                param="choice",
            )
        return cls("lark", source)


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A part of the completion that comes before its answer: where it ends, and how long it may be.

    >>> Reasoning(budget=-1)
    Traceback (most recent call last):
    ...
    myserve.errors.RequestError: thinking_token_budget must be at least 0, got -1
    """

    start: str = "<think>"
    end: str = "</think>"
    starts_inside: bool = False  # the prompt ends inside it
    budget: int | None = None  # tokens before `end` is written for the model; None: any number
    shown_ids: tuple[
        int, ...
    ] = ()  # special tokens of its marks, which the text must show for it to be found

    @property
    def marks(self) -> tuple[str, str]:
        return self.start, self.end

    def __post_init__(self) -> None:
        if self.budget is not None and self.budget < 0:
            raise RequestError(
                f"thinking_token_budget must be at least 0, got {self.budget}", param="thinking_token_budget"
            )
