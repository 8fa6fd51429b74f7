"""Proposes the next tokens of running requests, and learns from what is drawn how likely its proposals are.

A draft never changes a token: it is proposed, and what is drawn decides. So nothing here has to be exact, and all of it
may depend on what else runs.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from myserve.engine.drafting.acceptance import Acceptance, RequestAcceptance, level_of
from myserve.engine.drafting.archive import Archive, prompt_key
from myserve.engine.drafting.text_index import LONGEST_MATCH, TextIndex

__all__ = ["GRAMMAR", "MODEL", "MOST_DRAFTED", "NGRAM", "SIBLING", "Draft", "Drafts", "Growing"]

MOST_DRAFTED = 15  # tokens of one draft: with the one before them, a recorded step of 16 rows

NGRAM = "ngram"  # found in the request's own prompt or completion
SIBLING = "sibling"  # found in another completion of the same prompt
GRAMMAR = "grammar"  # forced by the request's grammar
MODEL = "model"  # drawn by a draft model
# The first token of a draft that has no match counts as one behind a match of so many.
_LENGTHS = {GRAMMAR: 9, MODEL: 3}

ARCHIVED_TOKENS = 1 << 22  # four bytes each
ARCHIVED_PER_PROMPT = 1 << 14
# Tokens of prompts and earlier completions that are indexed at a time, about 350 bytes each; beyond, of each prompt its
# last tokens.
INDEXED_TOKENS = 1 << 18
ALWAYS_INDEXED = 1 << 11
READ_AT_ONCE = 1 << 11  # tokens of a prompt that a proposal reads, some 3 ms: a long one is read in pieces
_WORTHWHILE = 0.02  # a row that is less likely than this to give a token is proposed to no one


class Growing(Protocol):
    """The part of a request that is read here."""

    @property
    def prompt_token_ids(self) -> Sequence[int]: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def cache_root(self) -> Hashable: ...


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may come next, and how likely they are to come, the first j + 1 of them all, each."""

    token_ids: tuple[int, ...]
    drafter: str
    chances: tuple[float, ...]


@dataclass(slots=True)
class _Prompt:
    """Keep what running requests of one prompt share: an index over it, over them, and over earlier completions."""

    index: TextIndex
    text: int  # the prompt's
    unread: list[int]  # of the prompt
    num_running: int = 0


@dataclass(slots=True)
class _Running:
    """Keep how far one request has been read, and what was proposed to it last."""

    key: Hashable
    prompt: _Prompt
    text: int
    num_read: int  # of its tokens
    acceptance: RequestAcceptance
    proposed: tuple[int, ...] = ()
    drafter: str = NGRAM
    length: int = 0  # of the match behind `proposed`


class Drafts:
    """Drafts of n-grams: of a request's own text, and of other completions of its prompt, earlier ones included.

    Completions are shared within one `cache_root` alone, as prefixes are: one key's owner learns nothing of another's
    by how fast an answer comes.
    """

    def __init__(self) -> None:
        self._running: dict[Growing, _Running] = {}
        self._prompts: dict[Hashable, _Prompt] = {}
        self._archive = Archive(ARCHIVED_TOKENS, ARCHIVED_PER_PROMPT)
        self._acceptance = {name: Acceptance() for name in (NGRAM, SIBLING, GRAMMAR, MODEL)}

    def propose(self, asked: Sequence[tuple[Growing, int]]) -> list[Draft | None]:
        """Return of each request up to so many tokens that may follow what it has; None where nothing is likely."""
        return [self._propose(request, most) for request, most in asked]

    def offer(self, request: Growing, token_ids: tuple[int, ...], drafter: str) -> Draft:
        """Return another's tokens as a draft, in place of what was proposed; their chances are learned."""
        running = self._running[request]
        running.proposed, running.drafter, running.length = token_ids, drafter, _LENGTHS[drafter]
        return Draft(token_ids, drafter, self._chances(running))

    def chance_of_model(self, request: Growing) -> float:
        """Return how likely a draft model's next token is to be drawn."""
        return self._running[request].acceptance.chance(MODEL, level_of(_LENGTHS[MODEL]))

    def _propose(self, request: Growing, most: int) -> Draft | None:
        running = self._running.get(request) or self._begin(request)
        self._read(request, running)
        if unread := running.prompt.unread:
            running.prompt.index.extend(running.prompt.text, unread[:READ_AT_ONCE])
            del unread[:READ_AT_ONCE]
        index = running.prompt.index
        match = index.match(running.text)
        if match is None:
            return None
        own = match.text in (running.text, running.prompt.text)
        running.drafter, running.length = NGRAM if own else SIBLING, match.length
        running.proposed = index.following(running.text, match, most)
        chances = self._chances(running)
        return Draft(running.proposed[: len(chances)], running.drafter, chances) if chances else None

    def end(self, request: Growing) -> None:
        """Let go of a request; its completion may be what a later one of the same prompt says."""
        running = self._running.pop(request, None)
        if running is None:
            return
        self._archive.add(running.key, request.token_ids[len(request.prompt_token_ids) :])
        running.prompt.num_running -= 1
        if not running.prompt.num_running:
            del self._prompts[running.key]

    def _begin(self, request: Growing) -> _Running:
        prompt_ids = request.prompt_token_ids
        key = prompt_key(request.cache_root, prompt_ids)
        prompt = self._prompts.get(key)
        if prompt is None:
            room = INDEXED_TOKENS - sum(
                len(other.index) + len(other.unread) for other in self._prompts.values()
            )
            index = TextIndex()
            unread = list(prompt_ids[-max(room, ALWAYS_INDEXED) :])
            prompt = self._prompts[key] = _Prompt(index, index.add(()), unread)
            room -= len(unread)
            for completion in self._archive.completions(key):
                if room > len(completion):
                    _add_completion(index, prompt_ids, completion)
                    room -= len(completion)
        prompt.num_running += 1
        text = _add_completion(prompt.index, prompt_ids, ())
        acceptance = RequestAcceptance(self._acceptance)
        running = _Running(key, prompt, text, len(prompt_ids), acceptance)
        self._running[request] = running
        return running

    def _read(self, request: Growing, running: _Running) -> None:
        """Take in the tokens that were drawn since the last time, and what they say of the last proposal."""
        drawn = request.token_ids[running.num_read :]
        for i, (token_id, proposed) in enumerate(zip(drawn, running.proposed, strict=False)):
            running.acceptance.observe(running.drafter, level_of(running.length + i), token_id == proposed)
            if token_id != proposed:
                break
        running.proposed = ()
        running.prompt.index.extend(running.text, drawn)
        running.num_read += len(drawn)

    def _chances(self, running: _Running) -> tuple[float, ...]:
        chances: list[float] = []
        so_far = 1.0
        for i in range(len(running.proposed)):
            so_far *= running.acceptance.chance(running.drafter, level_of(running.length + i))
            if so_far < _WORTHWHILE:
                break
            chances.append(so_far)
        return tuple(chances)


def _add_completion(index: TextIndex, prompt_ids: Sequence[int], completion: Sequence[int]) -> int:
    context = list(prompt_ids[-LONGEST_MATCH:])
    return index.add([*context, *completion], context=len(context))
