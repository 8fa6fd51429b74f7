"""Exceptions by whose fault they are: `RequestError` is the caller's, `EngineError` is ours.

Nothing here knows HTTP: `server/errors.py` turns these into status codes.
"""

from __future__ import annotations

__all__ = [
    "BadAdapterError",
    "BadSnapshotError",
    "ConstraintError",
    "ContextLengthError",
    "EngineDeadError",
    "EngineError",
    "ModelNotFoundError",
    "MyserveError",
    "NonFiniteLogitsError",
    "NotEnoughMemoryError",
    "OverloadedError",
    "RequestError",
    "RequestFailedError",
    "UnsupportedModelError",
    "WeightsLoadingError",
]


class MyserveError(Exception):
    """The root of every error that myserve raises on purpose."""


class RequestError(MyserveError, ValueError):
    """The caller asked for something that cannot be done as asked.

    `param` names the field at fault, `code` is a stable machine-readable word.

    >>> raise RequestError("temperature must be in [0, 100], got -1", param="temperature")
    Traceback (most recent call last):
    ...
    myserve.errors.RequestError: temperature must be in [0, 100], got -1
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class ContextLengthError(RequestError):
    """The prompt, or the prompt and `max_tokens`, do not fit the model's context."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class ModelNotFoundError(RequestError):
    """The request names a model that this server does not serve."""

    def __init__(self, message: str) -> None:
        super().__init__(message, param="model", code="model_not_found")


class ConstraintError(RequestError):
    """A request's own constraints leave it no token to draw. It fails; its batch goes on."""


class UnsupportedModelError(RequestError):
    """A model that the engine cannot run exactly, and why."""


class BadCheckpointError(UnsupportedModelError):
    """A checkpoint that does not give every weight of its model, or gives more; nothing is served."""


class BadSnapshotError(RequestError):
    """Weights that cannot become this model's. Nothing was changed, and the old ones go on serving."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, code="bad_snapshot")


class BadAdapterError(RequestError):
    """An adapter that cannot be this model's, or is of a kind that is not served. Nothing was changed."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, code="bad_adapter")


class EngineError(MyserveError, RuntimeError):
    """Something of ours failed; the request was fine."""


class NonFiniteLogitsError(EngineError):
    """The model gave NaN or +inf logits for one row. That row fails; its batch goes on."""


class RequestFailedError(EngineError):
    """Something of ours failed for one request. It fails; its batch goes on."""


class OverloadedError(EngineError):
    """The queue is full. `retry_after` is in seconds."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotEnoughMemoryError(EngineError):
    """A model does not fit into memory, or new weights not beside the old ones, which go on serving."""


class WeightsLoadingError(EngineError):
    """New weights are about to be swapped in, and their update refuses new requests meanwhile. Try again soon."""

    retry_after = 1.0  # seconds


class EngineDeadError(EngineError):
    """The engine's thread has died; nothing more can be served until it restarts."""
