"""Earlier completions of the prompts that were asked lately, in few bytes and bounded."""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

__all__ = ["Archive", "prompt_key"]


def prompt_key(root: Hashable, prompt_token_ids: Sequence[int]) -> Hashable:
    """Return what two requests share completions by: the same prompt, and what their cached prefixes must agree on."""
    digest = blake2b(array("q", prompt_token_ids).tobytes(), digest_size=16).digest()
    return (root, digest)


@dataclass(slots=True)
class _Archived:
    texts: deque[array[int]] = field(default_factory=deque)
    num_tokens: int = 0


class Archive:
    """The latest completions of each prompt, at most `per_prompt` tokens of one and `limit` of all.

    The prompt that was used least recently is forgotten first, and of a prompt the oldest completion.

    >>> archive = Archive(limit=6, per_prompt=4)
    >>> for tokens in ([1, 2], [3, 4], [5]):
    ...     archive.add("prompt", tokens)
    >>> list(archive.completions("prompt")), archive.num_tokens
    ([[3, 4], [5]], 3)
    """

    def __init__(self, limit: int, per_prompt: int) -> None:
        self._limit, self._per_prompt = limit, per_prompt
        self._of: OrderedDict[Hashable, _Archived] = OrderedDict()
        self.num_tokens = 0

    def add(self, key: Hashable, token_ids: Sequence[int]) -> None:
        """Keep a completion; one that is longer than a prompt's bound is cut there."""
        kept = array("i", token_ids[: self._per_prompt])
        own = self._of.setdefault(key, _Archived())
        self._of.move_to_end(key)
        own.texts.append(kept)
        self._count(own, len(kept))
        while own.num_tokens > self._per_prompt:
            self._count(own, -len(own.texts.popleft()))
        while self.num_tokens > self._limit:
            _, oldest = self._of.popitem(last=False)
            self.num_tokens -= oldest.num_tokens

    def completions(self, key: Hashable) -> Iterator[list[int]]:
        """Yield a prompt's completions, the oldest first."""
        if (own := self._of.get(key)) is not None:
            self._of.move_to_end(key)
            for text in own.texts:
                yield text.tolist()

    def _count(self, own: _Archived, tokens: int) -> None:
        own.num_tokens += tokens
        self.num_tokens += tokens
