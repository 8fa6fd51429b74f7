"""Decides what follows when an attempt ends early: which samples have failed, which are asked for again, and when.

Pure: samples and a failure in, a decision out; `Group` carries it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from myserve.sdk.errors import Failure
from myserve.sdk.retry import RetryPolicy
from myserve.sdk.sampling.sample import Sample
from myserve.sdk.transport.dialects import Dialect

__all__ = ["NextStep", "after_failure", "requests_for"]


@dataclass(frozen=True, slots=True)
class NextStep:
    """The unfinished samples of an attempt: `failed` for good, `again` after `pause` seconds."""

    failed: Sequence[Sample] = ()
    again: Sequence[Sample] = ()
    pause: float = 0.0


def after_failure(samples: Sequence[Sample], failure: Failure, policy: RetryPolicy) -> NextStep:
    """Return what to do with the samples of an attempt that ended with `failure`.

    A sample that was whole before the stream was cut has lost nothing. Each of the others is judged by its own count
    of failures in a row, so one that gained tokens goes on where its sibling, which gained none, is given up.

    >>> from myserve.sdk.request import SampleRequest
    >>> request = SampleRequest(prompt_token_ids=(1,), model="m", seed=7)
    >>> fresh, tired = Sample(request, 0), Sample(request, 1)
    >>> fresh.failures, tired.failures = 1, 3
    >>> step = after_failure([fresh, tired], Failure("transport", "reset"), RetryPolicy(max_attempts=3))
    >>> [sample.index for sample in step.again], [sample.index for sample in step.failed]
    ([0], [1])
    """
    unfinished = [sample for sample in samples if not sample.is_done]
    pauses = [(sample, policy.pause(sample.failures, failure)) for sample in unfinished]
    return NextStep(
        failed=[sample for sample, pause in pauses if pause is None],
        again=[sample for sample, pause in pauses if pause is not None],
        pause=max((pause for _, pause in pauses if pause is not None), default=0.0),
    )


def requests_for(samples: Sequence[Sample], dialect: Dialect) -> list[list[Sample]]:
    """Return the samples of each request: consecutive indices without tokens, as many as the server takes at a time.

    A sample that has tokens goes on alone, and so does every sample where the server draws one a request.

    >>> from myserve.sdk.request import SampleRequest
    >>> from myserve.sdk.transport.dialects import FIREWORKS, MYSERVE
    >>> request = SampleRequest(prompt_token_ids=(1,), model="m", seed=7)
    >>> samples = [Sample(request, index) for index in (0, 1, 2, 5)]
    >>> [[s.index for s in part] for part in requests_for(samples, MYSERVE)]
    [[0, 1, 2], [5]]
    >>> len(requests_for(samples, FIREWORKS)), len(requests_for([Sample(request, i) for i in range(200)], MYSERVE))
    (4, 2)
    """
    parts: list[list[Sample]] = []
    for sample in samples:
        last = parts[-1] if parts else []
        is_next = bool(last) and last[-1].index == sample.index - 1 and not (last[-1].ids or sample.ids)
        if is_next and len(last) < dialect.max_n:
            last.append(sample)
        else:
            parts.append([sample])
    return parts
