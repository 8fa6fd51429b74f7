"""Sampling from language models, exactly: a server, a client SDK, and what a trainer needs to agree with both."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from myserve.trainer.completion_logits import completion_logits
    from myserve.trainer.exact_forward import exact_forward
    from myserve.trainer.exact_logprobs import exact_logprobs
    from myserve.trainer.replay_routing import replay_routing

__all__ = ["completion_logits", "exact_forward", "exact_logprobs", "replay_routing"]


def __getattr__(name: str) -> Any:
    # asked for, not imported: `import myserve.sdk` must not pull in torch
    if name in __all__:
        return getattr(import_module(f"myserve.engine.{name}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
