"""Only the template writes control tokens: the same text inside a message is encoded as plain text.

How: a copy of the tokenizer reads no control token at all, and has an alias for each that nobody can guess.
The template's own are written as aliases, the messages' stay as they are, and the whole is encoded in one go,
so that the rest of the ids are what the tokenizer gives for the whole text. (Encoding piece by piece was
rejected: tokenizers that put a space before a text put one before every piece.)
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer

from myserve.errors import RequestError

Message = dict[str, Any]
Render = Callable[[list[Message]], str]


class ControlTokens:
    """The control tokens of one tokenizer, and how to keep them the template's own.

    They are its special tokens, and the added tokens that the chat template mentions (such as `<think>`).
    In an assistant's turn the latter are the model's own words and stay tokens; the former are text there.
    """

    def __init__(self, tokenizer: Any) -> None:
        template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
        added = tokenizer.added_tokens_decoder.items()
        self._special = {str(token): i for i, token in added if token.special}
        self._mentioned = {str(token): i for i, token in added if str(token) in template}
        self._all = self._mentioned | self._special
        self._find_special = _any_of(self._special)
        self._find_all = _any_of(self._all)
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._plain: Tokenizer | None = None
        # Fresh in every process and never sent out: no message can hold an alias or a mark.
        self._nonce = secrets.token_hex(8)

    def in_messages(self, messages: list[Message]) -> bool:
        """Does any message hold text that would be read as a control token? Nearly never."""
        marked: list[str] = []
        self._mark_all(messages, marked)
        return bool(marked)

    def encode(self, messages: list[Message], render: Render) -> list[int]:
        """The ids of the rendered chat, with the messages' own text kept as text."""
        marked: list[str] = []
        text = render(self._mark_all(messages, marked))
        text = self._find_all.sub(lambda match: self._alias(self._all[match[0]]), text)
        text = re.sub(f"mark{self._nonce}x([0-9]+)x", lambda match: marked[int(match[1])], text)
        ids: list[int] = self._plain_tokenizer().encode(text, add_special_tokens=False).ids
        control = set(self._all.values())
        if any(i in control for i in ids):
            raise RequestError(
                "a message holds a control token's text, which this model's tokenizer cannot read as text",
                param="messages",
            )
        return [self._own_id(i) for i in ids]

    def _mark_all(self, messages: list[Message], marked: list[str]) -> list[Message]:
        return [
            {
                key: value if key == "role" else self._mark(value, message["role"], marked)
                for key, value in message.items()
            }
            for message in messages
        ]

    def _mark(self, value: Any, role: str, marked: list[str]) -> Any:
        """`value` with each control text in its strings replaced by a mark; what stood there in `marked`."""

        def mark(match: re.Match[str]) -> str:
            marked.append(match[0])
            return f"mark{self._nonce}x{len(marked) - 1}x"

        if isinstance(value, str):
            return (self._find_special if role == "assistant" else self._find_all).sub(mark, value)
        if isinstance(value, dict):
            return {self._mark(k, role, marked): self._mark(item, role, marked) for k, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._mark(item, role, marked) for item in value]
        return value

    def _alias(self, token_id: int) -> str:
        return f"alias{self._nonce}x{token_id}x"

    def _own_id(self, token_id: int) -> int:
        return self._aliases.get(token_id, token_id)

    def _plain_tokenizer(self) -> Tokenizer:
        if self._plain is None:
            self._plain, self._aliases = self._build_plain_tokenizer()
        return self._plain

    def _build_plain_tokenizer(self) -> tuple[Tokenizer, dict[int, int]]:
        """The copy, and the ids of its aliases: alias id -> control token id."""
        if self._backend is None:
            raise RequestError(
                "a message holds a control token's text, which this model's tokenizer cannot read as text",
                param="messages",
            )
        written = json.loads(self._backend.to_str())
        flags = {token["id"]: token for token in written["added_tokens"]}
        for token in written["added_tokens"]:
            token["special"] = token["special"] or token["content"] in self._all
        copy = Tokenizer.from_str(json.dumps(written))
        copy.encode_special_tokens = True  # special ones are read as text; the aliases are not special
        aliases: dict[int, int] = {}
        for token_id in self._all.values():
            sides = {side: flags[token_id][side] for side in ("lstrip", "rstrip")}
            copy.add_tokens([AddedToken(self._alias(token_id), normalized=False, special=False, **sides)])
            alias_id = copy.token_to_id(self._alias(token_id))
            assert alias_id is not None, "it was added in the line above"
            aliases[alias_id] = token_id
        return copy, aliases


def _any_of(texts: dict[str, int]) -> re.Pattern[str]:
    """The longest of `texts` at each place."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
