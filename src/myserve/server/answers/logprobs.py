"""A token on the wire has its text, its true bytes, and the numbers that belong to it."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from myserve.engine.outputs import PromptLogprob, RoutingShape, TokenOutput
from myserve.engine.token_bytes import TokenBytes
from myserve.wire.responses import LegacyLogprobs, TokenLogprob, TopLogprob

__all__ = ["TextOffsets", "TokenWriter", "as_base64", "legacy"]


class TokenWriter:
    """Writes the logprobs entries of one request.

    `as_ids` writes every token's text as `token_id:7`: texts of different tokens can be equal, ids cannot.
    """

    def __init__(
        self,
        table: TokenBytes,
        *,
        skip_special_tokens: bool,
        as_ids: bool,
        mask_name: Literal["sampling_mask", "kept"] = "sampling_mask",
        routing_shape: RoutingShape | None = None,
    ) -> None:
        self._table = table
        self._routing_is_wide = routing_shape is not None and routing_shape.dtype == "uint16"
        self._hidden = table.special_ids if skip_special_tokens else frozenset[int]()
        self._as_ids = as_ids
        self._mask_name = mask_name
        self._shown: dict[int, tuple[str, list[int]]] = {}  # the likeliest alternatives come again and again

    def text(self, token_id: int) -> str:
        """Return a token's text alone; half a character is U+FFFD, which is why there are bytes."""
        return self._show(token_id)[0]

    def bytes_in_text(self, token_id: int) -> list[int] | None:
        """Return the bytes that a token adds to the text, or None for one that the text leaves out."""
        return None if token_id in self._hidden else self._show(token_id)[1]

    def _show_here(self, token_id: int, text_bytes: bytes | None) -> tuple[str, list[int] | None]:
        """Return a token's text and what it adds to the answer's, by its place where that decides (`text_bytes`)."""
        if text_bytes is None or token_id in self._hidden:
            return self.text(token_id), self.bytes_in_text(token_id)
        return self.text(token_id) if self._as_ids else text_bytes.decode("utf-8", "replace"), list(
            text_bytes
        )

    def _show(self, token_id: int) -> tuple[str, list[int]]:
        shown = self._shown.get(token_id)
        if shown is None:
            raw: bytes = self._table[token_id]
            text = f"token_id:{token_id}" if self._as_ids else raw.decode("utf-8", "replace")
            shown = self._shown[token_id] = (text, list(raw))
        return shown

    def entry(self, token: TokenOutput, *, in_text: bool = True) -> TokenLogprob:
        """Return a sampled token's entry. `in_text` is False for what ended the completion and was cut off with it."""
        text, raw = self._show_here(token.token_id, token.text_bytes if in_text else None)
        entry: TokenLogprob = {
            "token": text,
            "bytes": raw if in_text else None,
            "logprob": token.logprob,
            "top_logprobs": self._alternatives(token.top_logprobs),
            "token_id": token.token_id,
            "sampling_logprob": _finite(token.sampling_logprob),
        }
        if token.rank is not None:
            entry["rank"] = token.rank
        if token.entropy is not None:
            entry["entropy"] = token.entropy
        if token.token_id_logprobs:
            entry["token_id_logprobs"] = [
                {"token_id": i, "logprob": None if value is None else _finite(value)}
                for i, value in token.token_id_logprobs
            ]
        if token.kept is not None:
            entry[self._mask_name] = {
                "token_ids": list(token.kept.token_ids),
                "mass": token.kept.mass,
                "entropy": token.kept.entropy,
            }
        self._add_routing(entry, token.routed_experts)
        return entry

    def prompt_entry(self, token: PromptLogprob, top: int, text_bytes: bytes | None = None) -> TokenLogprob:
        """Return an echoed prompt token's entry: scored, not sampled; the first has no logprob."""
        text, raw = self._show_here(token.token_id, text_bytes)
        entry: TokenLogprob = {
            "token": text,
            "bytes": raw,
            "logprob": token.logprob,
            "top_logprobs": self._alternatives(token.top_logprobs[:top]),
            "token_id": token.token_id,
        }
        self._add_routing(entry, token.routed_experts)
        return entry

    def _add_routing(self, entry: TokenLogprob, routed_experts: bytes | None) -> None:
        if routed_experts is None:
            return
        entry["routing_matrix"] = as_base64(routed_experts)
        if self._routing_is_wide:
            entry["routing_matrix_dtype"] = "uint16"

    def prompt_ranks(self, token: PromptLogprob, top: int) -> dict[str, Any] | None:
        """Return vLLM's form of a prompt token and its alternatives: by id, each with its rank among all ids."""
        if token.logprob is None:
            return None
        ranked = {
            str(i): {"logprob": value, "rank": rank, "decoded_token": self.text(i)}
            for rank, (i, value) in enumerate(_finite_pairs(token.top_logprobs[:top]), start=1)
        }
        own = {"logprob": token.logprob, "rank": token.rank, "decoded_token": self.text(token.token_id)}
        return {str(token.token_id): own} | ranked

    def _alternatives(self, pairs: Iterable[tuple[int, float]]) -> list[TopLogprob]:
        written: list[TopLogprob] = []
        for token_id, value in _finite_pairs(pairs):
            text, raw = self._show(token_id)
            written.append({"token": text, "bytes": raw, "logprob": value, "token_id": token_id})
        return written


