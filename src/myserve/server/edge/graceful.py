"""uvicorn, ending as clients and supervisors want: nothing new, a time to finish, an error for who is still there."""

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

NOTICE_SECONDS = 5  # seconds in which those who were cut hear of it


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
            access_log=False,  # ours has the request's id and its cost
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
        """Ten times a second: is an engine to be loaded again, is the server to end?"""
        if self._settings.restart_engine:
            self._models.restart_stopped(asyncio.get_running_loop().time())
        if self._settings.exit_on_engine_death:
            self.engine_died = "dead" in self._models.readiness().values()
        return await super().on_tick(counter) or self.engine_died

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the door, wait, cut."""
        self._models.close_door()
        cut = asyncio.get_running_loop().call_later(self._settings.shutdown_timeout, self._models.cut_all)
        await super().shutdown(sockets)
        cut.cancel()


def _load_certificates(config: uvicorn.Config, settings: Settings) -> None:
    """Here and not at the first connection, so that who starts the server hears what is wrong with them."""
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        files = [settings.ssl_certfile, settings.ssl_keyfile, settings.ssl_ca_certs]
        named = ", ".join(file for file in files if file is not None)
        raise RequestError(f"TLS cannot start with {named}: {error.strerror or error}") from error
