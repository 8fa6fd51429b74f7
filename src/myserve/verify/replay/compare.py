"""Compares a record with the choice drawn again, and names the first token that differs and the likely cause.

The cause is found by scoring: the recorded tokens, sent as a prompt, have the recorded logprobs wherever weights and
arithmetic are those of the record. What then differs came from parameters or from an editor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from myserve.sdk.errors import SamplingError
from myserve.verify.replay.outcome import differences, first_different_token, token_ids_of
from myserve.verify.replay.records import SampleRecord
from myserve.verify.replay.redraw import OF_AN_ATTEMPT, ReplayServer
from myserve.verify.subject import RefusedError

__all__ = ["ReplayResult", "replay_record"]

Verdict = Literal["identical", "differs", "edited", "cannot"]
# Logprobs further apart than rounding makes them: other weights, not another order of summation.
_ROUNDING = 0.05


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """Hold what came of one record on one server.

    `edited`: the record contradicts itself, whatever a server draws. `cannot`: it lacks something, or was refused.
    """

    source: str
    url: str
    verdict: Verdict
    num_tokens: int = 0
    token: int | None = None  # the first that differs, counted from 0
    margin: float | None = None  # nats by which the token drawn again is likelier than the recorded one
    what: str = ""
    cause: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


async def replay_record(record: SampleRecord, server: ReplayServer) -> ReplayResult:
    """Draw a record again and compare. Raises `AttemptFailed` where the server does not answer."""
    recorded = {name: value for name, value in record.choice.items() if name not in OF_AN_ATTEMPT}
    ids = token_ids_of(recorded) or []
    if record.edited:
        return ReplayResult(
            record.source, server.url, "edited", len(ids), what=record.edited, cause="the record"
        )
    if record.lacks:
        return ReplayResult(record.source, server.url, "cannot", len(ids), what=record.lacks)
    try:
        drawn, fingerprint = await server.draw(record)
    except (RefusedError, SamplingError) as error:
        return ReplayResult(
            record.source, server.url, "cannot", len(ids), what=f"the server refused: {error}"
        )
    found = differences(recorded, drawn)
    if not found:
        return ReplayResult(record.source, server.url, "identical", len(token_ids_of(drawn) or []))
    return await _explained(record, server, recorded, drawn, found, fingerprint)


async def _explained(
    record: SampleRecord,
    server: ReplayServer,
    recorded: Mapping[str, Any],
    drawn: Mapping[str, Any],
    found: Sequence[str],
    fingerprint: str | None,
) -> ReplayResult:
    ids, again = token_ids_of(recorded), token_ids_of(drawn)
    token = first_different_token(ids, again) if ids is not None and again is not None else None
    scored = await _scores(record, server, recorded, ids)
    margin = _margin(recorded, drawn, again, token, scored)
    what = found[0] if token is None else _token_words(token, ids or [], again or [])
    cause = _cause(record, server, recorded, drawn, scored, fingerprint)
    return ReplayResult(record.source, server.url, "differs", len(ids or []), token, margin, what, cause)


def _token_words(token: int, ids: Sequence[int], again: Sequence[int]) -> str:
    here = [str(one[token]) if token < len(one) else "the end" for one in (ids, again)]
    return f"token {token}: recorded {here[0]}, drawn {here[1]}"


async def _scores(
    record: SampleRecord, server: ReplayServer, recorded: Mapping[str, Any], ids: Sequence[int] | None
) -> list[float] | None:
    """Return the raw logprobs that the server gives the recorded tokens; None where there are no ids to send."""
    prompt = _prompt_ids(record, recorded)
    if not prompt or not ids or not all(isinstance(one, int) and one >= 0 for one in [*prompt, *ids]):
        return None
    model = record.journal.model if record.journal else str((record.request or {}).get("model", ""))
    scores = await server.score(model, [*prompt, *ids])
    return None if scores is None else scores[len(prompt) - 1 :]


def _prompt_ids(record: SampleRecord, recorded: Mapping[str, Any]) -> list[int] | None:
    if record.journal is not None:
        return list(record.journal.prompt_token_ids)
    request = record.request or {}
    for ids in (recorded.get("prompt_token_ids"), request.get("prompt"), request.get("token_ids")):
        if isinstance(ids, list) and ids and isinstance(ids[0], int):
            return ids
    ids = (recorded.get("raw_output") or {}).get("prompt_token_ids")
    return ids if isinstance(ids, list) else None


def _logprobs(choice: Mapping[str, Any]) -> list[float | None] | None:
    """Return the raw logprobs of the completion's tokens, as an answer or a journal reports them."""
    if isinstance(choice.get("inference_logprobs"), list):
        values = choice["inference_logprobs"]
        return list(values[-int(choice.get("completion_len") or len(values)) :])
    logprobs = choice.get("logprobs") or {}
    if isinstance(logprobs.get("content"), list):
        return [entry.get("logprob") for entry in logprobs["content"]]
    return logprobs.get("token_logprobs")


def _margin(
    recorded: Mapping[str, Any],
    drawn: Mapping[str, Any],
    again: Sequence[int] | None,
    token: int | None,
    scored: Sequence[float] | None,
) -> float | None:
    """Return by how much the token drawn again is likelier than the recorded one, at the same place."""
    values = _logprobs(drawn)
    if token is None or scored is None or values is None or not token < min(len(scored), len(values)):
        return None
    value = values[token]
    return None if value is None else value - scored[token]


def _cause(
    record: SampleRecord,
    server: ReplayServer,
    recorded: Mapping[str, Any],
    drawn: Mapping[str, Any],
    scored: Sequence[float] | None,
    fingerprint: str | None,
) -> str:
    prompts = [one.get("prompt_token_ids") for one in (recorded, drawn)]
    if None not in prompts and prompts[0] != prompts[1]:
        return "the prompt: another chat template or tokenizer, or an edited prompt"
    versions = [one.get("weight_version") for one in (recorded, drawn)]
    if versions[0] != versions[1] and versions[0] is not None:
        return f"weights: version {versions[0]} was recorded, {versions[1]} is served{_arithmetic(record, server)}"
    values = _logprobs(recorded)
    if scored is None or values is None or len(values) != len(scored):
        if fingerprint is not None and record.fingerprint not in (None, fingerprint):
            return f"another build, model, settings or weights: fingerprint {record.fingerprint}, here {fingerprint}"
        return "not known: without ids and logprobs in the record its tokens cannot be scored"
    gaps = [abs(a - b) for a, b in zip(values, scored, strict=True) if a is not None]
    wrong = [place for place, gap in enumerate(gaps) if gap > 0]
    if not wrong:
        return "parameters, or an edited record: weights and arithmetic agree, to the bit, on every recorded token"
    if max(gaps) <= _ROUNDING:
        why = "arithmetic: another kind of CPU, or version of the package or PyTorch"
        return f"{why}; logprobs differ by {max(gaps):.2g}{_arithmetic(record, server)}"
    if wrong[0] > 0 or len(wrong) < len(gaps):
        return f"an edited record: its logprobs are the server's up to token {wrong[0]}"
    return (
        f"weights: the recorded tokens' logprobs differ by up to {max(gaps):.2g}{_arithmetic(record, server)}"
    )


def _arithmetic(record: SampleRecord, server: ReplayServer) -> str:
    """Return what the record says of its server and is otherwise here, in words; "" where it says nothing."""
    changed = [
        f"{name} {record.server[name]} there, {server.version.get(name)} here"
        for name in ("version", "torch", "transformers", "exact", "quantization")
        if name in record.server and record.server[name] != server.version.get(name)
    ]
    return f" ({'; '.join(changed)})" if changed else ""
