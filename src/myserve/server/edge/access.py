"""Who may ask for what: decided before a route is looked up or a byte of the body is read."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from myserve.server import caller
from myserve.server.edge.keys import KeyFile
from myserve.server.errors import ForbiddenError, UnauthorizedError, error_response
from myserve.server.observe import logs
from myserve.server.settings import Settings
from myserve.wire.weights import HOT_LOAD, WEIGHTS

OPEN = frozenset({"/health", "/healthz", "/ready"})  # probes have no keys, and learn nothing else
ADMIN = frozenset({("POST", WEIGHTS), ("POST", HOT_LOAD)})  # what changes the server for everyone


@dataclass(frozen=True, slots=True)
class Access:
    """The rules. Without key files everyone may do everything; with keys and no admin's, nobody may change weights.

    An admin key is good for everything, so that a trainer needs one key.
    """

    keys: KeyFile | None = None
    admin_keys: KeyFile | None = None
    origins: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: Settings) -> Access:
        """Raises RequestError for a file without keys."""
        keys, admin = settings.api_keys_file, settings.admin_keys_file
        return cls(KeyFile(keys) if keys else None, KeyFile(admin) if admin else None, settings.cors_origins)

    def check(self, method: str, path: str, headers: Headers) -> None:
        """Raises UnauthorizedError (who are you?) or ForbiddenError (not you)."""
        self._check_origin(headers)
        if path in OPEN:
            return
        admin = self._owner(self.admin_keys, headers)
        user = self._owner(self.keys, headers)
        if (owner := admin or user) is not None:
            logs.note(key=owner)
            caller.name_it(owner)
        is_admin_route = (method, path) in ADMIN
        if self.keys is not None and owner is None:
            raise UnauthorizedError(
                "a key is needed: send it as 'Authorization: Bearer KEY', or as X-Api-Key"
            )
        if is_admin_route and admin is None and (self.keys or self.admin_keys) is not None:
            if user is None:
                raise UnauthorizedError("an admin key is needed: send it as 'Authorization: Bearer KEY'")
            raise ForbiddenError("this key may not change weights; send one of --admin-keys-file")

    def _check_origin(self, headers: Headers) -> None:
        """Browsers say which page asks. CORS alone hides an answer from a page; the deed would have been done."""
        origin = headers.get("origin")
        if origin is None or "*" in self.origins or origin in self.origins:
            return
        if urlsplit(origin).netloc != headers.get("host"):
            raise ForbiddenError(
                "pages of this origin may not use this server; the operator's --cors-origin lets them"
            )

    @staticmethod
    def _owner(keys: KeyFile | None, headers: Headers) -> str | None:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        sent = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        return keys.owner(sent) if keys is not None and sent else None


class AccessControl:
    """The layer that asks `Access`."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._access.check(scope["method"], scope["path"], Headers(scope=scope))
            except (UnauthorizedError, ForbiddenError) as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)
