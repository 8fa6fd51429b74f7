"""A choice of an answer, as far as it has come; answers and traces are made of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from myserve.engine.outputs import Delta, PromptLogprob, RequestMetrics, TokenOutput

__all__ = ["Choice"]


@dataclass(slots=True)
class Choice:
    """The texts and tokens of one choice so far. `index` counts over all prompts of the request."""

    index: int
    prompt: int  # which of the request's prompts
    prompt_token_ids: Sequence[int]
    seed: int
    texts: list[str] = field(default_factory=list)
    tokens: list[TokenOutput] = field(default_factory=list)
    stop_tokens: list[TokenOutput] = field(default_factory=list)
    prompt_logprobs: tuple[PromptLogprob, ...] | None = None
    last: Delta | None = None  # the delta with the finish reason
    weight_version: int | None = None  # of the last token drawn, shown or not
    adapter_version: int | None = None  # likewise; None: no adapter, or no token

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.tokens += delta.tokens
        self.stop_tokens += delta.stop_tokens
        if delta.finish_reason is not None:
            self.last = delta

    @property
    def sampled(self) -> list[TokenOutput]:
        """Return every token that was drawn, in order: what usage counts."""
        return self.tokens + self.stop_tokens

    @property
    def metrics(self) -> RequestMetrics:
        return (self.last and self.last.metrics) or RequestMetrics(prompt_tokens=len(self.prompt_token_ids))
