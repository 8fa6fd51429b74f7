"""Reads one choice of any answer into one form: a stream put together is the whole answer, field by field."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from myserve.verify.subject import VerifyError
from myserve.wire.sse import DONE_DATA, SSEDecoder

__all__ = ["CONFLICTS", "choices_of", "differences", "first_different_token", "joined_stream", "token_ids_of"]

# What a joined stream has beside an answer's fields: where its chunks contradict one another.
CONFLICTS = "conflicts"
_ADDED = ("text", "content", "reasoning_content", "reasoning")
# Of one run and not of the sample: how it was cached, scheduled, drafted or named.
_OF_A_RUN = frozenset({"index", "drafters", "weight_versions"})


def joined_stream(stream: str | Sequence[Any]) -> dict[str, Any]:
    """Return the whole answer that a stream's log adds up to: the bytes as text, or its chunks. Raises VerifyError."""
    if isinstance(stream, str):
        events = SSEDecoder().feed(stream.encode() + b"\n\n")
        try:
            chunks = [json.loads(event.data) for event in events if event.data != DONE_DATA]
        except ValueError as error:
            raise VerifyError(f"the stream has an event that is no JSON: {error}") from error
    else:
        chunks = list(stream)
    whole: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        if not isinstance(chunk, dict) or chunk.get("error"):
            raise VerifyError(f"the stream ended with an error: {str(chunk)[:200]}")
        whole |= {name: value for name, value in chunk.items() if name != "choices" and value is not None}
        for part in chunk.get("choices") or ():
            _add(choices.setdefault(int(part.get("index") or 0), {}), part)
    return whole | {"choices": [choices[index] for index in sorted(choices)], CONFLICTS: _conflicts(chunks)}


def _conflicts(chunks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of what all chunks say alike, and these do not."""
    said: dict[str, set[Any]] = {}
    for chunk in chunks:
        for name in ("id", "model", "created"):
            said.setdefault(name, set()).add(chunk.get(name))
        for part in chunk.get("choices") or ():
            for name in ("seed", "weight_version"):
                # a version may change on the way, and the last chunk then has the spans
                if not any(one.get("weight_version_spans") for one in chunk["choices"]):
                    said.setdefault(f"{name} of choice {part.get('index')}", set()).add(part.get(name))
    return sorted(name for name, values in said.items() if len(values - {None}) > 1)


def _add(whole: dict[str, Any], part: Mapping[str, Any]) -> None:
    for name, value in part.items():
        if value is None:
            whole.setdefault(name, None)
        elif name == "delta":
            # with logprobs, ours repeats them in here
            _add(whole.setdefault("message", {}), {k: v for k, v in value.items() if k != "logprobs"})
        elif name == "tool_calls":
            _add_calls(whole.setdefault(name, []), value)
        elif name in _ADDED and isinstance(value, str):
            whole[name] = (whole.get(name) or "") + value
        elif name == "logprobs":
            held = whole[name] if isinstance(whole.get(name), dict) else whole.setdefault(name, {}) or {}
            whole[name] = held
            for column, rows in value.items():
                held[column] = (held.get(column) or []) + (rows or []) if isinstance(rows, list) else rows
        elif name in ("token_ids", "drafters") and isinstance(value, list):
            whole[name] = (whole.get(name) or []) + value
        else:
            whole[name] = value


def _add_calls(whole: list[dict[str, Any]], parts: Sequence[Mapping[str, Any]]) -> None:
    for part in parts:
        while len(whole) <= int(part.get("index") or 0):
            whole.append({"function": {"name": "", "arguments": ""}})
        call, function = whole[int(part.get("index") or 0)], part.get("function") or {}
        call |= {name: part[name] for name in ("id", "type") if part.get(name)}
        call["function"]["name"] += function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""


def choices_of(response: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return an answer's choices. Raises VerifyError where it has none."""
    choices = response.get("choices")
    if (
        not isinstance(choices, list)
        or not choices
        or not all(isinstance(choice, dict) for choice in choices)
    ):
        raise VerifyError("the answer has no choices")
    shared = {name: response[name] for name in ("prompt_logprobs",) if response.get(name) is not None}
    return [{**shared, **choice} for choice in choices]


def token_ids_of(choice: Mapping[str, Any]) -> list[int] | None:
    """Return the completion's ids, from wherever an answer or a journal has them; None where it has not."""
    for ids in (choice.get("token_ids"), (choice.get("raw_output") or {}).get("completion_token_ids")):
        if isinstance(ids, list):
            return ids
    if isinstance(choice.get("full_tokens"), list):
        return list(choice["full_tokens"][int(choice.get("prompt_len") or 0) :])
    entries = (choice.get("logprobs") or {}).get("content") or ()
    ids = [entry.get("token_id") for entry in entries]
    return ids if ids and None not in ids else None


def differences(recorded: Any, drawn: Any, at: str = "") -> list[str]:
    """Return where a recorded value is another than the one drawn again; what the record does not have is not compared.

    >>> differences({"text": "a", "seed": 1}, {"text": "b", "seed": 1, "more": 2})
    ["text: recorded 'a', drawn 'b'"]
    """
    if isinstance(recorded, dict) and isinstance(drawn, dict):
        names = [name for name in recorded if name not in _OF_A_RUN]
        return [
            found
            for name in names
            if not (_is_nothing(recorded[name]) and _is_nothing(drawn.get(name)))
            and not (name == "id" and at.endswith("]"))  # of a tool call: a name that is given anew
            for found in differences(recorded[name], drawn.get(name), f"{at}.{name}" if at else name)
        ]
    if isinstance(recorded, list) and isinstance(drawn, list):
        found = [
            one
            for i, (a, b) in enumerate(zip(recorded, drawn, strict=False))
            for one in differences(a, b, f"{at}[{i}]")
        ]
        return found + (
            [f"{at}: recorded {len(recorded)}, drawn {len(drawn)}"] if len(recorded) != len(drawn) else []
        )
    if type(recorded) is type(drawn) or {type(recorded), type(drawn)} == {int, float}:
        return [] if recorded == drawn else [f"{at}: recorded {_short(recorded)}, drawn {_short(drawn)}"]
    return [f"{at}: recorded {_short(recorded)}, drawn {_short(drawn)}"]


def _is_nothing(value: Any) -> bool:
    return value is None or value == [] or value == "" or value == {}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def first_different_token(recorded: Sequence[int], drawn: Sequence[int]) -> int | None:
    """Return the first place where two completions differ; None where they are the same.

    >>> first_different_token([1, 2, 3], [1, 2]), first_different_token([1], [1])
    (2, None)
    """
    for place, (a, b) in enumerate(zip(recorded, drawn, strict=False)):
        if a != b:
            return place
    return None if len(recorded) == len(drawn) else min(len(recorded), len(drawn))
