"""Writes small weights, quantised and dequantised by the libraries of their formats: our decoding is judged by them.

    pip install bitsandbytes==0.50.2 compressed-tensors==0.20.1 && python -m tools.quantized_fixtures

They are `made_by_others.safetensors` beside tests/engine/weights/formats/test_decoded.py, with a JSON of what a
config.json says of each. The libraries are no dependency of ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["main"]

FILE = Path(__file__).parents[1] / "tests/engine/weights/formats/made_by_others.safetensors"
Case = tuple[dict[str, Any], dict[str, Tensor], Tensor]


def _bitsandbytes() -> dict[str, Case]:
    import bitsandbytes.functional as functional

    cases: dict[str, Case] = {}
    for kind, nested in (("nf4", True), ("nf4", False), ("fp4", True)):
        weight = torch.randn(24, 64).bfloat16()
        packed, state = functional.quantize_4bit(
            weight, blocksize=64, compress_statistics=nested, quant_type=kind
        )
        parts = {f"X.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
        described = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        name = f"bitsandbytes-{kind}" + ("-nested" if nested else "")
        cases[name] = (described, parts | {"X.weight": packed}, functional.dequantize_4bit(packed, state))
    weight = torch.randn(24, 64).half()
    values, largest, _ = functional.int8_vectorwise_quant(weight)
    parts = {"X.weight": values, "X.SCB": largest, "X.weight_format": torch.tensor(0, dtype=torch.uint8)}
    described = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    cases["bitsandbytes-int8"] = (described, parts, functional.int8_vectorwise_dequant(values, largest))
    return cases


def _compressed_tensors() -> dict[str, Case]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    def case(layout: str, **told: Any) -> Case:
        args = QuantizationArgs(**told)
        weight = torch.randn(24, 64)
        size = args.group_size or 64
        groups = weight.unflatten(1, (-1, size))
        whole = torch.tensor([2.5]) if layout.startswith("nvfp4") else None
        scale, zero = calculate_qparams(
            groups.amin(2), groups.amax(2), args, **({"global_scale": whole} if whole is not None else {})
        )
        state = {"weight": weight, "weight_scale": scale}
        if not args.symmetric:
            state["weight_zero_point"] = zero
        if whole is not None:
            state["weight_global_scale"] = whole
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        compressor = BaseCompressor.get_value_from_registry(layout)
        stored = compressor.compress(state, scheme)
        expected = compressor.decompress(stored, scheme)["weight"]
        group = {"targets": ["Linear"], "weights": json.loads(args.model_dump_json())}
        described = {
            "quant_method": "compressed-tensors",
            "format": layout,
            "config_groups": {"group_0": group},
        }
        return described, {f"X.{name}": value for name, value in stored.items()}, expected

    grouped = {"type": "int", "strategy": "group", "group_size": 32}
    return {
        "pack-4": case("pack-quantized", num_bits=4, symmetric=True, **grouped),
        "pack-4-zeros": case("pack-quantized", num_bits=4, symmetric=False, **grouped),
        "pack-2-zeros": case("pack-quantized", num_bits=2, symmetric=False, **grouped),
        "pack-8-channel": case("pack-quantized", num_bits=8, symmetric=True, type="int", strategy="channel"),
        "int-channel": case("int-quantized", num_bits=8, symmetric=True, type="int", strategy="channel"),
        "int-group-zeros": case("int-quantized", num_bits=8, symmetric=False, **grouped),
        "float-channel": case("float-quantized", num_bits=8, symmetric=True, type="float", strategy="channel"),
        "nvfp4": case("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        "mxfp4": case("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
    }  # fmt: skip


def main() -> None:
    """Write the file and its JSON."""
    torch.manual_seed(0)
    cases = _bitsandbytes() | _compressed_tensors()
    tensors = {f"{name}/{key}": part for name, (_, parts, _) in cases.items() for key, part in parts.items()}
    tensors |= {f"{name}/expected": expected.float() for name, (_, _, expected) in cases.items()}
    save_file({key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}, FILE)
    told = {name: described for name, (described, _, _) in cases.items()}
    FILE.with_suffix(".json").write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
