"""Roofline: this machine's bandwidth and GEMM peak, and so how fast a step could be. No server beats these bounds.

python -m benchmarks.roofline
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.model import SHAPE
from myserve.bench.workload import Workload

_BYTES_READ = 1 << 30
_GEMM = (2048, 4096, 4096)
_TRIES = 7


@dataclass(frozen=True, slots=True)
class Machine:
    """Its name, and its measured limits with all cores."""

    cpu: str
    cores: int
    memory_gib: float
    read_gb_s: float
    bf16_gflop_s: float
    f32_gflop_s: float

    @property
    def gflop_s(self) -> float:
        """The faster of the two: on some CPUs bfloat16 numbers are multiplied faster as float32 ones."""
        return max(self.bf16_gflop_s, self.f32_gflop_s)

    def __str__(self) -> str:
        return (
            f"{self.cpu}, {self.cores} cores, {self.memory_gib:.0f} GiB; reads {self.read_gb_s:.1f} GB/s, "
            f"bf16 {self.bf16_gflop_s:.0f} GFLOP/s, f32 {self.f32_gflop_s:.0f} GFLOP/s"
        )


def measure() -> Machine:
    """About ten seconds on a quiet machine."""
    import torch

    numbers = torch.ones(_BYTES_READ // 4)
    read = _BYTES_READ / _best_seconds(numbers.sum)
    del numbers

    def gemm_flop_s(dtype: torch.dtype) -> float:
        m, k, n = _GEMM
        a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
        return 2 * m * k * n / _best_seconds(lambda: a @ b)

    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        cpu=_cpu_name(),
        cores=os.cpu_count() or 1,
        memory_gib=pages / 2**30,
        read_gb_s=read / 1e9,
        bf16_gflop_s=gemm_flop_s(torch.bfloat16) / 1e9,
        f32_gflop_s=gemm_flop_s(torch.float32) / 1e9,
    )


def _best_seconds(work: Callable[[], object]) -> float:
    """Return the best of some tries: a bound is the hardware's best, not a busy moment's."""
    seconds = []
    for _ in range(_TRIES):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A dense model in numbers. Each weight of a linear is read once a step and multiplied once a token."""

    body_weights: int
    head_weights: int
    kv_bytes_per_token: int
    bytes_per_weight: int = 2
    state_bytes: int = 0  # of a request's recurrent layers: a step reads them and writes them

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ModelSize:
        """Return the size that a `config.json` tells, of a model with gated layers and equal heads in all of them."""
        heads, kv_heads, width = (
            config[name] for name in ("num_attention_heads", "num_key_value_heads", "hidden_size")
        )
        dim = config.get("head_dim") or width // heads
        layer = width * (2 * (heads + kv_heads) * dim + 3 * config["intermediate_size"])
        layers = config["num_hidden_layers"]
        body, head, kv = layers * layer, width * config["vocab_size"], layers * 2 * kv_heads * dim * 2
        recurrent = list(config.get("layer_types") or ()).count("linear_attention")
        if not recurrent:
            return cls(body, head, kv)
        # a matrix a head, in float32; what the products of such layers are, the checkpoint tells
        cells = config.get("linear_key_head_dim", dim) * config.get("linear_value_head_dim", dim)
        states = recurrent * config.get("linear_num_value_heads", heads) * cells * 4
        return cls(body, head, kv * (layers - recurrent) // layers, state_bytes=states)

    @classmethod
    def of_folder(cls, model: Path) -> ModelSize:
        """Return the same of a model's folder, with the weights that its files have: all matrices but embeddings."""
        from safetensors import safe_open

        body = 0
        for file in model.glob("model*.safetensors"):
            with safe_open(file, "pt") as tensors:
                names = [name for name in tensors.keys() if "embed" not in name and "lm_head" not in name]  # noqa: SIM118
                shapes = [tensors.get_slice(name).get_shape() for name in names]
            body += sum(math.prod(shape) for shape in shapes if len(shape) == 2)
        size = cls.of(json.loads((model / "config.json").read_text("utf-8")))
        return replace(size, body_weights=body) if body else size


RANDOM = ModelSize.of(SHAPE)  # the model that is made here


def least_ms_per_step(machine: Machine, rows: int, context: int, size: ModelSize = RANDOM) -> float:
    """Return ms for a decode step of `rows` requests with `context` tokens each: memory or arithmetic, the slower.

    >>> machine = Machine("x", 2, 24, read_gb_s=28.0, bf16_gflop_s=450.0, f32_gflop_s=200.0)
    >>> [round(least_ms_per_step(machine, rows, 160)) for rows in (1, 8, 32)]
    [43, 48, 85]
    """
    weights = size.body_weights + size.head_weights
    of_a_row = size.kv_bytes_per_token * context + 2 * size.state_bytes
    moved = size.bytes_per_weight * weights + rows * of_a_row
    return 1e3 * max(moved / (machine.read_gb_s * 1e9), 2 * weights * rows / (machine.gflop_s * 1e9))


def most_prefill_tokens_per_s(machine: Machine, size: ModelSize = RANDOM) -> float:
    """Return the rate of the linear layers alone at the GEMM peak; attention comes on top."""
    return machine.gflop_s * 1e9 / (2 * size.body_weights)


def bound(machine: Machine, workload: Workload, field: str, size: ModelSize = RANDOM) -> float:
    """Return the best value of a figure that this machine allows."""
    prefill_tokens = workload.streams * workload.prompt_len
    prefill_s = prefill_tokens / most_prefill_tokens_per_s(machine, size)
    if field == "prefill_tokens_per_s":
        return prefill_tokens / prefill_s
    step = least_ms_per_step(machine, workload.choices, workload.prompt_len + workload.output_len // 2, size)
    if field == "ms_per_step":
        return step
    seconds = prefill_s + step / 1e3 * (workload.output_len - 1)
    return workload.choices * workload.output_len / seconds


if __name__ == "__main__":
    machine = measure()
    print(machine)
    for rows in (1, 8, 32):
        print(f"{rows} streams: at least {least_ms_per_step(machine, rows, 160):.0f} ms a step")
    print(f"prefill: at most {most_prefill_tokens_per_s(machine):.0f} tokens/s")
    print(asdict(machine))
