"""Admission of a request by its head, before a route is looked up or a byte of the body is read."""

from __future__ import annotations

from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from myserve.errors import RequestError
from myserve.server import caller
from myserve.server.edge.hosts import AllowedHosts
from myserve.server.edge.keys import KeyFile
from myserve.server.errors import ForbiddenError, UnauthorizedError, error_response
from myserve.server.observe import logs
from myserve.server.settings import Settings
from myserve.wire.dialects.paths import ADMIN_PATHS, LIVENESS, TINKER_HEALTH
from myserve.wire.weights import HOT_LOAD, WEIGHTS

__all__ = ["Access", "AccessControl"]

# probes have no keys, and learn nothing else; the page asks for one
OPEN = frozenset({"/", "/health", "/healthz", "/ready", LIVENESS, TINKER_HEALTH})
PAGE_FILES = "/inspector/"  # as `server.pages` has them
# what changes the server for everyone
ADMIN = frozenset({("POST", WEIGHTS), ("POST", HOT_LOAD)})


@dataclass(frozen=True, slots=True)
class Access:
    """The rules of access: the Host and Origin headers, then keys.

    Without key files everyone may do everything; with keys and no admin keys the weights cannot be changed. An admin
    key is good for everything, so that a trainer needs one key.
    """

    keys: KeyFile | None = None
    admin_keys: KeyFile | None = None
    origins: tuple[str, ...] = ()
    hosts: AllowedHosts = field(default_factory=AllowedHosts)

    @classmethod
    def of(cls, settings: Settings) -> Access:
        """Return the settings' rules. Raises RequestError for a file without keys."""
        keys, admin = settings.api_keys_file, settings.admin_keys_file
        hosts = AllowedHosts(settings.allowed_hosts, listening_on=settings.host)
        return cls(
            KeyFile(keys) if keys else None, KeyFile(admin) if admin else None, settings.cors_origins, hosts
        )

    def check(self, method: str, path: str, headers: Headers, reached: str | None = None) -> None:
        """Raise UnauthorizedError for a key that is missing or wrong, ForbiddenError for what may not be done.

        `reached` is the address or name that the connection came to; None where the Host need not be checked.
        """
        if reached is not None:
            self._check_host(headers, reached)
        self._check_origin(headers)
        if path in OPEN or path.startswith(PAGE_FILES):
            return
        admin = self._owner(self.admin_keys, headers)
        user = self._owner(self.keys, headers)
        if (owner := admin or user) is not None:
            logs.note(key=owner)
            caller.name_it(owner)
        is_admin_route = (method, path) in ADMIN or path in ADMIN_PATHS
        if self.keys is not None and owner is None:
            raise UnauthorizedError(
                "a key is needed: send it as 'Authorization: Bearer KEY', or as X-Api-Key"
            )
        if is_admin_route and admin is None and (self.keys or self.admin_keys) is not None:
            if user is None:
                raise UnauthorizedError("an admin key is needed: send it as 'Authorization: Bearer KEY'")
            raise ForbiddenError("this key may not change weights; send one of --admin-keys-file")

    def _check_host(self, headers: Headers, reached: str) -> None:
        """Refuse a name that is not ours: a page may rebind its own name to our address, and is same-origin then."""
        host = headers.get("host")
        if host is not None and not self.hosts.allows(host, reached):
            raise ForbiddenError(
                f"this server does not answer to the name {host[:100]!r}; the operator's --allowed-hosts lets it"
            )

    def _check_origin(self, headers: Headers) -> None:
        """Refuse a page that was not named: CORS alone hides the answer, and the request would have had its effect."""
        origin = headers.get("origin")
        if origin is None or "*" in self.origins or origin in self.origins:
            return
        # split by hand: a header that is no URL must be refused, not raise
        if origin.partition("://")[2].lower() != headers.get("host", "").lower():
            raise ForbiddenError(
                "pages of this origin may not use this server; the operator's --cors-origin lets them"
            )

    @staticmethod
    def _owner(keys: KeyFile | None, headers: Headers) -> str | None:
        """Return the owner of the key that was sent: clients of Anthropic's API may send both headers, and two keys."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        sent = (token.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", ""))
        if keys is None:
            return None
        return next((owner for key in sent if key and (owner := keys.owner(key)) is not None), None)


class AccessControl:
    """The middleware that asks `Access`."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                headers = Headers(scope=scope)
                _check_framing(headers)
                self._access.check(scope["method"], scope["path"], headers, _reached(scope))
            except AmbiguousFramingError as error:
                response = error_response(error, scope["path"])
                # what follows on the connection may be the rest of this body, or a request that somebody hid in it
                response.headers["connection"] = "close"
                await response(scope, receive, send)
                return
            except (UnauthorizedError, ForbiddenError) as error:
                await error_response(error, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


class AmbiguousFramingError(RequestError):
    """A request has two ends, by its length and by its chunks: a proxy may have read another than this server."""


def _check_framing(headers: Headers) -> None:
    if "transfer-encoding" in headers and "content-length" in headers:
        raise AmbiguousFramingError("the request has both Content-Length and Transfer-Encoding: send one")


def _reached(scope: Scope) -> str | None:
    """Return the address or name that a connection came to; None for HTTP/1.0.

    No browser speaks HTTP/1.0, so no page is behind it; nginx does by default, with a Host of its own.
    """
    if scope["http_version"] == "1.0":
        return None
    server = scope.get("server")
    return server[0] if server else ""
