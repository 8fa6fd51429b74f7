"""Finds out what a server speaks before it is tested: what it lacks is skipped, and said."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from myserve.verify.subject import CHAT, COMPLETIONS, DrawnChoice, RefusedError, Subject, VerifyError

__all__ = ["PROMPTS", "ServerTraits", "find_traits"]

# Texts after which many words are likely, in any language model: the one whose draws tell most is drawn from.
PROMPTS = (
    "Say a color:",
    "My favourite animal is the",
    "One, two, three, four, five, six, seven, eight, nine, ten, eleven,",
    "Once upon a time there was a",
    "The names of some towns:",
    "Count to twenty: one two three four",
)
# OpenAI's own fields: a server that takes one and ignores it breaks its word.
_OPENAI = frozenset(
    {"temperature", "top_p", "n", "stop", "seed", "max_tokens", "stream", "logprobs", "logit_bias", "echo"}
    | {"presence_penalty", "frequency_penalty"}
)


@dataclass(slots=True)
class ServerTraits:
    """Describe what a server takes and reports."""

    chat: bool = False  # it has the route
    completions: bool = False
    num_logprobs: int = -1  # most alternatives that are reported with a token; -1: no logprobs
    names_ids: bool = False
    takes_ids: bool = False
    most_choices: int = 1
    max_model_len: int | None = None
    documented: frozenset[str] = _OPENAI
    prompt: str = PROMPTS[0]
    top: Mapping[str, float] = field(
        default_factory=dict
    )  # the prompt's next tokens, likeliest first, raw logprobs
    version: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return what a report says of the server."""
        return {
            "routes": [r for r, has in ((COMPLETIONS, self.completions), (CHAT, self.chat)) if has],
            "alternatives_of_a_token": max(0, self.num_logprobs),
            "logprobs": self.num_logprobs >= 0,
            "names_token_ids": self.names_ids,
            "takes_token_ids": self.takes_ids,
            "choices_of_a_request": self.most_choices,
            "max_model_len": self.max_model_len,
            "prompt": self.prompt,
            "version": dict(self.version),
        }


async def find_traits(subject: Subject) -> ServerTraits:
    """Ask a server a dozen small questions. Raises VerifyError where nothing can be asked of it."""
    traits = ServerTraits()
    await _find_model(subject, traits)
    refusals = {}
    for route in (COMPLETIONS, CHAT):
        subject.route = route
        try:
            await subject.ask("Hello", max_tokens=1)
        except RefusedError as refused:
            refusals[route] = refused
    traits.completions, traits.chat = COMPLETIONS not in refusals, CHAT not in refusals
    if len(refusals) == 2:
        raise VerifyError(f"{subject.url} answers on neither route: {refusals[CHAT]}")
    # completions where there are both: their prompts are the model's own, without a template
    subject.route = COMPLETIONS if traits.completions else CHAT
    await _find_documented(subject, traits)
    await _find_logprobs(subject, traits)
    await _find_choices(subject, traits)
    await _find_prompt(subject, traits)
    return traits


async def _find_model(subject: Subject, traits: ServerTraits) -> None:
    listing = await subject.call("GET", "/v1/models")
    models = listing.json
    listed = models.get("data") if isinstance(models, dict) else None
    cards: Sequence[Any] = listed if isinstance(listed, list) else []
    if not subject.model:
        if not cards:
            raise VerifyError(
                f"{subject.url} lists no model (GET /v1/models is answered with {listing.status}): pass --model"
            )
        subject.model = str(cards[0].get("id"))
    answer = await subject.call("GET", "/version")
    if answer.status == 200 and isinstance(answer.json, dict):
        traits.version = answer.json
    card: Mapping[str, Any] = next((card for card in cards if card.get("id") == subject.model), {})
    length = card.get("max_model_len")
    traits.max_model_len = length if isinstance(length, int) else None


async def _find_documented(subject: Subject, traits: ServerTraits) -> None:
    """Read the server's own list of fields, where it has one: what it documents, it must do."""
    api = (await subject.call("GET", "/openapi.json")).json
    try:
        body = api["paths"][subject.route]["post"]["requestBody"]["content"]["application/json"]["schema"]
        schema = api["components"]["schemas"][body["$ref"].rpartition("/")[2]]
        traits.documented = _OPENAI | frozenset(schema["properties"])
    except (TypeError, KeyError, AttributeError):
        pass


async def _find_logprobs(subject: Subject, traits: ServerTraits) -> None:
    for count in (20, 5, 1):
        try:
            choice = await subject.ask_one("Hello", max_tokens=1, logprobs=count)
        except RefusedError:
            continue
        if choice.tokens and choice.tokens[0].logprob is not None:
            traits.num_logprobs = count if choice.tokens[0].top else 0
            break
    for extras in (
        {"return_tokens_as_token_ids": True, "return_token_ids": True},
        {"return_tokens_as_token_ids": True},
    ):
        try:
            subject.extras = extras
            choice = await subject.ask_one("Hello", max_tokens=1, logprobs=0)
        except RefusedError:
            continue
        traits.names_ids = bool(choice.tokens) and len(choice.ids) == len(choice.tokens)
        if traits.names_ids:
            break
    if not traits.names_ids:
        subject.extras = {}
    if subject.route == COMPLETIONS:
        try:
            traits.takes_ids = bool(await subject.ask([1, 2, 3], max_tokens=1))
        except RefusedError:
            traits.takes_ids = False


async def _find_choices(subject: Subject, traits: ServerTraits) -> None:
    for count in (64, 16, 4):
        try:
            if len(await subject.ask("Hello", max_tokens=1, n=count)) == count:
                traits.most_choices = count
                return
        except RefusedError:
            continue


async def _find_prompt(subject: Subject, traits: ServerTraits) -> None:
    """Choose the text whose draws tell most: by reported logprobs, or by how many answers differ."""
    if traits.num_logprobs > 1:
        choices = await asyncio.gather(
            *(
                subject.ask_one(text, max_tokens=1, temperature=1.0, logprobs=traits.num_logprobs)
                for text in PROMPTS
            )
        )
        tops = {
            text: ranked(choice, traits.num_logprobs) for text, choice in zip(PROMPTS, choices, strict=True)
        }
        traits.prompt = max(tops, key=lambda text: _informative(tops[text]))
        traits.top = tops[traits.prompt]
        return
    spreads = []
    for text in PROMPTS:
        choices = await asyncio.gather(
            *(subject.ask_one(text, max_tokens=4, temperature=1.0, seed=seed) for seed in range(6)),
        )
        spreads.append(len({choice.text for choice in choices}))
    traits.prompt = PROMPTS[spreads.index(max(spreads))]


def ranked(choice: DrawnChoice, count: int) -> dict[str, float]:
    """Return the first token's alternatives, likeliest first."""
    top = choice.tokens[0].top if choice.tokens else {}
    return dict(sorted(top.items(), key=lambda item: -item[1])[:count])


def _informative(top: Mapping[str, float]) -> float:
    """Return the variance of the listed logprobs: how much draws can tell of what is done to them.

    A flat distribution stays what it is at any temperature; where one token is nearly sure, the others are never drawn.
    """
    if not top or max(top.values()) > math.log(0.7):
        return 0.0
    mass = math.fsum(map(math.exp, top.values()))
    mean = math.fsum(math.exp(value) * value for value in top.values()) / mass
    return mass * math.fsum(math.exp(value) * (value - mean) ** 2 for value in top.values()) / mass
