"""A session keeps turns: an answer each, as it was sampled, behind ids that the turn before has for the most part."""

from __future__ import annotations

import hashlib
from array import array
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from myserve.engine.outputs import TokenOutput
from myserve.server.choice import Choice
from myserve.wire.sessions import Drift

__all__ = ["KeptSession", "KeptTurn", "Said", "common_tokens", "turn_bytes"]

# Bytes as they are counted: of a sampled token with its numbers, of any other, and of what a turn and a message have
# beside their tokens.
SAMPLED_BYTES = 40
TOKEN_BYTES = 4
TURN_BYTES = 1024
MESSAGE_BYTES = 160

AT_ONCE = 4096  # ids that are compared in one step


class Said(NamedTuple):
    """A turn as messages: the digests of their beginnings, the answer's last, and that of its thought."""

    beginnings: Sequence[bytes]
    thought: bytes
    answer: bytes  # its own digest, whatever was before it


@dataclass(slots=True, eq=False)
class KeptTurn:
    """One answer: `new` are the ids of its prompt behind those of `parent`, `sampled` what was drawn behind them."""

    number: int
    request_id: str
    choice: int
    model: str
    parent: KeptTurn | None
    depth: int  # turns of its trajectory before it
    start: int  # where its sampled ids begin
    prompt: bytes  # the digest of its prompt
    new: array[int]
    sampled: array[int]
    logprobs: array[float]
    sampling_logprobs: array[float]
    weight_versions: array[int]
    adapter_versions: array[int] | None
    finish_reason: str
    seed: int
    drift: Sequence[Drift]
    num_ends: int  # of turns of the template in its ids: EOS that were rendered, or sampled as the last of an answer
    has_ended: bool  # its last id is an EOS
    num_messages: int  # that it has said, its answer too; 0 where it was no chat
    thought: bytes  # its digest
    is_continued: bool = False

    @property
    def end(self) -> int:
        """Return how many ids there are up to its end."""
        return self.start + len(self.sampled)

    @property
    def num_turns(self) -> int:
        """Return how many turns of the template its ids are, the last one ended or not."""
        return self.num_ends + (not self.has_ended)

    @property
    def path(self) -> list[KeptTurn]:
        """Return the turns from the first one to this."""
        turns = [self]
        while (parent := turns[-1].parent) is not None:
            turns.append(parent)
        return turns[::-1]

    @property
    def token_ids(self) -> list[int]:
        """Return every id up to its end."""
        return [token_id for turn in self.path for part in (turn.new, turn.sampled) for token_id in part]


