"""Sampling from language models, exactly: a server, a client SDK, and what a trainer needs to agree with both."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from myserve.engine.completion_logits import completion_logits
    from myserve.engine.exact_forward import exact_forward
    from myserve.engine.exact_logprobs import exact_logprobs
    from myserve.engine.replay_routing import replay_routing

__all__ = ["completion_logits", "exact_forward", "exact_logprobs", "replay_routing"]


def __getattr__(name: str) -> Any:
    # asked for, not imported: `import myserve.sdk` must not pull in torch
    if name in __all__:
        return getattr(import_module(f"myserve.engine.{name}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
