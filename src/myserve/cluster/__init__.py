"""A fleet on Ray Serve: replicas of one engine that give its bits. `myserve.cluster:app` is for `serve run`."""

from typing import Any

__all__ = ["app"]


def app(args: dict[str, Any]) -> Any:
    """Return the application that the arguments describe; their names are those of `myserve serve`'s options.

    Raises RequestError for arguments that cannot be, ImportError where Ray is not installed (`myserve[ray]`).
    """
    # ray is an extra, and takes a second to import
    from myserve.cluster.on_ray import application

    return application.app(args)
