"""Thoughts that clients send back carry a checksum of this server, so that a changed one is found."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac

from myserve.errors import RequestError

__all__ = ["opened", "sealed", "signature_of", "signed", "unsealed"]

PREFIX = "myserve1."


def signature_of(thought: str) -> str:
    """Return a thought's checksum. It has no key: it finds what was changed, and proves no author.

    So it is good on every replica, and after a restart.

    >>> signature_of("Hm.") == signature_of("Hm."), signature_of("Hm.") == signature_of("Hm")
    (True, False)
    """
    return PREFIX + hashlib.blake2b(thought.encode("utf-8", "surrogatepass"), digest_size=24).hexdigest()


def signed(thought: str, signature: str, *, param: str) -> str:
    """Return a thought that came back with its signature. Raises RequestError where one of the two was changed."""
    if not hmac.compare_digest(signature_of(thought).encode(), signature.encode("utf-8", "replace")):
        raise RequestError(
            f"{param} does not belong to this thought: send thoughts and their signatures back as they came, or leave "
            "them out",
            param=param,
            code="invalid_signature",
        )
    return thought


def sealed(thought: str) -> str:
    """Return a thought as one opaque string, for clients that send nothing else of it back.

    >>> opened(sealed("Hm."), param="x")
    'Hm.'
    """
    text = base64.urlsafe_b64encode(thought.encode("utf-8", "surrogatepass")).decode()
    return f"{signature_of(thought)}.{text}"


def opened(seal: str, *, param: str) -> str | None:
    """Return the thought that was sealed; None for a seal of another server. Raises RequestError for a changed one."""
    if not seal.startswith(PREFIX):
        return None
    signature, _, text = seal.rpartition(".")
    try:
        thought = base64.urlsafe_b64decode(text.encode()).decode("utf-8", "surrogatepass")
    except (binascii.Error, ValueError):
        thought = ""
    return signed(thought, signature, param=param)


def unsealed(thought: str, signature: str, *, param: str) -> str:
    """Return a thought that came back with its signature, or sealed inside of it. Raises RequestError."""
    if not thought and (said := opened(signature, param=param) if signature.count(".") > 1 else None):
        return said
    return signed(thought, signature, param=param)
