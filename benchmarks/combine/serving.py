"""A real server on a socket in this process, so that a test can take a mend out of it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fastapi import FastAPI

from myserve.server.app import create_app
from myserve.server.edge.graceful import GracefulServer
from myserve.server.settings import Settings

__all__ = ["served"]


@contextmanager
def served(models: Mapping[str, Path]) -> Iterator[tuple[str, FastAPI]]:
    """Serve these until the block ends; yield the URL and the application."""
    app = create_app(Settings(models={name: str(path) for name, path in models.items()}))
    listener = socket.create_server(("127.0.0.1", 0))
    server = GracefulServer(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started or "loading" in app.state.models.readiness().values():
            if not thread.is_alive():
                raise RuntimeError("the server did not start")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", app
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
