"""One sample as it arrives: chunks in, a checked `SampledCompletion` out. Nothing is ever filled in.

Nothing that a server sends is taken on trust: every length, id, seed, logprob and span is checked against the request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

from myserve.sdk.errors import AttemptFailed, Failure, SamplingError
from myserve.sdk.request import SampleRequest
from myserve.sdk.retry import TOKENS_OF_PROGRESS
from myserve.sdk.sampling.bounds import max_rows
from myserve.sdk.sampling.versions import VersionLog
from myserve.sdk.transport.chunks import ChoiceChunk, RawOutputChunk, TokenEntry
from myserve.sdk.types import LOGPROB_ROUNDING, Alternative, SampledCompletion, SampleDelta

__all__ = ["Decode", "Sample"]

T = TypeVar("T")
Decode = Callable[[list[int]], str]


class Sample:
    """The state of sample `index` of a request, over as many attempts as it takes."""

    def __init__(self, request: SampleRequest, index: int) -> None:
        self.request = request
        self.index = index
        self.requests = 0  # HTTP requests that carried it
        self.failures = 0  # attempts in a row that left too few new tokens
        self.last_failure: Failure | None = None
        self.completion: SampledCompletion | None = None
        self.error: SamplingError | None = None
        self._prompt_ids = list(request.prompt_token_ids)
        self._max_rows = max_rows(request)
        self._expected_seed: int | None = None
        self._clear()

    def _clear(self) -> None:
        self.ids: list[int] = []
        self.finish_reason: str | None = None
        self._texts: list[str] = []
        # as they came: columns are taken from them once, at the end
        self._entries: list[TokenEntry] = []
        self._now: float | None = None  # when the newest ids came
        # (number of ids before, seconds) of each read that had some
        self._arrivals: list[tuple[int, float]] = []
        self._raw_ids: list[int] | None = None
        self._num_prior = 0  # how many of `ids` came with earlier attempts
        self._routing_shape: list[int] | None = None
        self._seed: int | None = None
        self._stop_reason: int | str | None = None
        self._weight_version: int | None = None
        # of the newest ids, which `_versions` does not have yet
        self._version: int | None = None
        self._versions = VersionLog()

    @property
    def is_done(self) -> bool:
        """Return whether it has its completion, or has failed for good."""
        return self.completion is not None or self.error is not None

    @property
    def is_whole(self) -> bool:
        """Return whether it has its finish reason and its ids, and needs nothing more of its stream."""
        return self.finish_reason is not None and (self._raw_ids is not None or bool(self.ids))

    def begin(self, *, seed: int, resume: bool) -> list[int]:
        """Start an attempt with `seed`; return the tokens that it goes on from (none, without `resume`)."""
        self.requests += 1
        self._expected_seed = seed
        if self.requests > 1 and not (resume and self._can_resume):
            self._clear()
        self._num_prior = len(self.ids)
        self._versions.feed(self._num_prior, self._version)
        self._versions.begin(self._num_prior)
        return self.ids

    @property
    def _can_resume(self) -> bool:
        # It starts over, as the same sample: with echo, whose prompt rows come again; after a finish reason, where
        # something did not add up; and where all that is missing is the finish reason.
        is_full = len(self.ids) >= self.request.max_tokens
        return not self.request.echo and self.finish_reason is None and not is_full

    def count_failure(self, failure: Failure, *, resumes: bool) -> None:
        """Note that an attempt ended early. `resumes`: the server takes up a sample where it was cut."""
        if self.is_done:
            return
        self.last_failure = failure
        gained = len(self.ids) - self._num_prior if resumes and self._can_resume else 0
        self.failures = 1 if gained >= TOKENS_OF_PROGRESS else self.failures + 1

    def revive(self) -> None:
        """Forget that it failed, to be asked for once more."""
        self.error, self.failures = None, 0

    def deadline_failure(self, timeout: float) -> Failure:
        """Return why a call that had `timeout` seconds ended without this sample: how far it was, and what held it."""
        last = self.last_failure
        message = (
            f"{timeout:g} s were not enough; it had {len(self.ids)} of up to {self.request.max_tokens} tokens"
        )
        if last is not None:
            status = "" if last.status is None else f"HTTP {last.status}: "
            message += f"; its last attempt ended with: {status}{last.message}"
        return Failure("deadline", message, None if last is None else last.status)

    def feed(self, choice: ChoiceChunk, now: float) -> bool:
        """Take in one chunk's choice; return whether it brought anything. `now`: seconds since the group began.

        Raises `AttemptFailed` for what cannot belong to this request.
        """
        if self.completion is not None or self.error is not None:
            return self._feed_after_end(choice)
        ids = choice.token_ids if choice.token_ids is not None else choice.ids()
        if choice.text:
            self._texts.append(choice.text)
        if (logprobs := choice.logprobs) is not None:
            self._entries += logprobs.entries()
            if len(self._entries) > self._max_rows:
                raise self._overflow()
        if ids:
            if now != self._now:
                self._now = now
                self._arrivals.append((len(self.ids), now))
            if choice.weight_version != self._version:
                self._versions.feed(len(self.ids), self._version)
                self._version = choice.weight_version
            self.ids += ids
            if len(self.ids) > self._max_rows:
                raise self._overflow()
        if choice.weight_version_spans is not None:
            self._versions.feed(len(self.ids), self._version)
            if not self._versions.correct(choice.weight_version_spans):
                raise _broken("its weight_version_spans lie outside of its tokens")
        if choice.raw_output is not None:
            self._feed_raw(choice.raw_output)
        if choice.seed is not None:
            self._feed_seed(choice.seed)
        if choice.routing_matrix_shape is not None:
            self._routing_shape = choice.routing_matrix_shape
        if choice.finish_reason is not None:
            self.finish_reason = choice.finish_reason
            self._stop_reason = choice.stop_reason
            self._weight_version = choice.weight_version
        return bool(ids or choice.text or choice.finish_reason is not None)

    def _feed_after_end(self, choice: ChoiceChunk) -> bool:
        if choice.text or choice.ids():
            raise _broken(f"tokens for sample {self.index} came after its finish reason")
        return False

    def _overflow(self) -> AttemptFailed:
        # The text without ids is bounded by the stream's bytes: bounds.max_stream_bytes.
        rows = max(len(self.ids), len(self._entries))
        return _broken(f"{rows} tokens came, and max_tokens is {self.request.max_tokens}")

    def _feed_raw(self, raw: RawOutputChunk) -> None:
        if raw.completion_token_ids is not None:
            self._raw_ids = raw.completion_token_ids
        sent = self._prompt_ids + self.ids[: self._num_prior]
        if raw.prompt_token_ids and raw.prompt_token_ids != sent:
            raise _mismatch(
                f"its prompt_token_ids are not those that were sent: {_difference(raw.prompt_token_ids, sent)}"
            )

    def _feed_seed(self, seed: int) -> None:
        if self._expected_seed is not None and seed != self._expected_seed:
            raise _mismatch(
                f"sample {self.index} was drawn with seed {seed}, and {self._expected_seed} was sent"
            )
        self._seed = seed

    def delta(self, choice: ChoiceChunk) -> SampleDelta:
        """Return what `choice` brings, as the caller sees it."""
        entries = choice.logprobs.entries() if choice.logprobs is not None else ()
        return SampleDelta(
            self.index,
            choice.text or "",
            tuple(choice.ids()),
            tuple([entry.logprob for entry in entries]),
            self.finish_reason,
        )

    def complete(self, request_id: str, decode: Decode | None = None) -> SampledCompletion:
        """Return the finished sample, everything checked; `AttemptFailed` says what does not fit."""
        prompt_ids, ids = self._prompt_ids, self._completion_ids()
        echo = self.request.echo
        if echo and ids[: len(prompt_ids)] == prompt_ids:
            ids = ids[len(prompt_ids) :]
        if len(ids) > self.request.max_tokens:
            raise _broken(f"{len(ids)} tokens came, and max_tokens is {self.request.max_tokens}")
        num_rows = len(prompt_ids) + len(ids) - 1 if echo else len(ids)
        entries = self._entries
        logprobs = self._logprobs(num_rows) if self.request.logprobs else None
        sampling = [entry.sampling_logprob for entry in entries[-len(ids) :]] if ids else []
        if entries:
            self._check_entries(ids, sampling)
        kept = [entry.kept for entry in entries if entry.kept is not None]
        self._versions.feed(len(self.ids), self._version)
        self.completion = SampledCompletion(
            text=self._completion_text(ids, decode) if self.request.sends_echo else "".join(self._texts),
            full_tokens=prompt_ids + ids,
            prompt_len=len(prompt_ids),
            completion_len=len(ids),
            finish_reason=self.finish_reason or "",
            inference_logprobs=logprobs,
            logprobs_echoed=echo and logprobs is not None,
            routing_matrices=self._routing_rows(num_rows, len(ids)),
            routing_shape=self._routing_shape,
            routing_dtype=entries[-1].routing_matrix_dtype if entries else "uint8",
            sampling_logprobs=sampling if logprobs is not None and None not in sampling else None,  # type: ignore[arg-type]
            top_logprobs=self._alternatives(num_rows) if logprobs is not None else None,
            kept=self._rows("kept sets", kept, len(ids)) if kept else None,
            index=self.index,
            seed=self._seed if self._seed is not None else self.request.seed,
            stop_reason=self._stop_reason,
            weight_version=self._weight_version,
            weight_version_spans=self._versions.spans(),
            token_times=self._token_times(len(ids)),
            attempts=self.requests,
            request_id=request_id,
        )
        return self.completion

    def _check_entries(self, ids: list[int], sampling: list[float | None]) -> None:
        """Raise for entries of other tokens than `ids`, and for logprobs above 0. Lists, for this is a token's cost."""
        entries = self._entries
        named = [entry.token_id for entry in entries[-len(ids) :]] if ids else []
        if named != ids and len(named) == len(ids) and None not in named:
            raise _broken("its logprobs are of other tokens than its ids")
        values = [*[entry.logprob for entry in entries], *sampling]
        if None in values:
            values = [value for value in values if value is not None]
        if self.request.top_logprobs is not None:
            values += [top.logprob for entry in entries for top in entry.top_logprobs or ()]
        if values and max(values) > LOGPROB_ROUNDING:  # type: ignore[type-var,operator]  # no None is left
            raise _broken("a logprob is above 0")

    def _logprobs(self, num_rows: int) -> list[float]:
        rows = self._rows("logprobs", [entry.logprob for entry in self._entries], num_rows)
        if None in rows:
            raise _broken(f"the logprob of row {rows.index(None)} is null")
        return rows  # type: ignore[return-value]  # None was looked for

    def _alternatives(self, num_rows: int) -> list[tuple[Alternative, ...]] | None:
        if self.request.top_logprobs is None:
            return None
        rows = [entry.top_logprobs for entry in self._entries if entry.top_logprobs is not None]
        return self._rows("top_logprobs", rows, num_rows)

    def _token_times(self, num_ids: int) -> list[float] | None:
        """Return the arrival of the last `num_ids` tokens, [C]; None where some were not streamed."""
        times: list[float] = []
        for (first, now), (end, _) in pairwise([*self._arrivals, (len(self.ids), 0.0)]):
            times += [now] * (end - first)
        return times[-num_ids:] if 0 < num_ids <= len(times) else None if num_ids else []

    def _completion_text(self, ids: list[int], decode: Decode | None) -> str:
        """Return the text without the prompt's, which an echo begins with.

        The server's own offsets say where it begins; a tokenizer decodes the ids where there are none.
        """
        text = "".join(self._texts)
        offsets = [entry.text_offset for entry in self._entries if entry.text_offset is not None]
        if len(offsets) == len(self._entries) and len(offsets) > len(ids):
            return text[offsets[-len(ids)] :] if ids else ""
        return decode(ids) if decode is not None else text

    def _completion_ids(self) -> list[int]:
        streamed, raw = self.ids, self._raw_ids
        if raw is None:
            if not streamed and "".join(self._texts):
                raise _broken("text came without token ids (raw_output, return_token_ids)")
            return streamed
        if not streamed:
            return raw
        if streamed[self._num_prior :] == raw or streamed == self._prompt_ids + raw or self._is_echo_of(raw):
            return streamed if not self.request.echo else raw
        raise _broken(
            f"{len(streamed) - self._num_prior} streamed token ids are not the {len(raw)} of raw_output"
        )

    def _is_echo_of(self, raw: list[int]) -> bool:
        return self.request.echo and raw == self._prompt_ids + self.ids

    def _rows(self, what: str, rows: list[T], expected: int) -> list[T]:
        """Return `rows`, if there are as many as tokens. An echo may bring a row for the first prompt token."""
        if self.request.echo and len(rows) == expected + 1:
            return rows[1:]
        if len(rows) != expected:
            raise _broken(f"{len(rows)} rows of {what} for {expected} tokens")
        return rows

    def _routing_rows(self, num_rows: int, completion_len: int) -> list[str] | None:
        if not self.request.include_routing_matrix:
            return None
        routing = [entry.routing_matrix for entry in self._entries if entry.routing_matrix is not None]
        if len(routing) == completion_len:
            return routing  # with echo, the prompt's rows come only where they are asked for
        return self._rows("routing", routing, num_rows)


def _difference(got: Sequence[int], sent: Sequence[int]) -> str:
    if len(got) != len(sent):
        return f"{len(got)} ids came for {len(sent)}"
    place = next(i for i, (one, other) in enumerate(zip(got, sent, strict=True)) if one != other)
    return f"id {place} is {got[place]}, and {sent[place]} was sent"


def _broken(what: str) -> AttemptFailed:
    return AttemptFailed(Failure("protocol", f"the server's answer does not add up: {what}"))


def _mismatch(what: str) -> AttemptFailed:
    return AttemptFailed(Failure("mismatch", what))
