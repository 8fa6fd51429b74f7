"""Finds what followed the longest suffix of a text before, in that text and in others: n-grams, with their places."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

__all__ = ["ENOUGH", "LONGEST_GRAM", "LONGEST_MATCH", "PLACES", "Match", "TextIndex"]

LONGEST_GRAM = 3  # tokens; longer matches are found by reading on from these
LONGEST_MATCH = 16  # tokens that are compared: beyond, a longer match predicts no better
PLACES = 8  # of one n-gram that are remembered, the latest; what is common has many
ENOUGH = 4  # tokens behind a place: one that has fewer is taken where no other has more
_SHIFT = 32  # a place is its text's number, shifted so far, plus its position


class Match(NamedTuple):
    """A place whose last `length` tokens are those that a text ends with."""

    text: int
    position: int  # of the token that followed
    length: int


class TextIndex:
    """Several texts of token ids, which may grow, and the places of each of their n-grams of 1 to 3 tokens.

    A lookup reads the latest places of the longest n-gram that is known and takes the one that goes on matching the
    furthest back; of equals, the one whose next token most of them have, then one that does not end at once, then the
    latest.

    >>> index = TextIndex()
    >>> prompt, completion = index.add([5, 1, 2, 3, 9]), index.add([7, 1, 2])
    >>> match = index.match(completion)
    >>> match, index.following(completion, match, 3)
    (Match(text=0, position=3, length=2), (3, 9))
    """

    def __init__(self) -> None:
        self._texts: dict[int, list[int]] = {}
        self._next = 0
        # most n-grams come once: a place alone, where a list would take as much as all the rest
        self._places: dict[tuple[int, ...], int | list[int]] = {}

    def __len__(self) -> int:
        """Return the tokens of all texts."""
        return sum(map(len, self._texts.values()))

    def add(self, token_ids: Sequence[int], context: int = 0) -> int:
        """Take in a text and return its number.

        Its first `context` tokens are another text's, which this one goes on from: they are read, never proposed.
        """
        number, self._next = self._next, self._next + 1
        self._texts[number] = list(token_ids[:context])
        self.extend(number, token_ids[context:])
        return number

    def extend(self, text: int, token_ids: Sequence[int]) -> None:
        """Append tokens to a text."""
        tokens = self._texts[text]
        place = (text << _SHIFT) + len(tokens)
        places = self._places
        for token_id in token_ids:
            for size in range(1, min(LONGEST_GRAM, len(tokens)) + 1):
                gram = tuple(tokens[-size:])
                known = places.get(gram)
                if known is None:
                    places[gram] = place
                elif isinstance(known, int):
                    places[gram] = [known, place]
                else:
                    known.append(place)
                    if len(known) > PLACES:
                        del known[0]
            tokens.append(token_id)
            place += 1

    def match(self, text: int) -> Match | None:
        """Return the best place that the end of a text has been at before; None where its last token is new."""
        tokens = self._texts[text]
        for size in range(min(LONGEST_GRAM, len(tokens)), 0, -1):
            places = self._places.get(tuple(tokens[-size:]))
            if places is not None:
                return self._best(tokens, [places] if isinstance(places, int) else places)
        return None

    def _best(self, tokens: Sequence[int], places: Sequence[int]) -> Match:
        matches = [self._matched(tokens, place) for place in places]
        longest = max(match.length for match in matches)
        matches = [match for match in matches if match.length == longest]
        following = [self._texts[match.text][match.position] for match in matches]
        votes = [following.count(token_id) for token_id in following]
        left = [min(ENOUGH, len(self._texts[match.text]) - match.position) for match in matches]
        best = max(range(len(matches)), key=lambda i: (votes[i], left[i], i))
        return matches[best]

    def _matched(self, tokens: Sequence[int], place: int) -> Match:
        text, position = place >> _SHIFT, place & ((1 << _SHIFT) - 1)
        other, end, length = self._texts[text], len(tokens), 1
        most = min(LONGEST_MATCH, position, end)
        while length < most and other[position - 1 - length] == tokens[end - 1 - length]:
            length += 1
        return Match(text, position, length)

    def following(self, text: int, match: Match, most: int) -> tuple[int, ...]:
        """Return at most `most` tokens that followed a match.

        Where it is `text` itself that matches, and ends, the draft goes on with what it has just proposed: a loop goes
        round.
        """
        found = self._texts[match.text][match.position : match.position + most]
        if match.text == text:
            period = len(found)
            while 0 < len(found) < most:
                found.append(found[len(found) - period])
        return tuple(islice(found, most))