@dataclass(slots=True)
class KeptSession:
    """Hold one session's turns as a tree. It only grows, on the event loop; other threads may look things up."""

    id: str
    owner: str
    created: float  # unix seconds
    used: float
    num_bytes: int = 0
    num_not_kept: int = 0
    is_deleted: bool = False
    turns: list[KeptTurn] = field(default_factory=list)
    _by_ids: dict[bytes, KeptTurn] = field(default_factory=dict)  # of every id up to a turn's end
    _lengths: list[int] = field(default_factory=list)  # of these, sorted
    _answers: dict[bytes, list[KeptTurn]] = field(default_factory=dict)  # by the digest with their answer
    _alone: dict[bytes, KeptTurn] = field(default_factory=dict)  # the last turn with such an answer
    _passed: dict[bytes, KeptTurn] = field(default_factory=dict)  # the last turn that began like this
    _prompts: set[bytes] = field(default_factory=set)

    def by_ids(self, model: str, prompt: Sequence[int]) -> KeptTurn | None:
        """Return the longest turn that a prompt begins with, token by token."""
        data, digest, found, at = memoryview(_packed(prompt)), _begun(model), None, 0
        for length in self._lengths:
            if length > len(prompt):
                break
            digest.update(data[at:length])
            at = length
            found = self._by_ids.get(digest.digest(), found)
        return found

    def by_messages(self, beginnings: Sequence[bytes], thoughts: Sequence[bytes | None]) -> KeptTurn | None:
        """Return the longest turn that these messages begin with.

        `thoughts[i]` is the digest of what message i says that it thought; None agrees with any.
        """
        found = None
        for length, digest in enumerate(beginnings):
            answers = self._answers.get(digest)
            if not answers:
                continue
            thought = thoughts[length - 1]
            agreeing = [turn for turn in answers if thought in (None, turn.thought)]
            if not agreeing:
                break
            # of the last request; of its equal choices the first
            found = next(turn for turn in agreeing if turn.request_id == agreeing[-1].request_id)
        return found

    def by_answer(self, answer: bytes, thought: bytes | None) -> KeptTurn | None:
        """Return the last turn that answered so, behind whatever messages."""
        turn = self._alone.get(answer)
        return turn if turn is not None and thought in (None, turn.thought) else None

    def left_at(
        self, beginnings: Sequence[bytes], thoughts: Sequence[bytes | None]
    ) -> tuple[int, KeptTurn] | None:
        """Return at which message a conversation leaves what was said, and the turn that it leaves; None: it does not.

        It leaves nothing where it goes on from a last turn, or asks again what was asked.
        """
        left = None
        for length, digest in enumerate(beginnings):
            turn = self._passed.get(digest)
            if turn is None:
                break
            is_left = length + 1 < len(beginnings) and turn.num_messages > length
            left = (length, turn) if is_left else None
            answers = self._answers.get(digest, ())
            if answers and all(thoughts[length - 1] not in (None, turn.thought) for turn in answers):
                return length - 1, answers[-1]
        return left

    def has_begun(self, start: bytes) -> bool:
        """Return whether some turn's conversation had this head."""
        return start in self._passed

    def has_prompt(self, model: str, prompt: Sequence[int]) -> bool:
        """Return whether some turn was asked with these ids."""
        return _of_ids(model, prompt) in self._prompts

    def add(
        self,
        choice: Choice,
        *,
        request_id: str,
        model: str,
        parent: KeptTurn | None,
        said: Said | None,
        drift: Sequence[Drift],
        eos_ids: Sequence[int],
    ) -> KeptTurn:
        """Keep an answer that has ended; of a request that was sent again and drew the same, the turn that is there."""
        tokens = choice.sampled
        prompt, sampled = choice.prompt_token_ids, [token.token_id for token in tokens]
        ids = _of_ids(model, [*prompt, *sampled])
        same = self._by_ids.get(ids)
        if same is not None and same.start == len(prompt) and same.request_id != request_id:
            self._index_messages(same, said)
            return same
        new = array("i", prompt[parent.end if parent else 0 :])
        turn = KeptTurn(
            len(self.turns),
            request_id,
            choice.index,
            model,
            parent,
            parent.depth + 1 if parent else 0,
            len(prompt),
            _of_ids(model, prompt),
            new,
            array("i", sampled),
            array("d", [token.logprob for token in tokens]),
            array("d", [token.sampling_logprob for token in tokens]),
            array("q", [token.weight_version for token in tokens]),
            _adapter_versions(tokens),
            choice.last.finish_reason or "" if choice.last else "",
            choice.seed,
            drift,
            (parent.num_ends if parent else 0) + sum(i in eos_ids for i in new) + (sampled[-1] in eos_ids),
            sampled[-1] in eos_ids,
            len(said.beginnings) - 1 if said else 0,
            said.thought if said else b"",
        )
        self.num_bytes += turn_bytes(len(new), len(sampled))
        self._index(turn, ids)
        self._index_messages(turn, said)
        return turn

    def _index(self, turn: KeptTurn, ids: bytes) -> None:
        self.turns.append(turn)
        self._prompts.add(turn.prompt)
        if turn.parent is not None:
            turn.parent.is_continued = True
        if ids not in self._by_ids:
            self._by_ids[ids] = turn
            if turn.end not in self._lengths:
                insort(self._lengths, turn.end)

    def _index_messages(self, turn: KeptTurn, said: Said | None) -> None:
        if said is None:
            return
        self.num_bytes += MESSAGE_BYTES * sum(digest not in self._passed for digest in said.beginnings)
        answers = self._answers.setdefault(said.beginnings[-1], [])
        if turn not in answers:
            answers.append(turn)
        self._alone[said.answer] = turn
        self._passed.update(dict.fromkeys(said.beginnings, turn))


def turn_bytes(new_tokens: int, sampled_tokens: int, new_messages: int = 0) -> int:
    """Return the bytes that a turn is counted with."""
    return (
        TURN_BYTES + TOKEN_BYTES * new_tokens + SAMPLED_BYTES * sampled_tokens + MESSAGE_BYTES * new_messages
    )


def common_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many ids two lists begin with in common.

    >>> common_tokens([1, 2, 3], [1, 2, 4, 5])
    2
    """
    least = min(len(one), len(other))
    starts = range(0, least, AT_ONCE)
    start = next((at for at in starts if one[at : at + AT_ONCE] != other[at : at + AT_ONCE]), least)
    return next((at for at in range(start, least) if one[at] != other[at]), least)


def _adapter_versions(tokens: Sequence[TokenOutput]) -> array[int] | None:
    versions = [token.adapter_version for token in tokens]
    return (
        array("q", [-1 if version is None else version for version in versions])
        if any(version is not None for version in versions)
        else None
    )


def _begun(model: str) -> hashlib.blake2b:
    return hashlib.blake2b(model.encode() + b"\0", digest_size=16)


def _of_ids(model: str, ids: Sequence[int]) -> bytes:
    digest = _begun(model)
    digest.update(_packed(ids))
    return digest.digest()


def _packed(ids: Sequence[int]) -> array[int]:
    """Return ids of a prompt; one that is too large for any vocabulary, and refused behind this, as -1."""
    try:
        return array("i", ids)
    except OverflowError:
        return array("i", [i if 0 <= i < 1 << 31 else -1 for i in ids])
