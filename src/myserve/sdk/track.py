"""One sample as it arrives: chunks in, a checked `SampledCompletion` out. Nothing is ever filled in."""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from typing import Any, TypeVar

from myserve.sdk.errors import AttemptFailed, Failure, SamplingError
from myserve.sdk.request import SampleRequest
from myserve.sdk.types import Alternative, SampledCompletion, SampleDelta
from myserve.sdk.versions import VersionLog

T = TypeVar("T")
Decode = Callable[[list[int]], str]


class Track:
    """The state of sample `index` of a request, over as many attempts as it takes."""

    def __init__(self, request: SampleRequest, index: int) -> None:
        self.request = request
        self.index = index
        self.requests = 0  # HTTP requests that carried it
        self.completion: SampledCompletion | None = None
        self.error: SamplingError | None = None
        self._clear()

    def _clear(self) -> None:
        self.prompt_ids = list(self.request.prompt_token_ids)
        self.ids: list[int] = []
        self.finish_reason: str | None = None
        self._texts: list[str] = []
        self._offsets: list[int] = []  # with echo: where each row's token begins in the text
        self._times: list[float] = []
        self._raw_ids: list[int] | None = None
        self._num_prior = 0  # how many of `ids` came with earlier attempts
        self.logprobs: list[float | None] = []
        self._sampling: list[float | None] = []
        self._tops: list[list[Alternative]] = []
        self._routing: list[str] = []
        self._routing_shape: list[int] | None = None
        self._routing_dtype = "uint8"
        self._kept: list[dict[str, Any]] = []
        self._seed: int | None = None
        self._stop_reason: int | str | None = None
        self._weight_version: int | None = None
        self._versions = VersionLog()

    @property
    def is_done(self) -> bool:
        return self.completion is not None or self.error is not None

    @property
    def is_whole(self) -> bool:
        """True when it has its finish reason and its ids, and needs nothing more of its stream."""
        return self.finish_reason is not None and (self._raw_ids is not None or bool(self.ids))

    def begin(self, *, resume: bool) -> list[int]:
        """Starts an attempt; gives the tokens that it goes on from (none, without `resume`)."""
        self.requests += 1
        # It starts over, as the same sample: with echo, whose prompt rows come again; after a finish reason,
        # where something did not add up; and where all that is missing is the finish reason.
        is_full = len(self.ids) >= self.request.max_tokens
        if not resume or self.request.echo or self.finish_reason is not None or is_full:
            self._clear()
        self._num_prior = len(self.ids)
        self._versions.begin(self._num_prior)
        return self.ids

    def feed(self, choice: dict[str, Any], now: float) -> None:
        """Takes in one chunk's choice. `now`: seconds since the sample was asked for."""
        get = choice.get
        if text := get("text"):
            self._texts.append(text)
        logprobs = get("logprobs")
        row_ids = self._feed_logprobs(logprobs) if logprobs else ()
        ids = get("token_ids")
        if ids is None:
            ids = row_ids
        if ids:
            self.ids += ids
            self._times += [now] * len(ids)
            self._versions.feed(len(self.ids), get("weight_version"))
        if spans := get("weight_version_spans"):
            self._versions.correct(spans)
        if raw := get("raw_output"):
            self._feed_raw(raw)
        if (seed := get("seed")) is not None:
            self._seed = seed
        if (shape := get("routing_matrix_shape")) is not None:
            self._routing_shape = shape
        if (finish_reason := get("finish_reason")) is not None:
            self.finish_reason = finish_reason
            self._stop_reason = get("stop_reason")
            self._weight_version = get("weight_version")

    def delta(self, choice: dict[str, Any], seen_ids: int, seen_rows: int) -> SampleDelta:
        """What `choice`, just fed, brought beyond the first `seen_ids` ids and `seen_rows` logprobs."""
        return SampleDelta(
            self.index,
            choice.get("text") or "",
            tuple(self.ids[seen_ids:]),
            tuple(self.logprobs[seen_rows:]),
            self.finish_reason,
        )

    def _feed_raw(self, raw: dict[str, Any]) -> None:
        completion_ids, prompt_ids = raw.get("completion_token_ids"), raw.get("prompt_token_ids")
        if completion_ids is not None:
            self._raw_ids = completion_ids
        if prompt_ids and not self._num_prior:
            self.prompt_ids = prompt_ids  # the server's own word on what it was asked: it replaces ours

    def _feed_logprobs(self, logprobs: dict[str, Any]) -> list[int]:
        content = logprobs.get("content")
        if content is None:
            return self._feed_older_logprobs(logprobs)
        ids: list[int] = []
        for entry in content:
            self.logprobs.append(entry["logprob"])
            self._sampling.append(entry.get("sampling_logprob"))
            if self.request.echo and "text_offset" in entry:
                self._offsets.append(entry["text_offset"])
            if (token_id := entry.get("token_id")) is not None:
                ids.append(token_id)
            if (tops := entry.get("top_logprobs")) is not None:
                self._tops.append(
                    [Alternative(t.get("token_id"), t["logprob"], t.get("token", "")) for t in tops]
                )
            if (routing := entry.get("routing_matrix")) is not None:
                self._routing.append(routing)
                self._routing_dtype = entry.get("routing_matrix_dtype", "uint8")
            if (kept := entry.get("kept")) is not None:
                self._kept.append(kept)
        return ids

    def _feed_older_logprobs(self, logprobs: dict[str, Any]) -> list[int]:
        """OpenAI's older form, with tokens written as `token_id:7`."""
        values = logprobs.get("token_logprobs") or []
        self.logprobs.extend(values)
        self._sampling.extend(repeat(None, len(values)))
        for row in logprobs.get("top_logprobs") or ():
            self._tops.append([Alternative(_written_id(t), value, t) for t, value in (row or {}).items()])
        ids = [_written_id(token) for token in logprobs.get("tokens") or ()]
        return [token_id for token_id in ids if token_id is not None]

    def complete(self, request_id: str, decode: Decode | None = None) -> SampledCompletion:
        """The finished sample, every length checked; `AttemptFailed` says what does not fit."""
        prompt_ids, ids = self.prompt_ids, self._completion_ids()
        echo = self.request.echo
        if echo and ids[: len(prompt_ids)] == prompt_ids:
            ids = ids[len(prompt_ids) :]
        num_rows = len(prompt_ids) + len(ids) - 1 if echo else len(ids)
        logprobs = self._rows("logprobs", self.logprobs, num_rows) if self.request.logprobs else None
        if logprobs is not None and None in logprobs:
            raise _broken(f"the logprob of row {logprobs.index(None)} is null")
        wants_tops = logprobs is not None and self.request.top_logprobs is not None
        sampling = self._sampling[-len(ids) :] if ids else []
        times = self._times[-len(ids) :] if ids else []
        self.completion = SampledCompletion(
            text=self._completion_text(ids, decode) if echo else "".join(self._texts),
            full_tokens=prompt_ids + ids,
            prompt_len=len(prompt_ids),
            completion_len=len(ids),
            finish_reason=self.finish_reason or "",
            inference_logprobs=logprobs,  # type: ignore[arg-type]  # None was looked for above
            logprobs_echoed=echo and logprobs is not None,
            routing_matrices=self._routing_rows(num_rows, len(ids)),
            routing_shape=self._routing_shape,
            routing_dtype=self._routing_dtype,
            sampling_logprobs=sampling if logprobs is not None and None not in sampling else None,  # type: ignore[arg-type]
            top_logprobs=self._rows("top_logprobs", self._tops, num_rows) if wants_tops else None,
            kept=self._rows("kept sets", self._kept, len(ids)) if self._kept else None,
            index=self.index,
            seed=self._seed if self._seed is not None else self.request.seed,
            stop_reason=self._stop_reason,
            weight_version=self._weight_version,
            weight_version_spans=self._versions.spans(),
            token_times=times if len(times) == len(ids) else None,
            attempts=self.requests,
            request_id=request_id,
        )
        return self.completion

    def _completion_text(self, ids: list[int], decode: Decode | None) -> str:
        """The text without the prompt's, which an echo begins with."""
        if decode is not None:
            return decode(ids)
        text, num_prompt = "".join(self._texts), len(self.prompt_ids)
        if len(self._offsets) >= num_prompt:
            return text[self._offsets[num_prompt] :] if len(self._offsets) > num_prompt else ""
        return text

    def _completion_ids(self) -> list[int]:
        streamed, raw = self.ids, self._raw_ids
        if raw is None:
            if not streamed and "".join(self._texts):
                raise _broken("text came without token ids (raw_output, return_token_ids)")
            return streamed
        if not streamed:
            return raw
        if streamed[self._num_prior :] == raw or streamed == self.prompt_ids + raw or self._is_echo_of(raw):
            return streamed if not self.request.echo else raw
        raise _broken(
            f"{len(streamed) - self._num_prior} streamed token ids are not the {len(raw)} of raw_output"
        )

    def _is_echo_of(self, raw: list[int]) -> bool:
        return self.request.echo and raw == self.prompt_ids + self.ids

    def _rows(self, what: str, rows: list[T], expected: int) -> list[T]:
        """`rows`, if there are as many as tokens. An echo may bring a row for the first prompt token."""
        if self.request.echo and len(rows) == expected + 1:
            return rows[1:]
        if len(rows) != expected:
            raise _broken(f"{len(rows)} rows of {what} for {expected} tokens")
        return rows

    def _routing_rows(self, num_rows: int, completion_len: int) -> list[str] | None:
        if not self.request.include_routing_matrix:
            return None
        if len(self._routing) == completion_len:
            return self._routing  # with echo, the prompt's rows come only where they are asked for
        return self._rows("routing", self._routing, num_rows)


def _alternative(entry: dict[str, Any]) -> Alternative:
    return Alternative(entry.get("token_id"), entry["logprob"], entry.get("token", ""))


def _written_id(token: str) -> int | None:
    digits = token.removeprefix("token_id:")
    return int(digits) if digits != token and digits.isdecimal() else None


def _broken(what: str) -> AttemptFailed:
    return AttemptFailed(Failure("protocol", f"the server's answer does not add up: {what}"))
