"""The completion request: a prompt as text or token ids, one or many."""

from __future__ import annotations

from typing import Annotated

from pydantic import Discriminator, Field, Tag

from myserve.wire.base import Integer
from myserve.wire.fields import GenerationRequest, TokenIds

__all__ = ["CompletionRequest", "Prompt"]


def _kind(prompt: object) -> str | None:
    """Return which of the four forms this is, by its first element: trying all would read a long prompt thrice."""
    if isinstance(prompt, str):
        return "text"
    if isinstance(prompt, list | tuple):
        first = prompt[0] if prompt else None
        if isinstance(first, str):
            return "texts"
        return "ids_list" if isinstance(first, list | tuple) else "ids"
    return None


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[tuple[str, ...], Field(fail_fast=True), Tag("texts")]
    | Annotated[TokenIds, Field(min_length=1), Tag("ids")]
    | Annotated[tuple[Annotated[TokenIds, Field(min_length=1)], ...], Field(fail_fast=True), Tag("ids_list")],
    Discriminator(
        _kind,
        custom_error_type="prompt_type",
        custom_error_message="must be a string, a list of strings, a list of token ids, or a list of those",
    ),
]


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`.

    >>> CompletionRequest(model="m", prompt=((1, 2), (3,))).prompts
    [(1, 2), (3,)]
    >>> CompletionRequest(model="m", prompt="hi").prompts
    ['hi']
    """

    prompt: Prompt
    add_special_tokens: bool | None = None
    best_of: Integer | None = None
    echo: bool | None = None
    echo_last: Annotated[Integer, Field(ge=0)] | None = None
    logprobs: bool | Integer | None = None

    @property
    def num_choices(self) -> int:
        """Return how many completions are asked for: `n` of each prompt."""
        return len(self.prompts) * (self.n or 1)

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """The prompts one by one: token ids stay ids, they are never decoded and encoded again."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)
