"""Sampling from language models, exactly: a server, a client SDK, and what a trainer needs to agree with both."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from myserve.engine.exact_forward import exact_forward
    from myserve.engine.replay_routing import replay_routing

__all__ = ["exact_forward", "replay_routing"]


def __getattr__(name: str) -> Any:
    # asked for, not imported: `import myserve.sdk` must not pull in torch
    if name == "exact_forward":
        from myserve.engine.exact_forward import exact_forward

        return exact_forward
    if name == "replay_routing":
        from myserve.engine.replay_routing import replay_routing

        return replay_routing
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
