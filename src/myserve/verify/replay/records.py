"""Reads recorded samples: an SDK journal, requests with their answers or streams, or an answer whose request is given.

A record is one choice: all that was reported of it, and the request that draws it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from myserve.sdk.records.journal import request_of
from myserve.sdk.request import SampleRequest
from myserve.verify.replay.outcome import CONFLICTS, choices_of, joined_stream
from myserve.verify.subject import CHAT, COMPLETIONS, VerifyError

__all__ = ["GENERATE", "SampleRecord", "read_records", "record_digest", "record_of"]

GENERATE = "/inference/v1/generate"
# How an answer came, and not what it is.
_OF_THE_TRANSPORT = frozenset({"stream", "stream_options", "stream_interval", "n", "best_of"})


@dataclass(slots=True)
class SampleRecord:
    """Hold one recorded choice. `request` is None where the record lacks what a replay needs."""

    source: str
    choice: dict[str, Any]  # as reported, streams put together
    request: dict[str, Any] | None = None  # the body that draws this choice again
    route: str = COMPLETIONS
    index: int = 0
    place: int = 0  # of the choice in the answer to `request`
    journal: SampleRequest | None = None  # of a journal: drawn again by the SDK
    fingerprint: str | None = None
    server: Mapping[str, Any] = field(default_factory=dict)  # what GET /version said
    lacks: str = ""
    edited: str = ""  # what in it contradicts itself


def record_of(
    request: Mapping[str, Any], response: Mapping[str, Any], server: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return a record of an answer, as a line of a file: the request, the answer, the server, and a digest over them.

    >>> line = record_of({"prompt": [1], "seed": 2}, {"choices": []})
    >>> line["digest"] == record_digest(line)
    True
    """
    line: dict[str, Any] = {"request": dict(request), "response": dict(response)}
    if server:
        line["server"] = dict(server)
    return line | {"digest": record_digest(line)}


