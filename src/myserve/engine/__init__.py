"""Many requests on one model, exactly. `Engine.from_pretrained(path).submit(...)`.

`Engine` is imported when it is first asked for: who only reads the values of `outputs` does not wait for torch.
"""

from typing import TYPE_CHECKING, Any

from myserve.engine.config import EngineConfig
from myserve.engine.outputs import Delta, KeptSet, PromptLogprob, RequestMetrics, TokenOutput
from myserve.engine.requests.options import SubmitOptions

if TYPE_CHECKING:
    from myserve.engine.engine import Engine

__all__ = [
    "Delta",
    "Engine",
    "EngineConfig",
    "KeptSet",
    "PromptLogprob",
    "RequestMetrics",
    "SubmitOptions",
    "TokenOutput",
]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from myserve.engine.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
