"""`adapter_config.json` as PEFT writes it: which layers an adapter changes, by which rank and scale."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from myserve.errors import BadAdapterError

__all__ = ["CONFIG", "AdapterConfig", "read_config"]

T = TypeVar("T")

CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 4096

# what changes no number of a forward pass, or is read below
_KNOWN = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "target_parameters", "task_type", "use_rslora", "velora_config",
})  # fmt: skip
_REFUSED = {
    "use_dora": "DoRA (use_dora)",
    "lora_bias": "a bias of B (lora_bias)",
    "modules_to_save": "whole layers beside the adapter (modules_to_save)",
    "trainable_token_indices": "rows of the embedding (trainable_token_indices)",
    "layer_replication": "layers that stand twice (layer_replication)",
    "alora_invocation_tokens": "an adapter that begins at a token (alora_invocation_tokens)",
    "use_qalora": "QALoRA (use_qalora)",
}
# they change the base weights when training begins: what is saved is no difference to the checkpoint
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The part of PEFT's `LoraConfig` that a forward pass depends on.

    >>> config = AdapterConfig(rank=8, alpha=16.0, target_modules=("q_proj",), rank_pattern={"layers.0.q_proj": 4})
    >>> config.targets("model.layers.0.self_attn.q_proj"), config.targets("model.layers.0.self_attn.k_proj")
    (True, False)
    >>> config.scale_of("model.layers.1.self_attn.q_proj")
    2.0
    """

    rank: int
    alpha: float
    target_modules: (
        tuple[str, ...] | str
    ) = ()  # the ends of names, or one regular expression for all of a name
    exclude_modules: tuple[str, ...] | str = ()
    target_parameters: tuple[str, ...] = ()
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)  # by the ends of names
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None  # None: all of them
    layers_pattern: tuple[str, ...] = ()

    def targets(self, module: str) -> bool:
        """Return whether a module of this name is to be changed; "all-linear" matches every name."""
        if _matches(self.exclude_modules, module):
            return False
        if self.target_modules == "all-linear":
            return True
        return _matches(self.target_modules, module) and self._is_in_layers(module)

    def targets_parameter(self, parameter: str) -> bool:
        """Return whether a parameter of this name (of experts) is to be changed."""
        return _matches(self.target_parameters, parameter)

    def rank_of(self, module: str) -> int:
        return _value_of(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Return what B(A(x)) is multiplied by: alpha / r, or alpha / sqrt(r) with rslora."""
        rank, alpha = self.rank_of(module), _value_of(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def _is_in_layers(self, module: str) -> bool:
        if self.layers is None or isinstance(self.target_modules, str):
            return True
        patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
            if found := re.match(pattern, module):
                return int(found[1]) in self.layers
        return False


def _value_of(patterns: Mapping[str, T], module: str, otherwise: T) -> T:
    """Return the value of the first pattern that a name ends with."""
    found = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, otherwise)


def _matches(names: tuple[str, ...] | str, module: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def read_config(folder: Path) -> AdapterConfig:
    """Read a folder's `adapter_config.json`. Raises BadAdapterError for what it is not, or cannot be served."""
    try:
        with (folder / CONFIG).open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise BadAdapterError(f"{folder.name} has no {CONFIG} that can be read: {error.strerror}") from None
    try:
        told = json.loads(raw[:MAX_CONFIG_BYTES])
        if not isinstance(told, dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise BadAdapterError(f"{CONFIG} is torn or no JSON object") from None
    _refuse_what_is_not_served(told)
    try:
        config = _config(told)
    except (TypeError, ValueError, re.error) as error:
        raise BadAdapterError(f"{CONFIG} is no LoRA config: {error}") from None
    return config


def _refuse_what_is_not_served(told: Mapping[str, Any]) -> None:
    if told.get("peft_type") != "LORA":
        raise BadAdapterError(f"peft_type is {told.get('peft_type')!r:.80}; adapters of type LORA are served")
    if told.get("bias", "none") != "none":
        raise BadAdapterError(f"bias is {told['bias']!r:.80}: adapters that change biases are not served")
    if told.get("use_dora"):
        raise BadAdapterError("DoRA (use_dora) is not served: the adapter must be plain LoRA")
    for name, value in told.items():
        if name in _REFUSED and value:
            raise BadAdapterError(f"{_REFUSED[name]} is not served: the adapter must be plain LoRA")
        if name not in _KNOWN | _REFUSED.keys() and value:
            raise BadAdapterError(
                f"{CONFIG} has {name[:80]!r}, which this server does not know: leave it out"
            )
    start = told.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise BadAdapterError(
            f"init_lora_weights {start[:80]!r} has changed the base weights: save the adapter converted to plain LoRA "
            "(path_initial_model_for_weight_conversion)"
        )


def _config(told: Mapping[str, Any]) -> AdapterConfig:
    layers = told.get("layers_to_transform")
    config = AdapterConfig(
        rank=_rank(told.get("r"), "r"),
        alpha=_number(told.get("lora_alpha"), "lora_alpha"),
        target_modules=_names(told, "target_modules"),
        exclude_modules=_names(told, "exclude_modules"),
        target_parameters=_listed_names(told, "target_parameters"),
        rslora=told.get("use_rslora") is True,
        rank_pattern={k: _rank(v, "rank_pattern") for k, v in dict(told.get("rank_pattern") or {}).items()},
        alpha_pattern={
            k: _number(v, "alpha_pattern") for k, v in dict(told.get("alpha_pattern") or {}).items()
        },
        layers=None
        if layers in (None, [])
        else tuple(int(i) for i in (layers if isinstance(layers, list) else [layers])),
        layers_pattern=_listed_names(told, "layers_pattern"),
    )
    for pattern in (*config.rank_pattern, *config.alpha_pattern, *config.layers_pattern):
        re.compile(pattern)
    for names in (config.target_modules, config.exclude_modules):
        if isinstance(names, str):
            re.compile(names)
    if not config.target_modules and not config.target_parameters:
        raise ValueError("target_modules names no layer")
    return config


def _rank(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise ValueError(f"{name} must be an integer in [1, {MAX_RANK}], got {value!r:.80}")
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r:.80}")
    return float(value)


def _names(told: Mapping[str, Any], key: str) -> tuple[str, ...] | str:
    value = told.get(key)
    return value if isinstance(value, str) else _listed_names(told, key)


def _listed_names(told: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = told.get(key)
    value = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{key} must be a list of names, got {value!r:.80}")
    return tuple(value)
