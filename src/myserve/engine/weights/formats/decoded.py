"""A quantised checkpoint as if it were not: its weights under their plain names, each decoded when it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from myserve.engine.weights.formats.bitsandbytes import bitsandbytes_recipes
from myserve.engine.weights.formats.compressed_tensors import compressed_tensors_recipes
from myserve.engine.weights.formats.float8 import FLOAT8, float8_recipes
from myserve.engine.weights.formats.mxfp4 import mxfp4_recipes
from myserve.engine.weights.formats.packed_int import awq_recipes, gptq_recipes
from myserve.engine.weights.formats.recipe import Read, Recipes
from myserve.engine.weights.snapshot import Snapshot, TensorInfo
from myserve.errors import BadCheckpointError, UnsupportedModelError

__all__ = ["DecodedSnapshot", "described_quantization"]

_METHODS: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, TensorInfo], Read], Recipes]] = {
    "awq": awq_recipes,
    "bitsandbytes": bitsandbytes_recipes,
    "compressed-tensors": compressed_tensors_recipes,
    "fbgemm_fp8": float8_recipes,
    "fp8": float8_recipes,
    "gptq": gptq_recipes,
    "mxfp4": mxfp4_recipes,
}
# Of activations and of the KV cache, which are not quantised here.
_PASSED_OVER = (
    "input_scale", "activation_scale", "input_scale_ub", "input_zero_point", "input_global_scale", "output_scale",
    "k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "q_zero_point",
)  # fmt: skip


def described_quantization(config: Any) -> Mapping[str, Any] | None:
    """Return what a model's config says of the quantisation of its checkpoint; None: it is not quantised.

    Raises UnsupportedModelError for a method that is not read here.
    """
    text = config.get_text_config(decoder=True)
    for owner in (config, text):
        for name in ("quantization_config", "compression_config"):
            described = getattr(owner, name, None)
            if described is not None and not isinstance(described, Mapping):
                described = described.to_dict()
            if described:
                method = described.get("quant_method")
                if (method is None and described.get("load_in_4bit")) or described.get("load_in_8bit"):
                    method = "bitsandbytes"
                if method not in _METHODS:
                    raise UnsupportedModelError(
                        f"the checkpoint is quantised by {method}, which is not read; {', '.join(_METHODS)} and GGUF "
                        "files are: take one of these, or the original with --quantize int8"
                    )
                return {**described, "quant_method": method}
    return None


class DecodedSnapshot:
    """The weights of a quantised checkpoint, of type `dtype`, as a `Snapshot` of plain ones.

    Raises BadCheckpointError where what a weight is made of is missing or does not fit, before a weight is read.
    """

    def __init__(self, stored: Snapshot, described: Mapping[str, Any], dtype: torch.dtype) -> None:
        self._stored, self._dtype = stored, dtype
        method = str(described["quant_method"])
        self._recipes = _METHODS[method](described, stored.tensors, stored.read)
        if not self._recipes:
            raise BadCheckpointError(
                f"its config.json says that it is quantised by {method}, and no tensor is"
            )
        used = {source for recipe in self._recipes.values() for source in recipe.sources}
        plain = {
            name: info
            for name, info in stored.tensors.items()
            if name not in used and name.rpartition(".")[2] not in _PASSED_OVER
        }
        if twice := sorted(plain.keys() & self._recipes.keys()):
            raise BadCheckpointError(f"{twice[0]} is there quantised and as it was")
        strange = [name for name, info in plain.items() if info.dtype in FLOAT8]
        if strange:
            raise BadCheckpointError(f"{strange[0]} is in FP8, and nothing tells by which scales")
        made = {name: TensorInfo(dtype, recipe.shape) for name, recipe in self._recipes.items()}
        self.tensors: dict[str, TensorInfo] = plain | made

    def read(self, name: str) -> Tensor:
        recipe = self._recipes.get(name)
        return self._stored.read(name) if recipe is None else recipe.decode(self._stored.read, self._dtype)

    def close(self) -> None:
        self._stored.close()
