"""uvicorn with a graceful shutdown: no new requests, time for those in flight, an error for the rest."""

from __future__ import annotations

import asyncio
import socket
import ssl

import uvicorn
from fastapi import FastAPI

from myserve.errors import RequestError
from myserve.server.edge.client_timeouts import timeout_protocol
from myserve.server.models.models import Models
from myserve.server.settings import Settings

__all__ = ["GracefulServer"]

# in which an error event reaches the clients of streams that were cut
NOTICE_SECONDS = 5


class GracefulServer(uvicorn.Server):
    """Serves `app`. `should_exit`, SIGTERM or SIGINT ends it within `settings.shutdown_timeout` and some seconds.

    Streams that are not done by then end with an error event, which a client can tell from a whole answer.
    Raises RequestError for certificates that cannot be used.
    """

    def __init__(self, app: FastAPI) -> None:
        settings: Settings = app.state.settings
        config = uvicorn.Config(
            app,
            http=timeout_protocol(settings.client_timeout),
            ws="none",
            log_config=None,
            # ours has the request's id and its cost
            access_log=False,
            timeout_graceful_shutdown=round(settings.shutdown_timeout + NOTICE_SECONDS),
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
            ssl_keyfile_password=settings.ssl_keyfile_password,
            ssl_ca_certs=settings.ssl_ca_certs,
            ssl_cert_reqs=ssl.CERT_NONE if settings.ssl_ca_certs is None else ssl.CERT_REQUIRED,
        )
        _load_certificates(config, settings)
        super().__init__(config)
        self.engine_died = False
        self._models: Models = app.state.models
        self._settings = settings

    async def on_tick(self, counter: int) -> bool:
        """Restart stopped engines, or end the server; called ten times a second. Returns whether to exit."""
        if self._settings.restart_engine:
            self._models.restart_stopped(asyncio.get_running_loop().time())
        if self._settings.exit_on_engine_death:
            self.engine_died = "dead" in self._models.readiness().values()
        return await super().on_tick(counter) or self.engine_died

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no new requests, wait for those in flight, cut those that are left."""
        self._models.close_door()
        cut = asyncio.get_running_loop().call_later(self._settings.shutdown_timeout, self._models.cut_all)
        await super().shutdown(sockets)
        cut.cancel()


def _load_certificates(config: uvicorn.Config, settings: Settings) -> None:
    """Load certificates now and not at the first connection, so that the start fails if they are wrong."""
    try:
        config.load()
    # ssl.SSLError is an OSError
    except OSError as error:
        files = [settings.ssl_certfile, settings.ssl_keyfile, settings.ssl_ca_certs]
        named = ", ".join(file for file in files if file is not None)
        raise RequestError(f"TLS cannot start with {named}: {error.strerror or error}") from error
