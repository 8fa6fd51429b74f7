"""`truncation: "auto"`: the oldest messages are dropped until the prompt fits, and the answer says how many."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from myserve.server.answers.answer import ActiveAnswer
from myserve.server.routes.chat import CHARS_PER_MESSAGE
from myserve.wire.chat import ChatCompletionRequest, ChatMessage

__all__ = ["cuts_of", "first_that_fits", "fit_prompt", "without_oldest"]

_STAYING = ("system", "developer")


def cuts_of(messages: Sequence[ChatMessage]) -> list[int]:
    """Return where a conversation may begin, the whole one first; not at an output, whose call would be missing."""
    spoken = [at for at, message in enumerate(messages) if message.role not in _STAYING]
    return [0, *(at for at in spoken[1:] if messages[at].role != "tool")]


def without_oldest(messages: Sequence[ChatMessage], cut: int) -> tuple[ChatMessage, ...]:
    """Return the conversation from message `cut` on. Instructions and system messages stay.

    >>> said = [ChatMessage(role=role, content=role) for role in ("system", "user", "assistant", "user")]
    >>> [[message.role for message in without_oldest(said, cut)] for cut in cuts_of(said)]
    [['system', 'user', 'assistant', 'user'], ['system', 'assistant', 'user'], ['system', 'user']]
    """
    staying = tuple(message for message in messages[:cut] if message.role in _STAYING)
    return (*staying, *messages[cut:])


def first_that_fits(number: int, fits: Callable[[int], bool]) -> int:
    """Return the first of `number` ever shorter conversations that fits; the last one where none does.

    Looked for from the shortest on, in steps that double: what is far too long is never tokenized.

    >>> asked = []
    >>> first_that_fits(10_000, lambda at: asked.append(at) or at >= 9_990), len(asked), min(asked)
    (9990, 8, 9983)
    """
    last = number - 1
    short, step = last, 1
    while short > 0 and fits(max(0, last - step)):
        short = max(0, last - step)
        step *= 2
    least = max(0, last - step) + 1 if short > 0 else 0
    return least + bisect_left(range(least, short), True, key=fits)


async def fit_prompt(answer: ActiveAnswer[ChatCompletionRequest]) -> str | None:
    """Shorten the request's conversation to what the context leaves; return what is to be said of that."""
    request, model = answer.request, answer.model
    cuts = cuts_of(request.messages)
    room = model.engine.max_model_len - (request.max_completion_tokens or 1)
    kwargs = model.style.template_kwargs(request.reasoning_effort, request.chat_template_kwargs)

    def fits(number: int) -> bool:
        messages = without_oldest(request.messages, cuts[number])
        longest = model.codec.token_bytes.longest * model.engine.max_model_len
        if sum(len(message.text) for message in messages) > longest:
            return False
        return len(model.codec.encode_chat(messages, kwargs, request.tools or ())) <= room

    size = sum(len(message.text) + CHARS_PER_MESSAGE for message in request.messages)
    first = await answer.tokenizing.run(size, lambda: first_that_fits(len(cuts), fits))
    if first == 0:
        return None
    kept = without_oldest(request.messages, cuts[first])
    answer.request = request.model_copy(update={"messages": kept})
    return f"truncation: the {len(request.messages) - len(kept)} oldest messages were left out of the prompt"
