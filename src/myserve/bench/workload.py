"""Workloads: how many streams, how long, sampled how; and prompts for them. Pure: no clock, no socket."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from myserve.errors import RequestError

__all__ = ["PRESETS", "SAMPLING", "Prompt", "Workload", "id_prompts", "text_prompts"]

Prompt = str | Sequence[int]

# 0 is "off" for top_k and min_p. They are sent all the same: llama.cpp and transformers have defaults of their
# own (top_k 40 and 50), and a benchmark of two different distributions compares nothing.
_UNFILTERED = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
SAMPLING: Mapping[str, Mapping[str, float | int]] = {
    "greedy": {"temperature": 0.0},
    "t1": _UNFILTERED,
    "top_p": _UNFILTERED | {"top_p": 0.95},
    "logprobs": _UNFILTERED | {"logprobs": 5},
}
PRESETS: Mapping[str, str] = {
    "decode1": "1x128:64",
    "decode8": "8x128:64",
    "decode32": "32x128:64",
    "t1-32": "32x128:64@t1",
    "top_p32": "32x128:64@top_p",
    "logprobs32": "32x128:64@logprobs",
    "n8": "1x512:64@t1,n=8",
    "prefill512": "1x512:1",
    "prefill2048": "1x2048:1",
}
_FORM = re.compile(
    r"(?P<streams>\d+)x(?P<prompt>\d+):(?P<output>\d+)(@(?P<sampling>\w+))?(,n=(?P<n>\d+))?", re.ASCII
)
# Words that most tokenizers keep whole, so that a prompt of P words is of about P tokens.
_WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "for",
    "it",
    "as",
    "was",
    "with",
    "be",
    "by",
    "on",
    "not",
    "he",
)


@dataclass(frozen=True, slots=True)
class Workload:
    """`streams` requests at once, each with its own prompt; `n` completions of each; all of exactly `output_len`.

    The short form is `STREAMSxPROMPT:OUTPUT`, then `@SAMPLING` and `,n=N` where they are not greedy and 1.

    >>> Workload.parse("8x128:64@top_p")
    Workload(streams=8, prompt_len=128, output_len=64, sampling='top_p', n=1)
    >>> str(Workload.parse("n8"))
    '1x512:64@t1,n=8'
    >>> Workload.parse("8 streams")
    Traceback (most recent call last):
    ...
    myserve.errors.RequestError: no workload '8 streams': write it as 8x128:64@top_p,n=1 (streams x prompt : \
output @ greedy, t1, top_p or logprobs), or name one of decode1, decode8, decode32, t1-32, top_p32, logprobs32, \
n8, prefill512, prefill2048
    """

    streams: int
    prompt_len: int  # tokens
    output_len: int  # tokens of each completion
    sampling: str = "greedy"
    n: int = 1

    @classmethod
    def parse(cls, text: str) -> Workload:
        """Return the workload of a preset's name, or of the short form. Raises RequestError for any other text."""
        found = _FORM.fullmatch(PRESETS.get(text, text))
        if found is None or (found["sampling"] or "greedy") not in SAMPLING:
            raise RequestError(
                f"no workload {text!r}: write it as 8x128:64@top_p,n=1 (streams x prompt : output @ greedy, t1, "
                f"top_p or logprobs), or name one of {', '.join(PRESETS)}",
                param="workload",
            )
        streams, prompt_len, output_len = (int(found[name]) for name in ("streams", "prompt", "output"))
        workload = cls(streams, prompt_len, output_len, found["sampling"] or "greedy", int(found["n"] or 1))
        if not min(streams, prompt_len, output_len, workload.n):
            raise RequestError(f"workload {text!r} asks for nothing: every number must be at least 1")
        return workload

    def __str__(self) -> str:
        sampling = "" if self.sampling == "greedy" else f"@{self.sampling}"
        return f"{self.streams}x{self.prompt_len}:{self.output_len}{sampling}{f',n={self.n}' * (self.n > 1)}"

    @property
    def choices(self) -> int:
        """Return the number of completions in all."""
        return self.streams * self.n

    def warm_up(self) -> Workload:
        """Return the same shape in small: code paths, caches and clocks are then as in the run that counts."""
        return Workload(self.streams, 16, min(4, self.output_len), self.sampling, self.n)


def id_prompts(workload: Workload, ids: Sequence[int], seed: int) -> list[list[int]]:
    """Return a prompt for each stream, of ids drawn from `ids`. No two runs share one: a prefix cache has nothing.

    >>> id_prompts(Workload(2, 3, 1), range(100, 1000), seed=0)
    [[859, 782, 478], [333, 560, 464]]
    """
    draw = random.Random(seed)
    return [draw.choices(ids, k=workload.prompt_len) for _ in range(workload.streams)]


def text_prompts(workload: Workload, seed: int) -> list[str]:
    """Return a prompt for each stream, of as many words, for servers that take no ids.

    The server's `usage` tells how many tokens they are.

    >>> text_prompts(Workload(1, 4, 1), seed=0)
    ['on be for in']
    """
    draw = random.Random(seed)
    return [" ".join(draw.choices(_WORDS, k=workload.prompt_len)) for _ in range(workload.streams)]
