"""Experts that take their rows sorted: our sums, alone and in company, and a trainer's in int8 too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts

from myserve.core.params import SamplingParams
from myserve.engine.batch_invariance.grouped_linear import GroupedLinear, is_grouped_linear
from myserve.engine.batch_invariance.linear import PackedWeight
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.trainer.exact_forward import exact_forward
from myserve.trainer.exact_logprobs import exact_logprobs
from runs import Asked, run


@torch.inference_mode()
def test_rows_do_not_depend_on_how_many_others_chose_their_expert() -> None:
    torch.manual_seed(0)
    own = JetMoeParallelExperts(3, 40, 24)
    nn.init.normal_(own.weight)
    ours = GroupedLinear([PackedWeight(weight) for weight in own.weight])
    x = torch.randn(70, 40)
    got = ours(x, [60, 0, 10])
    torch.testing.assert_close(got, own(x, [60, 0, 10]))
    assert torch.equal(torch.cat([ours(row[None], [1, 0, 0]) for row in x[:60]]), got[:60])
    assert torch.equal(ours(x[60:62], [0, 0, 2]), got[60:62])
    assert is_grouped_linear(own) and not is_grouped_linear(ours)


@torch.inference_mode()
def test_control_the_librarys_rows_do() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(64, 512), torch.randn(200, 512)
    whole = F.linear(x, weight)
    assert not torch.equal(torch.cat([F.linear(row[None], weight) for row in x]), whole)


def test_a_trainer_of_int8_has_the_servers_bits(tiny_model: Callable[[str], Path]) -> None:
    path, prompt = tiny_model("jetmoe"), [(17 + 31 * i) % 380 for i in range(40)]
    engine = Engine.from_pretrained(str(path), EngineConfig(num_blocks=32, quantize="int8"))
    params = SamplingParams(max_tokens=8, seed=1, ignore_eos=True)
    try:
        ((completion,),) = run(engine, [Asked(prompt, params)])
        experts = [name for name in engine.quantization["unquantized"] if "experts" in name]
        assert not [name for name in experts if not name.endswith("router.layer")], experts
    finally:
        engine.shutdown()
    model = exact_forward(AutoModelForCausalLM.from_pretrained(path).eval(), quantize="int8")
    ids = torch.tensor([[*prompt, *completion.ids]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
    assert [t.logprob for t in completion.tokens] == exact_logprobs(logits, ids[0, len(prompt) :]).tolist()