def record_digest(line: Mapping[str, Any]) -> str:
    """Return 128 bits over all of a record but its digest, in hex: a slip is noticed, a forger's own digest is not."""
    text = json.dumps({k: v for k, v in line.items() if k != "digest"}, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def read_records(path: Path, request: Mapping[str, Any] | None = None) -> list[SampleRecord]:
    """Return a file's records. `request`: of an answer or a stream that was kept without it.

    Raises VerifyError for a file that holds no records, OSError for one that cannot be read.
    """
    text = path.read_text("utf-8", errors="strict")
    if text.lstrip().startswith(("data:", "event:", ":")):
        kept: dict[str, Any] = {"stream": text} if request is None else {"request": request, "stream": text}
        return list(_of_line(kept, str(path)))
    values = _values(text, path)
    if isinstance(values[0][1], dict) and "journal" in values[0][1]:
        return [_of_journal(entry, where) for where, entry in values[1:] if not _is_note(entry)]
    records: list[SampleRecord] = []
    for where, value in values:
        if not isinstance(value, dict) or not value.keys() & {"response", "stream", "choices"}:
            raise VerifyError(f"{where} is no record: it has no response, stream or choices")
        line = value if "choices" not in value else {"response": value}
        if request is not None and "request" not in line:
            line = {**line, "request": request}
        records += _of_line(line, where)
    return records


def _values(text: str, path: Path) -> list[tuple[str, Any]]:
    """Return the JSON values of a file that is one of them, or has one a line."""
    try:
        whole = json.loads(text)
        return (
            [(f"{path}, {i}", v) for i, v in enumerate(whole)]
            if isinstance(whole, list)
            else [(str(path), whole)]
        )
    except ValueError:
        pass
    values = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                values.append((f"{path}:{number}", json.loads(line)))
            except ValueError as error:
                raise VerifyError(f"{path}, line {number}, is no JSON: {error}") from error
    if not values:
        raise VerifyError(f"{path} is empty")
    return values


def _of_line(line: Mapping[str, Any], where: str) -> Iterator[SampleRecord]:
    response = line.get("response")
    if response is None:
        response = joined_stream(line["stream"])
    digest = line.get("digest")
    edited = "its digest is another's" if isinstance(digest, str) and digest != record_digest(line) else ""
    body = line.get("request")
    choices = choices_of(response)
    for choice in choices:
        index = int(choice.get("index") or 0)
        record = SampleRecord(f"{where} choice {index}" if len(choices) > 1 else where, choice)
        record.fingerprint = response.get("system_fingerprint")
        record.server, record.edited = line.get("server") or {}, edited
        if response.get(CONFLICTS):
            record.edited = edited or f"its chunks differ in {', '.join(response[CONFLICTS])}"
        if not isinstance(body, dict):
            record.lacks = "it has no request: temperature, filters and stops are not known; give --request"
        else:
            _add_request(record, body, response, len(choices))
        yield record


def _add_request(
    record: SampleRecord, body: Mapping[str, Any], response: Mapping[str, Any], num_choices: int
) -> None:
    """Add the request that draws this choice alone, or what is lacking for it."""
    place = int(record.choice.get("index") or 0)
    request = {name: value for name, value in body.items() if name not in _OF_THE_TRANSPORT}
    n = int(body.get("n") or (body.get("sampling_params") or {}).get("n") or 1)
    record.route = CHAT if "messages" in body else GENERATE if "token_ids" in body else COMPLETIONS
    prompt = body.get("prompt")
    if record.route == COMPLETIONS and _is_batch(prompt):
        if body.get("seed") is not None:
            # each prompt's seed follows from the request's: all of it is sent again
            record.request, record.place = {**request, "n": n}, place
            return
        assert isinstance(prompt, list)
        request["prompt"] = prompt[place // n]
    sampling = dict(body["sampling_params"]) if record.route == GENERATE else request
    sampling.pop("n", None)
    seed, asked = record.choice.get("seed"), sampling.get("seed")
    if seed is None:
        seed = asked
    elif asked is not None and seed != asked and not _is_batch(prompt):
        record.edited = record.edited or f"the request's seed is {asked}, the answer's {seed}"
    if seed is None and (sampling.get("temperature", 1) or 0) > 0:
        record.lacks = "it has no seed, and was not drawn greedily"
        return
    record.index = place % n + int(sampling.get("sample_index") or 0)
    sampling |= {} if seed is None else {"seed": seed}
    if record.index:
        sampling["sample_index"] = record.index
    if record.route == GENERATE:
        request["sampling_params"] = sampling
    model = body.get("model")
    if model is not None and response.get("model") not in (None, model):
        record.edited = record.edited or f"the request asks {model!r}, the answer is of {response['model']!r}"
    record.edited = record.edited or _contradiction(record.choice, response, num_choices)
    record.request = request


def _contradiction(choice: Mapping[str, Any], response: Mapping[str, Any], num_choices: int) -> str:
    """Return what in an answer contradicts itself: its parts were written from the same tokens."""
    ids, usage = choice.get("token_ids"), response.get("usage") or {}
    entries = (choice.get("logprobs") or {}).get("content")
    if ids is not None and entries and entries[0].get("token_id") is not None:
        named = [entry["token_id"] for entry in entries]
        if named != ids and named[-len(ids) :] != ids and named != ids[: len(named)]:
            return "its token_ids are not those of its logprobs"
    count = usage.get("completion_tokens")
    if ids is not None and num_choices == 1 and count is not None and count != len(ids):
        return f"it has {len(ids)} token ids, and its usage counts {count}"
    prompt_ids, prompt_count = choice.get("prompt_token_ids"), usage.get("prompt_tokens")
    if prompt_ids is not None and num_choices == 1 and prompt_count not in (None, len(prompt_ids)):
        return f"its prompt has {len(prompt_ids)} token ids, and its usage counts {prompt_count}"
    return ""


def _is_batch(prompt: object) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)


def _is_note(entry: Any) -> bool:
    """Return whether a journal's line is what somebody noted of a sample: nothing of it was drawn."""
    return isinstance(entry, dict) and "note" in entry and "sample" not in entry


def _of_journal(entry: Any, where: str) -> SampleRecord:
    if not isinstance(entry, dict) or not isinstance(entry.get("sample"), dict):
        return SampleRecord(where, {}, edited="it is no entry of a journal")
    sample = entry["sample"]
    record = SampleRecord(where, sample, index=int(sample.get("index") or 0))
    if entry.get("index") != record.index:
        record.edited = f"entry {entry.get('index')} holds sample {record.index}"
    try:
        record.journal = request_of(entry)
    except (ValueError, TypeError, KeyError) as error:
        record.edited = f"its request cannot be read: {error}"
        return record
    if record.journal is None:
        record.lacks = "it was written by a version that kept no requests in a journal"
    elif record.journal.fingerprint() != entry.get("key"):
        record.edited = record.edited or "its request, prompt included, is not the one that its key names"
    return record
