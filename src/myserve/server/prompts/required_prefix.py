"""Earlier turns of a conversation as the very ids that they were drawn as: NeMo-RL's `required_prefix_token_ids`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

from myserve.errors import RequestError
from myserve.server.prompts.codec import Codec
from myserve.wire.chat import ChatMessage

__all__ = ["DrawnTurns", "behind_turns", "keeping_prefix", "turns_of", "with_required_prefix"]

NAME = "required_prefix_token_ids"
SHOWN = 80  # characters of a text that an error shows

_PROBE = "probe"


@dataclass(slots=True)
class DrawnTurns:
    """Earlier turns as they were drawn, which the server kept: put in place where the conversation's text agrees.

    A client that did not send these ids is not to blame where they do not fit: `lost` says why then.
    """

    token_ids: Sequence[int]
    lost: str | None = None

    def kept(
        self,
        rendered: list[int],
        messages: Sequence[ChatMessage],
        codec: Codec,
        template_kwargs: dict[str, Any],
        eos_ids: Collection[int],
    ) -> list[int]:
        """Return the rendered conversation with these turns as they were drawn; unchanged where it has others."""
        try:
            return keeping_prefix(rendered, self.token_ids, messages, codec, template_kwargs, eos_ids)
        except RequestError as error:
            self.lost = error.message
            return rendered


def keeping_prefix(
    rendered: Sequence[int],
    prefix: Sequence[int],
    messages: Sequence[ChatMessage],
    codec: Codec,
    template_kwargs: dict[str, Any],
    eos_ids: Collection[int],
) -> list[int]:
    """Return a rendered conversation with its first turns as `prefix` has them. Raises RequestError."""
    size = len(codec.token_bytes)
    if unknown := [i for i in prefix if not 0 <= i < size]:
        raise RequestError(
            f"{NAME} names token id {unknown[0]}; the model's ids are 0 to {size - 1}", param=NAME
        )
    return with_required_prefix(
        rendered,
        prefix,
        messages,
        eos_ids=eos_ids,
        header=_answer_header(codec, template_kwargs, eos_ids),
        text_of=lambda ids: codec.decode(ids, skip_special_tokens=False),
    )


def _answer_header(codec: Codec, template_kwargs: dict[str, Any], eos_ids: Collection[int]) -> str:
    """Return the text that a template puts between a turn's EOS and an answer, empty thoughts left out.

    It is what an answer that is asked for and one that was given have in common.
    """
    asks = ChatMessage(role="user", content=_PROBE)
    says = ChatMessage(role="assistant", content=_PROBE * 2)
    asked = list(turns_of(codec.encode_chat([asks], template_kwargs), eos_ids))[-1]
    turns = turns_of(codec.encode_chat([asks, says, asks], template_kwargs), eos_ids)
    given = [codec.decode(turn, skip_special_tokens=False) for turn in turns]
    answer = next((text for text in given if _PROBE * 2 in text), "")
    opening = codec.decode(asked, skip_special_tokens=False)
    before = answer.partition(_PROBE * 2)[0]
    same = takewhile(lambda pair: pair[0] == pair[1], zip(opening, before, strict=False))
    return "".join(character for character, _ in same)


def with_required_prefix(
    rendered: Sequence[int],
    prefix: Sequence[int],
    messages: Sequence[ChatMessage],
    *,
    eos_ids: Collection[int],
    header: str,
    text_of: Callable[[Sequence[int]], str],
) -> list[int]:
    """Return a rendered conversation whose first turns are those ids: `prefix`, then what is rendered behind them.

    A turn ends with an EOS id, which the prefix's last may lack (it ended at its limit). Each turn must have the text
    that is rendered; only an answer may differ, as templates drop thoughts and change spaces around tool calls: it
    must begin with `header`, as answers do here, and have what its message says. Raises RequestError.

    >>> text_of = lambda ids: "".join(map(chr, ids))
    >>> def ids(text): return list(map(ord, text))
    >>> said = (ChatMessage(role="user", content="q"), ChatMessage(role="assistant", content="a"))
    >>> made = with_required_prefix(ids("U:q|A:a|U:r|A:"), ids("U:q|A:(why)a|"), said, eos_ids={ord("|")},
    ...     header="A:", text_of=text_of)
    >>> text_of(made)
    'U:q|A:(why)a|U:r|A:'
    """
    required = list(turns_of(prefix, eos_ids))
    known = list(islice(turns_of(rendered, eos_ids), len(required)))
    if len(known) < len(required) or known[-1][-1] not in eos_ids:
        raise _disagree(
            f"has {len(required)} turns that end with EOS, and the conversation as rendered has fewer"
        )
    answers = (message for message in messages if message.role == "assistant")
    for number, (own, theirs) in enumerate(zip(required, known, strict=True), start=1):
        text, wanted = (text_of([i for i in turn if i not in eos_ids]) for turn in (own, theirs))
        is_answer = bool(header) and wanted.startswith(header)
        message = next(answers, None) if is_answer else None
        if text != wanted and not (message and text.startswith(header) and _says(text, message)):
            raise _disagree(f"says {_short(text)} in turn {number}, which is rendered as {_short(wanted)}")
    # its last turn keeps the EOS that it ended with
    cut = sum(map(len, known)) - (prefix[-1] not in eos_ids)
    return [*prefix, *rendered[cut:]]


def behind_turns(
    rendered: Sequence[int],
    count: int,
    answer: ChatMessage,
    *,
    eos_ids: Collection[int],
    text_of: Callable[[Sequence[int]], str],
) -> int | None:
    """Return where the first `count` turns of a rendered conversation end, behind their EOS.

    The last of them must have what `answer` says; None where it has not, or there are fewer.

    >>> ids, says = list(map(ord, "q|a|r|")), ChatMessage(role="assistant", content="a")
    >>> behind_turns(ids, 2, says, eos_ids={ord("|")}, text_of=lambda ids: "".join(map(chr, ids)))
    4
    """
    turns = list(islice(turns_of(rendered, eos_ids), count))
    if len(turns) < count or not turns or turns[-1][-1] not in eos_ids:
        return None
    return sum(map(len, turns)) if _says(text_of(turns[-1]), answer) else None


def turns_of(token_ids: Sequence[int], eos_ids: Collection[int]) -> Iterator[Sequence[int]]:
    """Yield each turn with its EOS; the last as far as it goes.

    >>> list(turns_of([5, 0, 6], [0]))
    [[5, 0], [6]]
    """
    start = 0
    for at, token_id in enumerate(token_ids):
        if token_id in eos_ids:
            yield token_ids[start : at + 1]
            start = at + 1
    if start < len(token_ids):
        yield token_ids[start:]


def _says(text: str, message: ChatMessage) -> bool:
    """Return whether an answer's text has its message's words and the names of the tools that it called."""
    functions = [call.get("function") for call in message.tool_calls or ()]
    names = [each["name"] for each in functions if isinstance(each, dict) and "name" in each]
    return all(isinstance(words, str) and words in text for words in (message.text.strip(), *names))


def _short(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[: SHOWN // 2]}…{text[-SHOWN // 2 :]}")


def _disagree(how: str) -> RequestError:
    return RequestError(
        f"{NAME} is not the beginning of this conversation: it {how}. Send the messages that these ids were made of, "
        "unchanged, and new ones behind them",
        param=NAME,
        code="prefix_mismatch",
    )
