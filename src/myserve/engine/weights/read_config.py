"""A checkpoint's config is read, or refused in one sentence: whatever its config.json says.

A number in it may be absurd, and transformers believes it: of a billion layers it makes a list before it makes a model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from myserve.errors import BadCheckpointError

__all__ = ["in_a_line", "read_config"]

LAYERS = {
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_nextn_predict_layers",
}
MOST_LAYERS = 4096


def _refuse_absurd(told: Any, model: str) -> None:
    """Raise BadCheckpointError for a number of layers that no model has: transformers makes lists as long."""
    if not isinstance(told, dict):
        raise BadCheckpointError(f"config.json of {model} is no table of names and values")
    for name in LAYERS & told.keys():
        if isinstance(told[name], int) and told[name] > MOST_LAYERS:
            raise BadCheckpointError(
                f"config.json of {model} says {told[name]} {name}; at most {MOST_LAYERS} are read"
            )
    for inner in told.values():
        if isinstance(inner, dict):
            _refuse_absurd(inner, model)


def read_config(model: str, trust_remote_code: bool) -> Any:
    """Return the config of a folder or hub id. Raises BadCheckpointError for one that is none, OSError from the hub."""
    try:
        _refuse_absurd(PreTrainedConfig.get_config_dict(model)[0], model)
        return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except StrictDataclassError as error:
        raise BadCheckpointError(
            f"config.json of {model} is no config of its model: {in_a_line(error)}"
        ) from error
    except OSError as error:
        if not Path(model, "config.json").is_file():
            raise
        raise BadCheckpointError(f"config.json of {model} cannot be read: {in_a_line(error)}") from error
    except (ValueError, TypeError, AttributeError) as error:  # the last two of a config that is no table
        raise BadCheckpointError(f"{model} is no model: {in_a_line(error)}") from error


def in_a_line(error: Exception) -> str:
    """Return what an error says, in one line that is not long.

    >>> in_a_line(ValueError("a\\nb"))
    'a b'
    """
    return " ".join(str(error).split())[:300]
