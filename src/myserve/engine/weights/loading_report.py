"""A checkpoint is served only if it gives every weight of its model: transformers' loading report is judged here.

transformers fills what is missing with random numbers, and passes over what it has no place for; both are a warning to
it. The rule (docs/weights.md has it in words):

- missing, or of another shape: refused;
- without a place, inside a layer or a module that the model has (a bias that the config denies): refused, since the
  numbers would differ from those that the checkpoint was made for;
- without a place, outside of all of them (a further layer, a value head, a vision tower): named in a warning;
- constants that the model makes itself (rotary frequencies, causal masks): passed over.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from myserve.errors import BadCheckpointError

__all__ = ["judge"]

log = logging.getLogger(__name__)

# What models make themselves, and old checkpoints hold nevertheless.
_CONSTANTS = re.compile(
    r"(^|\.)(inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids|rotary_emb\..*)$"
)
_SHOWN = 4


def judge(model: nn.Module, report: Mapping[str, Any]) -> None:
    """Raise BadCheckpointError unless `report`, transformers' loading info, is one of a whole checkpoint.

    >>> judge(nn.Linear(2, 2), {"missing_keys": {"weight"}, "unexpected_keys": set()})
    Traceback (most recent call last):
    ...
    myserve.errors.BadCheckpointError: the checkpoint lacks weight, which transformers would fill with random numbers; \
get the whole checkpoint, or save it anew
    """
    if missing := sorted(report.get("missing_keys", ())):
        raise BadCheckpointError(
            f"the checkpoint lacks {_listed(missing)}, which transformers would fill with random numbers; get the "
            "whole checkpoint, or save it anew"
        )
    if mismatched := sorted(
        str(key[0] if isinstance(key, tuple) else key) for key in report.get("mismatched_keys", ())
    ):
        raise BadCheckpointError(
            f"{_listed(mismatched)} of the checkpoint have other shapes than config.json says"
        )
    if errors := list(report.get("error_msgs", ())):
        raise BadCheckpointError(f"the checkpoint cannot be read: {str(errors[0]).splitlines()[0]}")
    homeless = sorted(key for key in report.get("unexpected_keys", ()) if not _CONSTANTS.search(key))
    modules = dict(model.named_modules())
    if inside := [key for key in homeless if _is_inside(key, modules)]:
        raise BadCheckpointError(
            f"the model that config.json describes has no place for {_listed(inside)} of the checkpoint, and would "
            "compute without it; correct config.json, or take the weights out"
        )
    if homeless:
        log.warning("the checkpoint has more than its model, which is passed over: %s", _listed(homeless))


def _is_inside(key: str, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether the model's nearest module on the way to `key` is a layer's or has weights of its own."""
    path = key
    while path not in modules:
        path = path.rpartition(".")[0]
    owner = modules[path]
    in_layer = any(part.isdecimal() for part in path.split("."))
    return in_layer or bool(owner._parameters)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
