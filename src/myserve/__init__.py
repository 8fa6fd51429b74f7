"""Deterministic, batch-invariant sampling from language models: a server, a client SDK, and a trainer's exact forward.

Everything here is imported when it is first asked for: `import myserve` costs no torch, and neither does `myserve.sdk`.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from myserve.core.params import SamplingParams
    from myserve.engine.config import EngineConfig
    from myserve.engine.engine import Engine
    from myserve.engine.requests.options import SubmitOptions
    from myserve.trainer.completion_logits import completion_logits
    from myserve.trainer.exact_forward import exact_forward
    from myserve.trainer.exact_logprobs import exact_logprobs
    from myserve.trainer.replay_routing import replay_routing

__all__ = [
    "Engine",
    "EngineConfig",
    "SamplingParams",
    "SubmitOptions",
    "__version__",
    "completion_logits",
    "exact_forward",
    "exact_logprobs",
    "replay_routing",
]

__version__ = version("myserve")

_HOMES = {
    "Engine": "myserve.engine.engine",
    "EngineConfig": "myserve.engine.config",
    "SamplingParams": "myserve.core.params",
    "SubmitOptions": "myserve.engine.requests.options",
    "completion_logits": "myserve.trainer.completion_logits",
    "exact_forward": "myserve.trainer.exact_forward",
    "exact_logprobs": "myserve.trainer.exact_logprobs",
    "replay_routing": "myserve.trainer.replay_routing",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
