"""The products of a model that adapters change, and which tensors of an adapter change which of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from myserve.engine.batch_invariance.patch import ExactLinear
from myserve.engine.weights.lora.adapter_config import CONFIG, AdapterConfig
from myserve.engine.weights.plan import WeightNames, group_tensors
from myserve.errors import BadAdapterError

__all__ = ["LoraPart", "LoraTarget", "find_targets", "place_parts"]

_CONCATENATED = [
    "MergeModulelist",
    "Concatenate",
]  # transformers' way from each expert's tensors to the model's


class LoraPart(NamedTuple):
    """A and B of a target, or of a part of it, by the name that `adapter_config.json` knows."""

    name: str
    expert: int | None = None  # None: of a linear layer, or of all experts at once
    half: int = 0  # 1: of the second of two products that are one here, `up` behind `gate`


@dataclass(slots=True)
class LoraTarget:
    """One product [N, K], or those of all experts of a layer; `attribute`: where the module has its adapters."""

    module: Any
    attribute: str
    in_features: int
    out_features: int
    dtype: torch.dtype
    experts: int = 0  # 0: a linear layer
    parts: list[LoraPart] = field(default_factory=list)  # of one adapter

    def rank_of(self, config: AdapterConfig) -> int:
        """Return the rank of each product: halves stand side by side."""
        return sum(config.rank_of(part.name) for part in self._of_one_expert())

    def shapes_of(self, part: LoraPart, config: AdapterConfig) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the shapes of A and B in the adapter's files."""
        rank, columns = config.rank_of(part.name), self.out_features
        if part.expert is None:
            rank *= max(1, self.experts)
        elif self._has_halves():
            columns //= 2
        return (rank, self.in_features), (columns, rank)

    def scale_of(self, config: AdapterConfig) -> float:
        scales = {config.scale_of(part.name) for part in self.parts}
        if len(scales) > 1:
            raise BadAdapterError(f"{self.parts[0].name} and {self.parts[-1].name} must have one scale")
        return scales.pop()

    def factors(self, made: Mapping[LoraPart, tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Return A [r, K] and B [N, r] of the layer, or of each expert, of the tensors as they lie in the files."""
        first = self.parts[0]
        if first.expert is None:
            a, b = made[first]
            count = max(1, self.experts)
            each_a = a.reshape(count, -1, self.in_features)
            each_b = b.reshape(self.out_features, -1, count)
            return [(each_a[e], each_b[..., e].contiguous()) for e in range(count)]
        return [self._joined([made[p] for p in self.parts if p.expert == e]) for e in range(self.experts)]

    def _joined(self, halves: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return one A and B: of halves, B has zeros where the other's columns and terms meet."""
        present = [part.half for part in self._of_one_expert()]
        width = self.out_features // (2 if self._has_halves() else 1)
        b = torch.zeros(self.out_features, sum(len(a) for a, _ in halves), dtype=halves[0][1].dtype)
        start = 0
        for half, (own_a, own_b) in zip(present, halves, strict=True):
            b[half * width : (half + 1) * width, start : start + len(own_a)] = own_b
            start += len(own_a)
        return torch.cat([a for a, _ in halves]), b

    def _of_one_expert(self) -> list[LoraPart]:
        return [part for part in self.parts if part.expert == self.parts[0].expert]

    def _has_halves(self) -> bool:
        return self.attribute == "low_rank_up" and bool(self.module.has_gate)


def find_targets(model: nn.Module) -> dict[str, LoraTarget]:
    """Return a model's products by name: linear layers but the output layer's, and the experts' parameters.

    Not among them: linear layers of which a model takes the weight alone (Mamba's `dt_proj`). PEFT's change no output.
    """
    found: dict[str, LoraTarget] = {}
    head = model.get_output_embeddings()  # type: ignore[operator]  # transformers'
    for name, module in model.named_modules():
        if isinstance(module, ExactLinear) and module is not head:
            if not module.takes_adapters:
                continue
            sizes = module.in_features, module.out_features
            found[name] = LoraTarget(module, "low_rank", *sizes, module.packed.dtype)
        elif hasattr(module, "packed_down"):
            up = "gate_up_proj" if module.has_gate else "up_proj"
            for parameter, packed, attribute in (
                (up, module.packed_up, "low_rank_up"), ("down_proj", module.packed_down, "low_rank_down"),
            ):  # fmt: skip
                sizes = packed[0].in_features, packed[0].out_features
                found[f"{name}.{parameter}"] = LoraTarget(
                    module, attribute, *sizes, packed[0].dtype, len(packed)
                )
    return found


def place_parts(
    names: Mapping[str, tuple[int, int]], targets: Mapping[str, LoraTarget], config: AdapterConfig,
    model: nn.Module, weight_names: WeightNames,
) -> dict[str, LoraPart]:  # fmt: skip
    """Give the targets their parts; return each layer's by its name in the files. Raises BadAdapterError.

    `names`: of what has A and B, with the inputs of A and the outputs of B.
    """
    placed: dict[str, LoraPart] = {}
    others: list[str] = []
    for name, sizes in names.items():
        target = targets.get(name)
        if target is not None and not target.experts:
            placed[name] = LoraPart(name)
            target.parts.append(placed[name])
        elif (wrapped := _wrapped_parameter(name, sizes, targets)) is not None:
            placed[name] = LoraPart(wrapped)
            targets[wrapped].parts.append(placed[name])
        else:
            others.append(name)
    placed |= _parts_of_experts(others, targets, model, weight_names)
    for target in targets.values():
        target.parts.sort(key=lambda part: (part.expert or 0, part.half))
        if len({part.expert is None for part in target.parts}) > 1 or (
            target.parts and target.parts[0].expert is None and len(target.parts) > 1
        ):
            raise BadAdapterError(f"the adapter has {target.parts[0].name} twice")
    _check_targets(config, {part.name for part in placed.values()}, targets)
    return placed


def _wrapped_parameter(name: str, sizes: tuple[int, int], targets: Mapping[str, LoraTarget]) -> str | None:
    """Return which parameter of experts PEFT's wrapper stands for: its name does not say, its sizes do."""
    module = re.sub(r"(\.base_layer)+$", "", name)
    fitting = [
        full
        for full, target in targets.items()
        if target.experts
        and full.rpartition(".")[0] == module
        and sizes == (target.in_features, target.out_features)
    ]
    return fitting[0] if len(fitting) == 1 else None


def _parts_of_experts(
    names: Iterable[str], targets: Mapping[str, LoraTarget], model: nn.Module, weight_names: WeightNames
) -> dict[str, LoraPart]:
    """Place layers of single experts, as checkpoints name them: `experts.3.gate_proj`."""
    groups, unknown = group_tensors([f"{name}.weight" for name in names], model, weight_names)
    placed: dict[str, LoraPart] = {}
    for group in groups:
        target, converter = targets.get(group.target), group.converter
        operations = [] if converter is None else [type(o).__name__ for o in converter.operations]
        if target is None or converter is None or operations != _CONCATENATED[: len(operations)]:
            unknown += group.sources
            continue
        for source, pattern in zip(group.sources, group.patterns, strict=True):
            name = source.removesuffix(".weight")
            expert = int(re.findall(r"\.(\d+)\.", name)[-1])
            placed[name] = LoraPart(name, expert, converter.source_patterns.index(pattern))
            target.parts.append(placed[name])
        kinds = {part.half for part in target.parts}
        if len(target.parts) != target.experts * len(kinds):
            raise BadAdapterError(
                f"the adapter lacks some of the {target.experts} experts of {group.target}: it is torn, or "
                "changes a few experts alone, which is not served"
            )
    if unknown:
        name = min(unknown).removesuffix(".weight")
        raise BadAdapterError(f"the model has no linear layer {name[:200]} that an adapter can change")
    return placed


def _check_targets(config: AdapterConfig, given: set[str], targets: Mapping[str, LoraTarget]) -> None:
    """Raise BadAdapterError where the files have less than the config says, or more."""
    wanted = {
        name
        for name, target in targets.items()
        if (config.targets_parameter(name) if target.experts else config.targets(name))
    }
    of_experts = {p.name for target in targets.values() for p in target.parts if p.expert is not None}
    if missing := sorted(wanted - given):
        raise BadAdapterError(
            f"the adapter lacks {missing[0]}, which {CONFIG} names, and {len(missing) - 1} more"
        )
    strange = sorted(
        (given - wanted - of_experts) | {name for name in of_experts if not config.targets(name)}
    )
    if strange:
        raise BadAdapterError(
            f"the adapter has {strange[0]}, which {CONFIG} does not name, and {len(strange) - 1} more"
        )
