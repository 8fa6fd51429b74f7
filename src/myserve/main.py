"""The ASGI app, `myserve.main:app`, and nothing else."""

from myserve.server.app import create_app

__all__ = ["app"]

app = create_app()
