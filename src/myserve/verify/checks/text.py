"""Checks of the text: where it stops, that a stream is the whole answer, and that no character is broken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from myserve.verify.results import Check
from myserve.verify.subject import CHAT, COMPLETIONS, DrawnChoice
from myserve.verify.traits import PROMPTS
from myserve.verify.trial import FaultError, LackingError, Trial

__all__ = ["TEXT"]

BROKEN = "\N{REPLACEMENT CHARACTER}"
# A model that writes anything goes on with these, or says them again.
_MANY_BYTES = (
    "\N{UNICORN FACE}" * 8,
    "Repeat after me: Zß\N{UNICORN FACE}你好",
    "Repeat: \N{UNICORN FACE} \N{UNICORN FACE} \N{UNICORN FACE}",
    "你好，世界。你好，世界。你好，",
    "Übergröße, Übergröße, Übergröße, ",
)
_SAME_NUMBER = (
    0.25  # nats: a server without equal bits is still within this, a wrong token's number as a rule is not
)


async def stop(trial: Trial) -> str:
    text, prompt = await _plain_text(trial, least=6)
    cut = [(text[i : i + size], size) for i, size in ((len(text) // 2, 1), (len(text) // 2, 3), (2, 4))]
    for word, _ in cut:
        expected = text[: text.index(word)]
        for ask in (trial.subject.ask_one, trial.subject.stream):
            got = await ask(prompt, max_tokens=24, temperature=0.0, stop=[word, "\N{SNOWMAN}never"])
            streamed = "streamed" if ask == trial.subject.stream else "whole"
            if got.text != expected:
                raise FaultError(f"stop {word!r}, {streamed}: {got.text!r}, and {expected!r} was due")
            if got.finish_reason != "stop":
                raise FaultError(f"stop {word!r}, {streamed}: finish_reason is {got.finish_reason!r}")
    return f"{text[:40]!r} cut at {', '.join(repr(word) for word, _ in cut)}, whole and streamed"


async def max_tokens(trial: Trial) -> str:
    shown = []
    for prompt in PROMPTS[:2]:
        for most in (1, 2, 7):
            got = await trial.text_of(prompt, max_tokens=most)
            counts = {len(got.tokens)} - {0} if got.finish_reason == "length" else set()
            counts |= {got.usage["completion_tokens"]} if "completion_tokens" in got.usage else set()
            if any(count > most for count in counts) or (got.finish_reason == "length" and counts - {most}):
                raise FaultError(
                    f"max_tokens {most}: {sorted(counts)} tokens, finish_reason {got.finish_reason!r}"
                )
            if got.finish_reason not in ("length", "stop"):
                raise FaultError(f"max_tokens {most}: finish_reason is {got.finish_reason!r}")
            shown += sorted(counts)
    if not shown:
        raise LackingError("the server does not say how many tokens there were")
    return f"asked for 1, 2 and 7: {shown} tokens"


async def stream(trial: Trial) -> str:
    count = 0
    for route in _routes(trial):
        with _on(trial, route):
            for prompt in PROMPTS[:3]:
                logprobs = None if trial.traits.num_logprobs < 0 else 0
                fields: dict[str, Any] = {"max_tokens": 24, "temperature": 0.0, "logprobs": logprobs}
                whole = await trial.subject.ask_one(prompt, **fields)
                joined = await trial.subject.stream(prompt, **fields)
                if not whole.text.isascii():
                    continue  # broken characters are another check's
                _alike(f"{route} after {prompt!r}", whole, joined)
                count += 1
    if not count:
        raise LackingError("the model writes no plain text")
    return f"{count} answers, whole and streamed, on {' and '.join(_routes(trial))}: the same text, tokens and ends"


async def utf8(trial: Trial) -> str:
    seen: set[str] = set()
    for route in _routes(trial):
        with _on(trial, route):
            for prompt in _MANY_BYTES:
                fields: dict[str, Any] = {"max_tokens": 24, "temperature": 0.0}
                whole = await trial.subject.ask_one(prompt, **fields)
                wide = {character for character in whole.text if ord(character) > 127} - {BROKEN}
                if not wide:
                    continue
                joined = await trial.subject.stream(prompt, **fields)
                if joined.text != whole.text:
                    raise FaultError(
                        f"{route} after {prompt!r}: streamed {joined.text!r}, whole {whole.text!r}"
                    )
                seen |= wide
    if not seen:
        raise LackingError("the model writes no character of several bytes")
    return f"{len(seen)} characters of several bytes came whole: {''.join(sorted(seen))[:20]}"


def _alike(where: str, whole: DrawnChoice, joined: DrawnChoice) -> None:
    if joined.text != whole.text:
        raise FaultError(f"{where}: streamed {joined.text[:80]!r}, whole {whole.text[:80]!r}")
    if joined.finish_reason != whole.finish_reason:
        raise FaultError(
            f"{where}: streamed finish_reason {joined.finish_reason!r}, whole {whole.finish_reason!r}"
        )
    if joined.names != whole.names:
        raise FaultError(
            f"{where}: the stream's logprobs are of {len(joined.names)} tokens, the whole answer's of others"
        )
    for place, (a, b) in enumerate(zip(joined.tokens, whole.tokens, strict=True)):
        if a.logprob is None or b.logprob is None or abs(a.logprob - b.logprob) > _SAME_NUMBER:
            raise FaultError(
                f"{where}: token {place} has logprob {a.logprob} in the stream and {b.logprob} in the whole"
            )
    counts = [c.usage.get("completion_tokens") for c in (joined, whole)]
    if None not in counts and counts[0] != counts[1]:
        raise FaultError(
            f"{where}: usage counts {counts[0]} tokens in the stream and {counts[1]} in the whole"
        )


async def _plain_text(trial: Trial, least: int) -> tuple[str, str]:
    """Return the longest greedy text of plain characters, and its prompt."""
    texts = {prompt: (await trial.text_of(prompt)).text.split(BROKEN)[0] for prompt in PROMPTS}
    prompt = max(texts, key=lambda one: len(texts[one]))
    if len(texts[prompt]) < least:
        raise LackingError(f"the model writes no text of {least} characters")
    return texts[prompt], prompt


def _routes(trial: Trial) -> list[str]:
    return [r for r, has in ((COMPLETIONS, trial.traits.completions), (CHAT, trial.traits.chat)) if has]


@contextmanager
def _on(trial: Trial, route: str) -> Iterator[None]:
    before, trial.subject.route = trial.subject.route, route
    try:
        yield
    finally:
        trial.subject.route = before


TEXT = (
    Check("stop", "A stop string ends the text before itself, whole and streamed", stop, ("greedy",)),
    Check(
        "max_tokens", "No more tokens than asked for, and the finish reason says so", max_tokens, ("greedy",)
    ),
    Check("stream", "A stream adds up to the whole answer", stream, ("greedy",)),
    Check("utf8", "A stream breaks no character of several bytes", utf8, ("greedy",)),
)
