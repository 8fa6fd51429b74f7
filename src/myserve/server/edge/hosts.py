"""A request's Host must be this server's: a page whose name was rebound to our address brings its own."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

__all__ = ["AllowedHosts", "host_of"]


class AllowedHosts:
    """The names that are this server's.

    Always allowed: localhost, the machine's own name, the address or name that the server listens on, and every
    address written as one, which no name server can rebind. `*` among the names allows all, `.example.com` what is
    below it.

    >>> hosts = AllowedHosts(["api.example.com", ".internal"])
    >>> [hosts.allows(host) for host in ("localhost:8000", "[::1]:80", "API.example.com", "a.internal", "evil.example")]
    [True, True, True, True, False]
    """

    def __init__(self, names: Iterable[str] = (), *, listening_on: str = "") -> None:
        given = {name.lower().rstrip(".") for name in names}
        own = socket.gethostname().lower()
        self._all = "*" in given
        self._suffixes = tuple(name for name in given if name.startswith("."))
        self._names = given | {"localhost", own, own.partition(".")[0], listening_on.lower()}

    def allows(self, header: str, reached: str = "") -> bool:
        """Return whether a Host header is ours; `reached` is the address or name that the connection came to."""
        if self._all:
            return True
        name = host_of(header)
        if name is None:
            return False
        is_name = (
            name in self._names or name == reached.lower() or name.endswith((*self._suffixes, ".localhost"))
        )
        return is_name or _is_address(name)


def host_of(header: str) -> str | None:
    """Return a Host header's name or address, without its port; None where it is neither.

    >>> host_of("[::1]:8000"), host_of("Example.com."), host_of("a@b"), host_of("[")
    ('::1', 'example.com', None, None)
    """
    try:
        parts = urlsplit(f"//{header}")
        # reading the port checks it
        has_more = (
            parts.username is not None or parts.path or parts.query or parts.fragment or (parts.port or 0) < 0
        )
    except ValueError:
        return None
    return None if has_more or not parts.hostname else parts.hostname.rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True
