"""A trainer's recurrent layers have the engine's bits, and transformers' own gradients, whatever the model's kind.

Padding on the left and choices that share a prompt's state in more than one dtype are in `engine/test_hybrids.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from model_zoo import HYBRIDS
from myserve.core.params import SamplingParams
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.requests.options import SubmitOptions
from myserve.trainer.completion_logits import completion_logits
from myserve.trainer.exact_forward import exact_forward
from myserve.trainer.exact_logprobs import exact_logprobs
from runs import Asked, collect, run

each_hybrid = pytest.mark.parametrize("arch", HYBRIDS)
PROMPTS = [[(3 + 7 * i) % 380 for i in range(35)], [9, 8, 7, 6, 5]]
COMPLETIONS = [[1, 2, 3], [4, 5]]


@each_hybrid
def test_logprobs_of_shared_prompts_are_the_servers(arch: str, tiny_model: Callable[[str], Path]) -> None:
    path = tiny_model(arch)
    params = SamplingParams(max_tokens=6, seed=5, ignore_eos=True)
    engine = Engine.from_pretrained(str(path), EngineConfig(num_blocks=32, max_num_seqs=4))
    try:
        assert engine.exactness["rows_are_independent"]
        drawn = run(engine, [Asked(prompt, params, n=2) for prompt in PROMPTS])
    finally:
        engine.shutdown()
    samples = [(prompt, c) for prompt, choices in zip(PROMPTS, drawn, strict=True) for c in choices]
    targets = torch.tensor([i for _, c in samples for i in c.ids])
    prompts, ids = [p for p, _ in samples], [c.ids for _, c in samples]
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        before = completion_logits_of_theirs(model, prompts, ids)
        logits = completion_logits(exact_forward(model), prompts, ids)
    wanted = [t.logprob for _, c in samples for t in c.tokens]
    assert exact_logprobs(logits, targets).tolist() == wanted
    theirs = before.log_softmax(-1).gather(1, targets[:, None])[:, 0].tolist()
    assert theirs == pytest.approx(wanted, abs=1e-3)
    assert theirs != wanted  # the control: other orders of summing have other bits


@pytest.mark.parametrize("arch", ["jamba", "zamba"])
def test_on_int8_rollouts_the_mismatch_is_zero(arch: str, tiny_model: Callable[[str], Path]) -> None:
    """Layers that multiply by weights themselves do it in int8, too."""
    path, ids = tiny_model(arch), torch.tensor([PROMPTS[0]])
    engine = Engine.from_pretrained(str(path), EngineConfig(num_blocks=32, quantize="int8"))
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    try:
        ((completion,),) = run(engine, [Asked(PROMPTS[0], params)])
    finally:
        engine.shutdown()
    scored = next(d.prompt_logprobs for d in completion.deltas if d.prompt_logprobs is not None)
    found = []
    for quantize in ("int8", "off"):
        model = exact_forward(AutoModelForCausalLM.from_pretrained(path).eval(), quantize=quantize)  # type: ignore[arg-type]
        with torch.no_grad():
            found.append(exact_logprobs(model(ids).logits[0, :-1], ids[0, 1:]).tolist())
    assert found[0] == [entry.logprob for entry in scored[1:] if entry is not None] != found[1]


def test_a_loop_of_reinforcement_has_a_mismatch_of_exactly_0_beside_a_stream_that_runs(
    tiny_model: Callable[[str], Path],
) -> None:
    """Draw, compare, step, load into the server: what examples/grpo.py does, with a reward that a random model has."""
    path = tiny_model("qwen3_5_text")
    engine = Engine.from_pretrained(str(path), EngineConfig(num_blocks=64, max_num_seqs=8))
    model = exact_forward(AutoModelForCausalLM.from_pretrained(path).eval())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    params = SamplingParams(max_tokens=12, seed=1, ignore_eos=True)

    async def loop() -> list[list[int]]:
        drawn: list[list[int]] = []
        for version in range(3):
            group = await collect(engine.submit(PROMPTS[1], params, SubmitOptions(n=4)))
            ids = [choice.ids for choice in group]
            drawn.append([i for row in ids for i in row])
            logits = completion_logits(model, [PROMPTS[1]] * 4, ids)
            logprobs = exact_logprobs(logits, torch.tensor(drawn[-1]))
            tokens = [token for choice in group for token in choice.tokens]
            assert logprobs.tolist() == [token.logprob for token in tokens]
            assert {token.weight_version for token in tokens} == {version}
            advantages = torch.tensor([float(i % 2) - 0.5 for i in drawn[-1]])
            optimizer.zero_grad()
            (-advantages * logprobs).mean().backward()
            optimizer.step()
            long = SamplingParams(max_tokens=150, seed=2, ignore_eos=True)
            running = asyncio.create_task(collect(engine.submit(PROMPTS[0], long)))
            await engine.update_weights(model.state_dict())
            versions = [token.weight_version for token in (await running)[0].tokens]
            assert len(versions) == 150 and versions == sorted(versions)
        return drawn

    try:
        drawn = asyncio.run(loop())
        engine.scheduler.check_integrity()
        states = engine.scheduler.block_tables.states
        assert states is not None and states.num_free == states.num_slots
    finally:
        engine.shutdown()
    assert drawn[0] != drawn[2]  # the control: the weights are others


@each_hybrid
def test_gradients_are_transformers_own(arch: str, tiny_model: Callable[[str], Path]) -> None:
    found = []
    for is_ours in (True, False):
        model = AutoModelForCausalLM.from_pretrained(tiny_model(arch)).eval()
        prompts = [PROMPTS[1]] * 2
        if is_ours:
            logits = completion_logits(exact_forward(model), prompts, COMPLETIONS)
        else:
            logits = completion_logits_of_theirs(model, prompts, COMPLETIONS)
        F.cross_entropy(logits, torch.tensor([i for row in COMPLETIONS for i in row])).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    ours, theirs = found
    assert ours.keys() == theirs.keys() and any("conv" in name or "qkv_proj" in name for name in ours)
    for name, grad in theirs.items():
        close = torch.allclose(ours[name], grad, atol=1e-4 * float(grad.abs().max()) + 1e-7, rtol=1e-2)
        assert close, name


@pytest.mark.parametrize(
    ("arch", "dtype"), [("qwen3_5_text", torch.bfloat16), ("nemotron_h", torch.float32)], ids=str
)
def test_policy_gradients_on_a_hybrid_have_a_mismatch_of_exactly_0(
    arch: str, dtype: torch.dtype, tiny_model: Callable[[str], Path]
) -> None:
    """GRPO's loop: draw groups, reward even ids, take a step, send the weights; then the control, unsent ones."""
    path, found = tiny_model(arch), []
    engine = Engine.from_pretrained(
        str(path), EngineConfig(num_blocks=48, dtype=str(dtype).removeprefix("torch."))
    )
    policy = exact_forward(AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval())
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    try:
        for step in range(4):
            params = SamplingParams(max_tokens=8, seed=step, ignore_eos=True)
            drawn = run(engine, [Asked(prompt, params, n=4) for prompt in PROMPTS])
            ids = [c.ids for choices in drawn for c in choices]
            logits = completion_logits(policy, [p for p in PROMPTS for _ in range(4)], ids)
            logprobs = exact_logprobs(logits, torch.tensor([i for row in ids for i in row]))
            of_server = torch.tensor([t.logprob for choices in drawn for c in choices for t in c.tokens])
            found.append(float((logprobs.detach() - of_server).abs().max()))
            rewards = torch.tensor([[sum(i % 2 == 0 for i in c.ids) for c in row] for row in drawn]).float()
            advantages = (rewards - rewards.mean(1, keepdim=True)).flatten().repeat_interleave(8)
            optimizer.zero_grad()
            (-(advantages * logprobs).mean()).backward()
            optimizer.step()
            if step < 2:
                engine.update_weights(policy.state_dict()).result()
    finally:
        engine.shutdown()
    assert found[:3] == [0.0, 0.0, 0.0] and found[3] > 0


def completion_logits_of_theirs(
    model: torch.nn.Module, prompts: list[list[int]], completions: list[list[int]]
) -> torch.Tensor:  # [tokens of all completions, V]
    rows = [
        model(torch.tensor([p + c]), use_cache=False).logits[0, len(p) - 1 : -1]
        for p, c in zip(prompts, completions, strict=True)
    ]
    return torch.cat(rows)
