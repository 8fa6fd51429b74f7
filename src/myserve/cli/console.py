"""Shared by all commands: the terminals, errors as one line, and a token's colour by its probability."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

__all__ = ["DEFAULT_URL", "ProbabilityPrinter", "colour_of", "err", "fail", "legend", "out"]

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

DEFAULT_URL = "http://localhost:8000"

# Probability of a token -> its colour, from sure to surprising. Five steps: a finer scale reads as noise.
_STEPS = ((0.9, "green"), (0.6, "cyan"), (0.3, "yellow"), (0.1, "dark_orange"), (0.0, "red"))


def fail(message: str) -> NoReturn:
    """End the command with one line on stderr and exit status 1."""
    err.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    raise typer.Exit(1)


def colour_of(probability: float) -> str:
    """Return the colour of a token that had this probability.

    >>> colour_of(0.95), colour_of(0.05)
    ('green', 'red')
    """
    return next((colour for least, colour in _STEPS if probability >= least), _STEPS[-1][1])


def legend() -> Text:
    """Return a line that explains the colours."""
    parts = [part for least, colour in _STEPS for part in ((f"≥{least:.0%} ", colour),)]
    return Text.assemble(("token probability  ", "dim"), *parts)


class ProbabilityPrinter:
    """Turns logprobs entries into coloured text, wherever tokens cut characters.

    A character that several tokens make has the colour of the least likely of them.

    >>> printer = ProbabilityPrinter()
    >>> halves = [{"bytes": [0xC3], "logprob": -0.01}, {"bytes": [0xA9], "logprob": -3.0}]
    >>> [str(piece) for piece in map(printer.text, halves)]
    ['', 'é']
    """

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._lowest = 1.0

    def text(self, entry: Mapping[str, Any]) -> Text:
        """Return one entry of `logprobs.content` as text; "" while its character is unfinished."""
        raw = entry.get("bytes")
        piece = self._decode(bytes(raw)) if raw is not None else ""
        self._lowest = min(self._lowest, math.exp(min(0.0, entry.get("logprob") or 0.0)))
        return self._coloured(piece)

    def all(self, entries: Iterable[Mapping[str, Any]]) -> Text:
        return Text.assemble(*map(self.text, entries))

    def rest(self) -> Text:
        """Return the character that the last token began and none ended, if there is one."""
        return self._coloured(self._decode(b"", final=True))

    def _coloured(self, piece: str) -> Text:
        if not piece:
            return Text()
        colour, self._lowest = colour_of(self._lowest), 1.0
        return Text(piece, style=colour)
