"""A mixture of experts that can already add: the embedded model, each MLP become several that differ a little.

python examples/upcycle.py runs/moe
python examples/grpo.py --model runs/moe --replay --run runs/grpo-moe
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from myserve.embedded import embedded_model_path

EXPERTS, PER_TOKEN, NOISE = 8, 2, 0.05  # noise: share of each weight's own spread


def upcycle(folder: Path, source: str | Path | None = None) -> Path:
    """Writes the model to `folder`: Qwen3's attention as it is, a random router, experts that differ by noise."""
    source = source or embedded_model_path()
    load: Any = AutoModelForCausalLM.from_pretrained
    dense: Any = load(source, dtype=torch.float32)
    kept = {
        k: v
        for k, v in dense.config.to_dict().items()
        if k not in ("model_type", "architectures", "layer_types")
    }
    moe = {
        "num_experts": EXPERTS,
        "num_experts_per_tok": PER_TOKEN,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    }
    width = {
        "moe_intermediate_size": dense.config.intermediate_size,
        "mlp_only_layers": [],
        "dtype": "float32",
    }
    torch.manual_seed(7)
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("qwen3_moe", **{**kept, **moe, **width})
    )
    weights = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        for sparse, whole in zip(model.model.layers, dense.model.layers, strict=True):
            gate_up = torch.cat([whole.mlp.gate_proj.weight, whole.mlp.up_proj.weight])
            for experts, weight in (
                (sparse.mlp.experts.gate_up_proj, gate_up),
                (sparse.mlp.experts.down_proj, whole.mlp.down_proj.weight),
            ):
                experts.copy_(weight + NOISE * weight.std() * torch.randn_like(experts))
    model.generation_config = dense.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print(upcycle(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/moe")))
