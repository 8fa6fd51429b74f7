"""Llama 4: contexts cut into chunks, queries scaled by their position, experts whose inputs are weighted.

That greedy tokens and logprobs are transformers' own is in `test_model_zoo.py` too; chunks are of 20 tokens here, of 17
in the odd one, positions scale from 16 on, and requests are several times as long.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from conftest import trained_tokenizer
from drafters import run_drafting
from model_zoo import SERVED
from myserve.core.params import SamplingParams
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.runner import model_runner, model_structure
from myserve.errors import UnsupportedModelError
from myserve.trainer.completion_logits import completion_logits
from myserve.trainer.exact_forward import exact_forward
from myserve.trainer.exact_logprobs import exact_logprobs
from myserve.trainer.replay_routing import replay_routing
from runs import Asked, mixed_requests, run

MakeEngine = Callable[..., Engine]
MODELS = [("llama4_text", "float32"), ("llama4_text-odd", "bfloat16")]
each_model = pytest.mark.parametrize(("arch", "dtype"), MODELS, ids=str)
PROMPT = [(3 + 7 * i) % 380 for i in range(75)]
SAMPLED = SamplingParams(max_tokens=30, seed=5, ignore_eos=True)


def numbers(engine: Engine, asked: list[Asked]) -> list[list[tuple[int, float, float]]]:
    done = [choices[0].numbers for choices in run(engine, asked)]
    engine.scheduler.check_integrity()
    return done


@each_model
def test_alone_together_chunked_preempted_drafted_and_cached_a_request_has_the_same_bits(
    arch: str, dtype: str, make_engine: MakeEngine
) -> None:
    engine = make_engine(arch, dtype=dtype, speculation="5")
    assert {call.chunk for call in engine.runner.structure.calls} == {
        SERVED[arch][1]["attention_chunk_size"],
        0,
    }
    assert engine.exactness["rows_are_independent"]
    asked = [*mixed_requests(8, seed=2, max_tokens=24), Asked(PROMPT, SAMPLED)]
    plain = run(engine, asked)
    together = [choices[0].numbers for choices in plain]
    assert [numbers(engine, [one])[0] for one in asked] == together
    ragged = make_engine(arch, dtype=dtype, max_num_seqs=8, max_num_batched_tokens=23, prefill_chunk=7)
    assert numbers(ragged, asked) == together
    tight = make_engine(arch, dtype=dtype, num_blocks=4, max_num_seqs=6)
    assert numbers(tight, asked) == together
    assert tight.scheduler.num_preemptions, "the pool was not small enough to show anything"
    assert [c[0].numbers for c in run_drafting(engine, asked, "mixed", plain)] == together
    [[warm]] = run(engine, [asked[-1]])
    assert warm.metrics is not None and warm.metrics.cached_tokens == 64
    assert warm.numbers == together[-1]


def test_the_text_of_a_checkpoint_with_pictures_is_transformers_beyond_several_chunks(tmp_path: Path) -> None:
    vision = {
        "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
    }  # fmt: skip
    text = SERVED["llama4_text"][1] | {
        "attention_chunk_size": 16,
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 1, 1, 0],
    }
    torch.manual_seed(0)
    own = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model("llama4", text_config=text, vision_config=vision)
    )
    own.eval().save_pretrained(tmp_path)
    trained_tokenizer().save_pretrained(tmp_path)
    engine = Engine.from_pretrained(str(tmp_path), EngineConfig(num_blocks=16))
    try:
        ((completion,),) = run(
            engine, [Asked(PROMPT, SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))]
        )
        engine.update_weights(str(tmp_path)).result()  # its towers are passed over
    finally:
        engine.shutdown()
    own.generation_config.eos_token_id = None
    ids = own.generate(torch.tensor([PROMPT]), max_new_tokens=40, do_sample=False)[0]
    assert completion.ids == ids[len(PROMPT) :].tolist()
    with torch.inference_mode():
        logprobs = own(ids[None]).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    wanted = logprobs.gather(1, ids[len(PROMPT) :, None])[:, 0].tolist()
    assert [token.logprob for token in completion.tokens] == pytest.approx(wanted, abs=1e-3)


def test_control_a_chunk_that_is_dropped_is_found_out(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = model_runner.observe

    def without_chunks(model: Any) -> Any:
        structure = honest(model)
        return replace(structure, calls=tuple(replace(call, chunk=0) for call in structure.calls))

    monkeypatch.setattr(model_runner, "observe", without_chunks)
    with pytest.raises(UnsupportedModelError, match="other logits"):
        Engine.from_pretrained(str(tiny_model("llama4_text")), EngineConfig(num_blocks=16))


def test_control_positions_that_are_not_told_are_found_out(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_structure, "tell_positions", lambda model: 0)
    with pytest.raises(UnsupportedModelError, match="other bits in another batch"):
        Engine.from_pretrained(str(tiny_model("llama4_text")), EngineConfig(num_blocks=16))


@each_model
def test_a_trainer_has_the_servers_bits_padded_with_shared_prompts_and_replayed(
    arch: str, dtype: str, make_engine: MakeEngine, tiny_model: Callable[[str], Path]
) -> None:
    prompts = [PROMPT[:45], PROMPT[:9]]
    routed = replace(SAMPLED, max_tokens=14, routed_experts=True)
    drawn = run(make_engine(arch, dtype=dtype), [Asked(prompt, routed, n=2) for prompt in prompts])
    samples = [(prompt, c) for prompt, choices in zip(prompts, drawn, strict=True) for c in choices]
    wanted = [t.logprob for _, c in samples for t in c.tokens]
    model = AutoModelForCausalLM.from_pretrained(tiny_model(arch), dtype=getattr(torch, dtype)).eval()
    exact_forward(model)
    ids, width = [c.ids for _, c in samples], max(len(p) + len(c.ids) for p, c in samples)
    with torch.no_grad():
        logits = completion_logits(model, [p for p, _ in samples], ids)
    assert exact_logprobs(logits, torch.tensor([i for row in ids for i in row])).tolist() == wanted
    padded = torch.zeros(len(samples), width, dtype=torch.int64)
    for row, (prompt, c) in enumerate(samples):  # on the left
        padded[row, width - len(prompt) - len(c.ids) :] = torch.tensor([*prompt, *c.ids])
    lengths = torch.tensor([len(p) + len(c.ids) for p, c in samples])
    mask = (torch.arange(width) >= width - lengths[:, None]).long()
    batch = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        full = model(padded, **batch).logits
    found = [
        exact_logprobs(full[row, -len(c.ids) - 1 : -1], torch.tensor(c.ids)).tolist()
        for row, (_, c) in enumerate(samples)
    ]
    assert [x for row in found for x in row] == wanted
    layers, chosen = len(SERVED[arch][1]["moe_layers"]), SERVED[arch][1].get("num_experts_per_tok", 1)
    given = torch.full((*padded.shape, layers, chosen), -1)
    for row, (_, c) in enumerate(samples):  # a token's experts are those that drew it: of the token before
        used = [list(t.routed_experts or b"") for t in c.tokens]
        given[row, -len(used) - 1 : -1] = torch.tensor(used).reshape(len(used), layers, chosen)
    with torch.no_grad(), replay_routing(model, given):
        assert torch.equal(model(padded, **batch).logits, full)
    with (
        torch.no_grad(),
        replay_routing(model, torch.where(given < 0, given, (given + 1) % 4)),
    ):  # the control
        assert not torch.equal(model(padded, **batch).logits, full)


def test_gradients_are_transformers_own(tiny_model: Callable[[str], Path]) -> None:
    found = []
    prompts, completions = [PROMPT[:50]] * 2 + [PROMPT[:5]], [[1, 2, 3], [4, 5], [6]]
    for way in ("ours", "theirs", "shared"):
        model = AutoModelForCausalLM.from_pretrained(tiny_model("llama4_text-odd")).eval()
        if way != "theirs":
            exact_forward(model)
        if way == "shared":
            logits = completion_logits(model, prompts, completions)
        else:
            both = zip(prompts, completions, strict=True)
            logits = torch.cat([model(torch.tensor([p + c])).logits[0, len(p) - 1 : -1] for p, c in both])
        F.cross_entropy(logits, torch.tensor([i for row in completions for i in row])).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    ours, theirs, shared = found
    for name, grad in theirs.items():
        assert grad is not None, name
        for other in (ours[name], shared[name]):
            assert other is not None, name
            assert torch.allclose(other, grad, atol=1e-4 * float(grad.abs().max()) + 1e-7, rtol=1e-2), name
