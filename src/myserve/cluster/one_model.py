"""A fleet serves one model: settings that say otherwise are refused before anything is started."""

from __future__ import annotations

from dataclasses import replace

from myserve.errors import RequestError
from myserve.server.settings import Settings

__all__ = ["one_model"]


def one_model(settings: Settings) -> Settings:
    """Return settings of the one model that a fleet serves. Raises RequestError for several, and for an echo."""
    names = settings.preload or ()
    if len({settings.models[name] for name in names}) > 1:
        raise RequestError(f"a fleet serves one model, and {', '.join(names)} are named", param="model")
    if settings.force_echo:
        raise RequestError("an echo has no replicas: leave replicas out", param="replicas")
    return replace(settings, models={name: settings.models[name] for name in names}, preload=names)
