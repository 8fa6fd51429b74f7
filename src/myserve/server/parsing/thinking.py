"""A thinking model's text is split in two, thought and answer; line breaks at the marks belong to the marks."""

from __future__ import annotations

from enum import Enum

from myserve.server.parsing.channels import CHANNEL_MARKS, ChannelReader
from myserve.server.parsing.marks import ThoughtReader, held_back

__all__ = ["THOUGHT_MARKS", "ThinkingCount", "ThinkingReader", "thought_reader"]

# Around a thought, by family: the first whose closing one is in a chat template is its.
THOUGHT_MARKS = (
    ("<think>", "</think>"),  # Qwen3, DeepSeek-R1, GLM, Granite, MiniMax and most others
    ("[THINK]", "[/THINK]"),  # Magistral, Ministral 3
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<|channel>thought\n", "<channel|>"),  # Gemma 4
)


def thought_reader(marks: tuple[str, str], *, starts_inside: bool) -> ThoughtReader:
    """Return what reads thoughts between these marks, or in a channel that they name."""
    return (
        ChannelReader()
        if marks == CHANNEL_MARKS
        else ThinkingReader(starts_inside=starts_inside, marks=marks)
    )


class _Part(Enum):
    BEFORE = "before"  # it may begin to think
    THOUGHT = "thought"
    GAP = "gap"  # behind the mark, before the answer
    ANSWER = "answer"


class ThinkingReader(ThoughtReader):
    """Splits one completion as its text comes. `starts_inside`: the prompt ends behind the opening one of the `marks`.

    >>> reader = ThinkingReader(starts_inside=False)
    >>> reader.feed("<think>\\nHm.\\n</th"), reader.feed("ink>\\n\\nYes"), reader.end()
    (('Hm.', ''), ('', 'Yes'), ('', ''))
    """

    def __init__(self, *, starts_inside: bool, marks: tuple[str, str] = THOUGHT_MARKS[0]) -> None:
        super().__init__()
        self._opening, self._closing = marks[0].rstrip(), marks[1]
        self._part = _Part.THOUGHT if starts_inside else _Part.BEFORE
        self._at_start = True  # of the thought: line breaks are the mark's

    def _read(self, *, final: bool) -> tuple[str, str]:
        if self._part is _Part.BEFORE and not self._enter(final):
            return "", ""
        thought = self._thought(final) if self._part is _Part.THOUGHT else ""
        if self._part is _Part.GAP:
            self._buffer = self._buffer.lstrip("\n")
            if self._buffer:
                self._part = _Part.ANSWER
        if self._part is not _Part.ANSWER:
            return thought, ""
        answer, self._buffer = self._buffer, ""
        return thought, answer

    def _enter(self, final: bool) -> bool:
        """Return whether it is known by now if there is a thought."""
        start = self._buffer.lstrip()
        if start.startswith(self._opening):
            self._buffer, self._part = start[len(self._opening) :], _Part.THOUGHT
        elif self._opening.startswith(start) and not final:
            return False
        else:
            self._part = _Part.ANSWER
        return True

    def _thought(self, final: bool) -> str:
        thought, mark, rest = self._buffer.partition(self._closing)
        if mark:
            self._part, self._buffer = _Part.GAP, rest
        else:
            held = 0 if final else held_back(thought, self._closing, space="\n")
            thought, self._buffer = thought[: len(thought) - held], thought[len(thought) - held :]
        if mark or final:
            thought = thought.rstrip("\n")
        if self._at_start:
            thought = thought.lstrip("\n")
            self._at_start = not thought
        return thought


class ThinkingCount:
    """Counts the tokens of one completion's thought as they come, the marks among them. Holds a few bytes of its text.

    >>> count = ThinkingCount(starts_inside=False)
    >>> for data in [b"<th", b"ink>", b"Hm.", b"</think>", b"Yes"]:
    ...     count.feed(data)
    >>> count.tokens
    4
    """

    def __init__(self, *, starts_inside: bool, marks: tuple[str, str] = THOUGHT_MARKS[0]) -> None:
        self._opening, self._closing = marks[0].rstrip().encode(), marks[1].encode()
        self.num_fed = 0
        self._inside = starts_inside
        self._over = False
        self._held = b""  # before the thought: the text so far; inside: its end, as long as a mark
        self._tokens = 0

    @property
    def tokens(self) -> int:
        """Return how many there were so far."""
        return self._tokens if self._inside else 0

    def feed(self, data: bytes) -> None:
        """Take in the next token's bytes."""
        self.num_fed += 1
        if self._over:
            return
        self._tokens += 1
        text = self._held + data
        if self._inside:
            self._over = self._closing in text
            self._held = text[-len(self._closing) :]
            return
        text = text.lstrip()
        self._inside = text.startswith(self._opening)
        self._over = not self._inside and not self._opening.startswith(text)
        self._held = text[-len(self._closing) :] if self._inside else text