class TextOffsets:
    """Writes each entry's `text_offset`, in characters, along one text whose entries come in pieces.

    A token that begins inside a character has that character's offset; one without text, where the text goes on.

    >>> from myserve.server.models.echo import CharacterBytes
    >>> entries = [{"token_id": 223, "bytes": [195, 159]}, {"token_id": 1, "bytes": None}]
    >>> TextOffsets(CharacterBytes(), start=5).write(entries)
    >>> [entry["text_offset"] for entry in entries]
    [5, 6]
    """

    def __init__(self, table: TokenBytes, start: int = 0) -> None:
        self._start = start
        self._reader = table.bytes_reader()

    def write(self, entries: Sequence[TokenLogprob]) -> None:
        for entry in entries:
            token_id, raw = entry["token_id"], entry["bytes"]
            entry["text_offset"] = self._start + self._reader.position(token_id, bytes(raw or ()))
            self._reader.take(token_id, bytes(raw or ()))


def legacy(entries: Sequence[TokenLogprob], *, processed: bool = False) -> LegacyLogprobs:
    """Return the completions route's four lists, of entries that have their offsets.

    Alternatives are a dict by text there: the k likeliest and the token itself, so up to k + 1, as OpenAI has them.
    Of several with the same text (halves of characters) the token itself has the text, else the likeliest; the others
    are written `token_id:7`. `processed`: alternatives are of the distribution that was drawn from.
    """
    lists: LegacyLogprobs = {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [_by_text(entry, processed) for entry in entries],
        "text_offset": [entry["text_offset"] for entry in entries],
    }
    if any("routing_matrix" in entry for entry in entries):
        lists["routing_matrix"] = [entry.get("routing_matrix") for entry in entries]
    return lists


def as_base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _by_text(entry: TokenLogprob, processed: bool) -> dict[str, float] | None:
    own, own_id, value = entry["token"], entry["token_id"], entry["logprob"]
    if processed:
        value = entry.get("sampling_logprob", value)
    if value is None:
        return None
    shown: dict[str, float] = {}
    for alternative in entry["top_logprobs"]:
        token_id, text = alternative["token_id"], alternative["token"]
        if token_id == own_id:
            text = own
        elif text == own or text in shown:
            text = f"token_id:{token_id}"
        shown[text] = alternative["logprob"]
    # it is missing where k others are likelier
    shown.setdefault(own, value)
    return shown


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _finite_pairs(pairs: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the pairs within the support: JSON has no -inf."""
    return [(i, value) for i, value in pairs if math.isfinite(value)]
