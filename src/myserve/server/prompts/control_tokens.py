"""Only the template writes control tokens: the same text inside a message is encoded as plain text.

How: a copy of the tokenizer reads no control token at all, and has an alias for each that cannot be guessed.
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

__all__ = ["ControlTokens", "template_text"]

Message = dict[str, Any]
Render = Callable[[list[Message]], str]


class ControlTokens:
    """The control tokens of one tokenizer, and how to keep them the template's own.

    They are its special tokens, and the added tokens that one of its chat templates mentions (such as `<think>`).
    In an assistant's turn the latter are the model's own words and stay tokens; the former are text there.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        """`template`: a request's own, in place of the tokenizer's."""
        template = template_text(tokenizer) if template is None else template
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        added: dict[int, Any] = tokenizer.added_tokens_decoder
        self._special = {str(token): i for i, token in added.items() if token.special}
        self._mentioned = {str(token): i for i, token in added.items() if str(token) in template}
        self._all = self._mentioned | self._special
        self._find_special = _any_of(self._special)
        self._find_all = _any_of(self._all)
        normalizer = getattr(self._backend, "normalizer", None)
        self._normalize: Callable[[str], str] | None = None
        if normalizer is not None and any(added[i].normalized for i in self._all.values()):
            self._normalize = normalizer.normalize_str
            # a normalizer may put a space before any text, and none stands before a token inside of one
            written = {normalizer.normalize_str(text).strip(" ▁"): i for text, i in self._all.items()}
            self._find_normalized = _any_of({text: i for text, i in written.items() if text})
        self._plain: Tokenizer | None = None
        # Fresh in every process and never sent out: no message can hold an alias or a mark.
        self._nonce = secrets.token_hex(8)

    def in_messages(self, messages: list[Message]) -> bool:
        """Return whether any message holds text that would be read as a control token; nearly none does."""
        marked: list[str] = []
        self._mark_all(messages, marked)
        return bool(marked) or (self._normalize is not None and self._is_disguised(messages))

    def encode(self, messages: list[Message], render: Render) -> list[int]:
        """Return the ids of the rendered chat, with the messages' own text kept as text.

        Raises RequestError where the tokenizer cannot read a control token's text as text.
        """
        marked: list[str] = []
        text = render(self._mark_all(messages, marked))
        text = self._find_all.sub(lambda match: self._alias(self._all[match[0]]), text)
        text = re.sub(f"mark{self._nonce}x([0-9]+)x", lambda match: marked[int(match[1])], text)
        return self._encode_by_pieces(text) if self._backend is None else self._encode_aliases(text)

    def _encode_aliases(self, text: str) -> list[int]:
        ids: list[int] = self._plain_tokenizer().encode(text, add_special_tokens=False).ids
        self._refuse_control([i for i in ids if i not in self._own_ids])
        return [self._own_ids.get(i, i) for i in ids]

    def _encode_by_pieces(self, text: str) -> list[int]:
        """Encode what stands between the template's own control tokens, as tokenizers in Python do it anyway."""
        parts = re.split(f"alias{self._nonce}x([0-9]+)x", text)
        added = self._tokenizer.added_tokens_decoder
        ids: list[int] = []
        for place in range(0, len(parts), 2):
            piece = parts[place]
            if place > 0 and added[int(parts[place - 1])].rstrip:
                piece = piece.lstrip()
            if place + 1 < len(parts) and added[int(parts[place + 1])].lstrip:
                piece = piece.rstrip()
            plain = self._tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=True)
            self._refuse_control(plain)
            ids += plain
            ids += [int(i) for i in parts[place + 1 : place + 2]]
        return ids

    def _refuse_control(self, ids: list[int]) -> None:
        unknown = getattr(self._tokenizer, "unk_token_id", None)  # any letter may be unknown
        if not (set(self._all.values()) - {unknown}).isdisjoint(ids):
            raise RequestError(
                "a message holds a control token's text, which this model's tokenizer cannot read as text",
                param="messages",
            )

    def _is_disguised(self, value: Any) -> bool:
        """Return whether normalizing makes a string a control token's text: `＜s＞` by NFKC, `<S>` by lowercase."""
        if isinstance(value, str):
            assert self._normalize is not None, "asked only then"
            return self._find_normalized.search(self._normalize(value)) is not None
        if isinstance(value, dict):
            return any(self._is_disguised(item) for pair in value.items() for item in pair)
        return isinstance(value, list | tuple) and any(map(self._is_disguised, value))

    def _mark_all(self, messages: list[Message], marked: list[str]) -> list[Message]:
        return [
            {
                key: value if key == "role" else self._mark(value, message["role"], marked)
                for key, value in message.items()
            }
            for message in messages
        ]

    def _mark(self, value: Any, role: str, marked: list[str]) -> Any:
        """Return `value` with each control text in its strings replaced by a mark; append the texts to `marked`."""

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

    def _plain_tokenizer(self) -> Tokenizer:
        if self._plain is None:
            self._plain, self._own_ids = self._build_plain_tokenizer()
        return self._plain

    def _build_plain_tokenizer(self) -> tuple[Tokenizer, dict[int, int]]:
        """Return the copy, and its ids that the tokenizer has not, or has elsewhere: copy's id -> own id."""
        assert self._backend is not None, "of a tokenizer in Python, pieces are encoded"
        written = json.loads(self._backend.to_str())
        flags = {token["id"]: token for token in written["added_tokens"]}
        kept = [token for token in written["added_tokens"] if token["content"] not in self._all]
        written["added_tokens"], written["post_processor"] = kept, None
        _make_unreachable(written["model"], self._all, lambda token_id: f"\0{self._nonce}x{token_id}x")
        copy = Tokenizer.from_str(json.dumps(written))
        copy.no_truncation()
        copy.no_padding()
        own_ids: dict[int | None, int] = {copy.token_to_id(token["content"]): token["id"] for token in kept}
        for token_id in self._all.values():
            sides = {side: flags[token_id][side] for side in ("lstrip", "rstrip")}
            copy.add_tokens([AddedToken(self._alias(token_id), normalized=False, special=False, **sides)])
            own_ids[copy.token_to_id(self._alias(token_id))] = token_id
        return copy, {copied: own for copied, own in own_ids.items() if copied is not None}


def _make_unreachable(model: dict[str, Any], texts: dict[str, int], name: Callable[[int], str]) -> None:
    """Rename tokens in a model's vocabulary, so that no text is encoded as one of them.

    A Unigram model has control tokens among its pieces, and would find them in plain text.
    """
    vocab, merges = model.get("vocab"), model.get("merges")
    if isinstance(vocab, list):
        for place, (piece, score) in enumerate(vocab):
            if piece in texts:
                vocab[place] = [name(place), score]
    elif isinstance(vocab, dict):
        gone = [text for text in texts if text in vocab and text != model.get("unk_token")]
        for text in gone:
            token_id = vocab.pop(text)
            vocab[name(token_id)] = token_id
        if merges:
            pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in merges]
            model["merges"] = [pair for pair in pairs if {*pair, "".join(pair)}.isdisjoint(gone)]


def template_text(tokenizer: Any) -> str:
    """Return a tokenizer's chat template; of several, which have names, all of them."""
    template = getattr(tokenizer, "chat_template", None)
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""


def _any_of(texts: dict[str, int]) -> re.Pattern[str]:
    """Return a pattern for the longest of `texts` at each place."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
