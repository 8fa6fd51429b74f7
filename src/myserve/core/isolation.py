"""An error that belongs to one row of a batch fails that row alone: what counts as one, and what its caller is told."""

from __future__ import annotations

import logging

import torch

from myserve.errors import MyserveError, RequestFailedError

__all__ = ["failure_of", "raise_if_of_the_device"]

logger = logging.getLogger("myserve.engine")


def failure_of(error: Exception, doing: str) -> Exception:
    """Return the error that a request ends with; `doing` completes "an error inside while ...".

    Errors raised on purpose have words for the caller. Of the others the caller learns the type, and the log the rest.

    >>> str(failure_of(KeyError("secret"), "drawing its next token"))
    'an error inside while drawing its next token (KeyError); this request alone has failed'
    """
    if isinstance(error, MyserveError):
        return error
    logger.error("one request failed while %s", doing, exc_info=error)
    # a new error, not the old one's traceback: its frames would keep a step's tensors alive
    return RequestFailedError(
        f"an error inside while {doing} ({type(error).__name__}); this request alone has failed"
    )


def raise_if_of_the_device(error: Exception) -> None:
    """Raise `error` again if the accelerator reports it: then no later step can be trusted, whichever row it was."""
    if isinstance(error, torch.AcceleratorError):
        raise error
