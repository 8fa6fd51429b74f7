"""Pieces of an answer become items, and each step an event: a stream and a whole answer go the same way."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

from myserve.server.answers.logprobs import TextOffsets
from myserve.server.parsing.message_reader import Piece, Thought
from myserve.server.parsing.tool_calls import Arguments, CallStart, Text
from myserve.server.routes.responses_api.offered import OfferedTool
from myserve.server.routes.responses_api.open_items import OpenCall, OpenItem, OpenMessage, OpenReasoning
from myserve.wire.responses import TokenLogprob
from myserve.wire.responses_api.answer import ItemOut, ItemStatus, ResponseEvent

__all__ = ["OutputItems"]

Events = Iterator[ResponseEvent]


class OutputItems:
    """The items of one answer, as far as they have come. Its events have no sequence numbers yet.

    `offered` says what a called function's name stands for. `offsets` write where each token's text begins, where
    tokens are listed: an entry stands with the text in which its token begins.

    >>> output = OutputItems({}, None, seals_thoughts=False)
    >>> events = [*output.feed([Thought("Hm."), Text("Yes")]), *output.end(is_cut=False)]
    >>> [event["type"].removeprefix("response.") for event in events][:4]
    ['output_item.added', 'content_part.added', 'reasoning_text.delta', 'reasoning_text.done']
    >>> [item["type"] for item in output.items]
    ['reasoning', 'message']
    """

    def __init__(
        self, offered: Mapping[str, OfferedTool], offsets: TextOffsets | None, *, seals_thoughts: bool
    ) -> None:
        self.items: list[ItemOut] = []  # that have ended
        self._offered = offered
        self._offsets = offsets
        self._seals_thoughts = seals_thoughts
        self._waiting: deque[TokenLogprob] = deque()  # entries of tokens whose text is not there yet
        self._open: OpenItem | None = None

    def add_tokens(self, entries: Sequence[TokenLogprob]) -> None:
        """Take in the entries of tokens, before the pieces that their text is in."""
        if self._offsets is not None:
            self._offsets.write(entries)
            self._waiting += entries

    def feed(self, pieces: Iterable[Piece]) -> Events:
        """Yield what these pieces add."""
        for piece in pieces:
            match piece:
                case Thought():
                    if not isinstance(self._open, OpenReasoning):
                        yield from self._begin(OpenReasoning(self._place, seals=self._seals_thoughts))
                case Text():
                    if not isinstance(self._open, OpenMessage):
                        yield from self._begin(OpenMessage(self._place, piece.start))
                case CallStart():
                    tool = self._offered.get(piece.name, OfferedTool("function", piece.name))
                    yield from self._begin(OpenCall(self._place, tool))
            yield from self._gained(piece)

    def end(self, *, is_cut: bool) -> Events:
        """Yield the end of the last item. `is_cut`: it was not the model that ended the answer."""
        if self._open is None:
            yield from self._begin(OpenMessage(0))
        if isinstance(self._open, OpenMessage) and (rest := self._entries(self._open.text_start, None)):
            yield from self._open.gained("", rest)
        yield from self._close("incomplete" if is_cut else "completed")

    @property
    def _place(self) -> int:
        """Return the next item's index."""
        return len(self.items) + (self._open is not None)

    def _gained(self, piece: Piece) -> Events:
        match piece, self._open:
            case Text(), OpenMessage() as message:
                yield from message.gained(
                    piece.text, self._entries(piece.start, piece.start + len(piece.text))
                )
            case Thought(), OpenReasoning() as thought:
                yield from thought.gained(piece.text)
            case Arguments(), OpenCall() as call:
                yield from call.gained(piece.text)

    def _entries(self, start: int, end: int | None) -> list[TokenLogprob]:
        """Return the entries of tokens whose text begins in a range; those before it are of no text."""
        found: list[TokenLogprob] = []
        while self._waiting and (end is None or self._waiting[0]["text_offset"] < end):
            entry = self._waiting.popleft()
            if entry["text_offset"] >= start:
                found.append(entry)
        return found

    def _begin(self, item: OpenItem) -> Events:
        yield from self._close("completed")
        self._open = item
        yield from item.begin()

    def _close(self, status: ItemStatus) -> Events:
        if self._open is not None:
            yield from self._open.end(status)
            self.items.append(self._open.item(status))
            self._open = None
