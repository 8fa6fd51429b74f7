"""One run's means: the server, what it speaks, seeds that no other request has, and the error rate of each test."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from myserve.verify.statistics import OTHER, Fit, fit
from myserve.verify.subject import DrawnChoice, RefusedError, Subject
from myserve.verify.traits import PROMPTS, ServerTraits, ranked

__all__ = ["FaultError", "LackingError", "Trial"]

_MOST_TOKENS = 24  # of texts that are compared


class FaultError(Exception):
    """The server does something else than it should: the evidence, in words."""


class LackingError(Exception):
    """The check cannot be made of this server: the reason, in words."""


@dataclass(slots=True)
class Trial:
    """Hold what all checks of a run share.

    `error_rate`: the chance that a statistical check fails without a fault, each.
    """

    subject: Subject
    traits: ServerTraits
    run_seed: int
    draws: int
    error_rate: float
    choices_are_independent: bool = True
    num_draws: int = 0
    _next: int = 0
    _memo: dict[str, Any] = field(default_factory=dict)

    def new_seed(self) -> int:
        """Return a seed of 31 bits that no other request of the run has."""
        while True:
            self._next += 1
            digest = hashlib.blake2b(f"{self.run_seed} {self._next}".encode(), digest_size=4).digest()
            seed = int.from_bytes(digest) >> 1
            # neighbours too are kept apart: a server that mixes them up is found by a check of its own
            if not {seed - 1, seed, seed + 1} & self._seeds:
                self._seeds.add(seed)
                return seed

    @property
    def _seeds(self) -> set[int]:
        seeds: set[int] = self._memo.setdefault("seeds", set())
        return seeds

    def need(self, **traits: bool) -> None:
        """Raise LackingError for the first that is not there, by its words with underscores."""
        for words, there in traits.items():
            if not there:
                raise LackingError(f"the server has no {words.replace('_', ' ')}")

    def need_spread(self, least: int = 4) -> Mapping[str, float]:
        """Return the next tokens of the prompt that is drawn from; LackingError without logprobs or spread."""
        self.need(logprobs_with_alternatives=self.traits.num_logprobs > 1)
        top = {name: value for name, value in self.traits.top.items() if not self._may_be_silent(name)}
        if len(top) < least or max(top.values()) > math.log(0.9):
            raise LackingError("no prompt was found after which several tokens are likely")
        return top

    def _may_be_silent(self, name: str) -> bool:
        """Return whether a token may end the text without an entry of its own; a server that names ids gives it one."""
        return not self.traits.names_ids and (not name or (name.startswith("<") and name.endswith(">")))

    async def draw(self, **fields: Any) -> Counter[str]:
        """Draw first tokens after the prompt; return their counts by name."""
        count = min(self.traits.most_choices, 64) if self.choices_are_independent else 1
        wanted = self.draws if count > 1 else min(self.draws, 300)
        requests = [
            self.subject.ask(
                self.traits.prompt,
                logprobs=0,
                **(
                    {"max_tokens": 1, "temperature": 1.0, "seed": self.new_seed()}
                    | ({"n": count} if count > 1 else {})
                    | fields
                ),
            )
            for _ in range(-(-wanted // count))
        ]
        drawn: Counter[str] = Counter()
        for choices in await asyncio.gather(*requests):
            drawn.update(choice.names[0] if choice.names else "" for choice in choices)
        self.num_draws += drawn.total()
        return drawn

    def judge(
        self,
        what: str,
        drawn: Counter[str],
        weights: Mapping[str, float],
        num_tests: int,
        others: float | None = None,
    ) -> str:
        """Test draws of the named tokens against their weights; return the evidence. Raises FaultError, LackingError.

        `others`: the probability of all other tokens; None: draws of others are left out, for it is not known; 0: there
        must be none. `num_tests`: how many tests share the check's error rate.
        """
        counts = Counter({name: drawn[name] for name in weights})
        expected = dict(weights)
        if others is not None:
            counts[OTHER] = drawn.total() - counts.total()
            expected = {
                name: weight * (1 - others) / math.fsum(weights.values()) for name, weight in weights.items()
            }
            expected[OTHER] = others
        found = fit(counts, expected)
        if found is None:
            raise LackingError(f"{what}: too few of the draws can be judged; try more --draws")
        words = self.words(what, found)
        if found.p_value < self.error_rate / num_tests:
            raise FaultError(f"{words}; furthest off: {found.worst}")
        return words

    @staticmethod
    def words(what: str, found: Fit) -> str:
        return f"{what}: {found.num_draws:,} draws in {found.num_bins} bins, p = {found.p_value:.2g}"

    async def effect_or_lack(
        self, name: str, drawn: Counter[str], top: Mapping[str, float], fault: FaultError
    ) -> FaultError | LackingError:
        """Return whether draws that are not as `name` says are a fault, or show that the server ignores the field.

        A field that the server does not document and that changes nothing is one that it lacks.
        """
        if name in self.traits.documented:
            return fault
        weights = {token: math.exp(value) for token, value in top.items()}
        plain = fit(Counter({token: drawn[token] for token in weights}), weights)
        if plain is not None and plain.p_value > 1e-4:
            return LackingError(f"the server takes {name} and ignores it, as it does not document it")
        return fault

    async def text_of(self, prompt: str, **fields: Any) -> DrawnChoice:
        """Return the greedy continuation of a text, asked once."""
        key = f"text {prompt} {sorted(fields.items())}"
        if key not in self._memo:
            logprobs = None if self.traits.num_logprobs < 0 else min(self.traits.num_logprobs, 2)
            self._memo[key] = await self.subject.ask_one(
                prompt, **({"max_tokens": _MOST_TOKENS, "temperature": 0.0, "logprobs": logprobs} | fields)
            )
        choice: DrawnChoice = self._memo[key]
        return choice

    async def next_tokens(self, prompt: list[int]) -> dict[str, float]:
        """Return what may follow these ids, likeliest first, with raw logprobs."""
        choice = await self.subject.ask_one(
            prompt, max_tokens=1, temperature=1.0, logprobs=self.traits.num_logprobs, seed=1
        )
        return ranked(choice, self.traits.num_logprobs)

    async def known_ids(self) -> list[int]:
        """Return a dozen ids or more that the model writes. Raises LackingError without ids on the wire."""
        self.need(names_of_token_ids=self.traits.names_ids, prompts_of_token_ids=self.traits.takes_ids)
        if "ids" not in self._memo:
            texts = await asyncio.gather(*(self.text_of(prompt) for prompt in PROMPTS))
            ids = [token_id for text in texts for token_id in text.ids]
            shown = {name for text in texts for token in text.tokens for name in token.top}
            more = [
                int(name.removeprefix("token_id:")) for name in sorted(shown) if name.startswith("token_id:")
            ]
            self._memo["ids"] = list(dict.fromkeys(ids + more))
        ids_: list[int] = self._memo["ids"]
        if len(ids_) < 4:
            raise LackingError("the model writes too few different tokens")
        return ids_

    def seeded(self, seed: int, **fields: Any) -> dict[str, Any]:
        """Return the fields of a request whose draws can be repeated."""
        return {"seed": seed, "temperature": 1.0, "max_tokens": _MOST_TOKENS} | fields


async def refused_or(answer: Any) -> Any:
    """Return what is awaited; a refusal of the field is LackingError: the server says that it has no such thing."""
    try:
        return await answer
    except RefusedError as refused:
        if refused.answer.status in (400, 404, 405, 422, 501):
            raise LackingError(f"refused with {refused}") from refused
        raise
