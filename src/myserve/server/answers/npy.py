"""Arrays of an answer as base64: a whole sequence's experts, and the logprobs of ids that a teacher was asked for."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from myserve.engine.outputs import PromptLogprob, RoutingShape
from myserve.server.choice import Choice

__all__ = ["as_int32", "as_npy", "int32_base64", "named_matrix", "routed_rows"]


def routed_rows(choice: Choice, shape: RoutingShape, start: int = 0) -> np.ndarray[Any, Any] | None:
    """Return the experts [P + C - 1 - start, layers, k] of each position but the last, which was not run.

    None where they are not known: routing was not asked for, or the prompt's positions were not run (its prefix was
    cached). The pass at a position gives the next token, so it stands with that.
    """
    scored = choice.prompt_logprobs
    if scored is None:
        return None
    rows = [token.routed_experts for token in scored[1:]]
    rows += [token.routed_experts for token in choice.sampled]
    if any(row is None for row in rows):
        return None
    return shape.array([row for row in rows[start:] if row is not None])


def named_matrix(scored: Sequence[PromptLogprob]) -> str:
    """Return vLLM's `prompt_token_id_logprobs` of the tokens that were scored: -inf where an id has no probability."""
    rows = [
        [-math.inf if value is None else value for _, value in token.token_id_logprobs] for token in scored
    ]
    return as_npy(np.asarray(rows, np.float32).reshape(len(rows), -1 if rows else 0))


def as_npy(rows: np.ndarray[Any, Any]) -> str:
    """Return an array as base64 of a .npy file: vLLM's `routed_experts`."""
    buffer = io.BytesIO()
    np.save(buffer, rows)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def as_int32(rows: np.ndarray[Any, Any]) -> str:
    """Return an array as base64 of int32, little-endian: SGLang's `routed_experts`."""
    return base64.b64encode(rows.astype("<i4").tobytes()).decode("ascii")


def int32_base64(numbers: list[int]) -> str:
    """Return numbers as base64 of int32, little-endian.

    >>> int32_base64([1, 256])
    'AQAAAAABAAA='
    """
    return as_int32(np.asarray(numbers, "<i4"))
