"""With the engine's experts replayed, a trainer's logprobs are the engine's; without, they are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from myserve import exact_forward, replay_routing
from myserve.core.logprobs import prompt_logprobs
from myserve.core.params import SamplingParams
from myserve.engine.engine import Engine
from myserve.engine.runner.routed_experts import RoutedExperts
from myserve.errors import RequestError, UnsupportedModelError
from runs import Asked, run

MakeEngine = Callable[..., Engine]
KINDS = ["qwen3_moe", "mixtral", "olmoe", "gpt_oss"]
PROMPTS = [list(range(40, 77)), list(range(200, 290)), list(range(5, 9))]


class Rollout:
    """Completions of the engine as a trainer's padded batch: [B, T] ids and mask, [B, T, L, k] experts."""

    def __init__(self, engine: Engine) -> None:
        params = SamplingParams(
            max_tokens=40, seed=3, ignore_eos=True, routed_experts=True, prompt_logprobs=0
        )
        done = [choices[0] for choices in run(engine, [Asked(prompt, params) for prompt in PROMPTS])]
        self.sequences = [prompt + c.ids for prompt, c in zip(PROMPTS, done, strict=True)]
        shape = engine.routing_shape
        assert shape is not None
        self.num_experts = shape.num_experts
        width = max(map(len, self.sequences))
        self.batch = {
            "input_ids": torch.tensor([s + [0] * (width - len(s)) for s in self.sequences]),
            "attention_mask": torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in self.sequences]),
        }
        size = (len(done), width, shape.num_moe_layers, shape.experts_per_token)
        self.routing = torch.full(size, -1)
        self.logprobs: list[list[float]] = []  # of every token but the first
        for row, choice in zip(self.routing, done, strict=True):
            scores = next(d.prompt_logprobs for d in choice.deltas if d.prompt_logprobs is not None)[1:]
            tokens = [*scores, *choice.tokens]
            self.logprobs.append([token.logprob or 0.0 for token in tokens])
            ids = shape.array([token.routed_experts or b"" for token in tokens])
            row[: len(tokens)] = torch.tensor(ids)

    def others(self, routing: Tensor) -> Tensor:
        """The next expert in place of each; -1 stays."""
        return torch.where(routing < 0, -1, (routing + 1) % self.num_experts)

    def logprobs_by(self, model: Any) -> list[list[float]]:
        with torch.inference_mode():
            logits = model(**self.batch, use_cache=False).logits
        return [
            [s.logprob or 0.0 for s in prompt_logprobs(rows[: len(ids) - 1], ids[1:])]
            for rows, ids in zip(logits, self.sequences, strict=True)
        ]

    def distance(self, other: list[list[float]]) -> float:
        """The largest difference of a logprob from the engine's."""
        pairs = zip(np.concatenate(self.logprobs), np.concatenate(other), strict=True)
        return max(abs(a - b) for a, b in pairs)


@pytest.fixture
def load(tiny_model: Callable[[str], Path]) -> Callable[..., Any]:
    """A trainer's model."""

    def load_(arch: str, dtype: torch.dtype = torch.float32) -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_model(arch), dtype=dtype).eval()

    return load_


def experts_used(model: Any, rollout: Rollout) -> Tensor:
    """[B, T, L, k], by listening to a forward pass."""
    listener = RoutedExperts(model)
    with listener.capturing(True) as heard, torch.inference_mode():
        model(**rollout.batch, use_cache=False)
    assert listener.shape is not None
    rows = heard.rows(range(rollout.routing.shape[:2].numel()))
    return torch.tensor(listener.shape.array([row or b"" for row in rows])).view(rollout.routing.shape).long()


# ---- the engine's numbers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", KINDS)
def test_an_exact_trainer_has_the_engines_bits(
    arch: str, dtype: str, make_engine: MakeEngine, load: Any
) -> None:
    rollout = Rollout(make_engine(arch, dtype=dtype))
    model = exact_forward(load(arch, getattr(torch, dtype)))
    with replay_routing(model, rollout.routing):
        assert rollout.logprobs_by(model) == rollout.logprobs
    with replay_routing(model, rollout.others(rollout.routing)):  # control
        assert rollout.logprobs_by(model) != rollout.logprobs


@pytest.mark.parametrize("arch", KINDS)
def test_an_exact_trainer_has_the_bits_of_an_engine_in_int8(
    arch: str, make_engine: MakeEngine, load: Any
) -> None:
    rollout = Rollout(make_engine(arch, dtype="bfloat16", quantize="int8"))
    with replay_routing(model := exact_forward(load(arch, torch.bfloat16), quantize="int8"), rollout.routing):
        assert rollout.logprobs_by(model) == rollout.logprobs
    with replay_routing(model := exact_forward(load(arch, torch.bfloat16)), rollout.routing):  # control
        assert rollout.logprobs_by(model) != rollout.logprobs


@pytest.mark.parametrize("arch", KINDS)
def test_a_plain_trainer_of_another_precision_comes_close_with_replay_alone(
    arch: str, make_engine: MakeEngine, load: Any
) -> None:
    rollout = Rollout(make_engine(arch, dtype="bfloat16"))
    known = (rollout.routing >= 0).all(-1).all(-1)
    model = load(arch)
    # control: its own routers choose otherwise here and there, and a token whose expert differs is far off
    assert not torch.equal(experts_used(model, rollout)[known], rollout.routing[known])
    without = rollout.distance(rollout.logprobs_by(model))
    with replay_routing(model, rollout.routing):
        assert torch.equal(experts_used(model, rollout)[known], rollout.routing[known])
        replayed = rollout.distance(rollout.logprobs_by(model))
    assert replayed < without / 2


def test_a_router_that_has_drifted_is_overruled(make_engine: MakeEngine, load: Any) -> None:
    rollout = Rollout(make_engine("mixtral"))
    model = load("mixtral")
    known = (rollout.routing >= 0).all(-1).all(-1)
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data += 0.1 * torch.randn_like(layer.mlp.gate.weight)
    assert not torch.equal(experts_used(model, rollout)[known], rollout.routing[known])
    with replay_routing(model, rollout.routing):
        assert torch.equal(experts_used(model, rollout)[known], rollout.routing[known])


def test_tokens_without_routing_are_the_models_own(make_engine: MakeEngine, load: Any) -> None:
    rollout, model = Rollout(make_engine("qwen3_moe")), load("qwen3_moe")
    own = experts_used(model, rollout)
    others = rollout.others(own)
    others[:, ::2] = -1
    with replay_routing(model, others.flatten(0, 1)):  # one batch, given as rows behind one another
        used = experts_used(model, rollout)
    assert torch.equal(used[:, 1::2], others[:, 1::2])
    assert torch.equal(used[:, ::2, 0], own[:, ::2, 0])


def test_arrays_of_any_integer_do(make_engine: MakeEngine, load: Any) -> None:
    rollout, model = Rollout(make_engine("qwen3_moe")), load("qwen3_moe")
    row = np.frombuffer(rollout.routing[1].clamp(min=0).sort().values.numpy().astype("<u2"), "<u2")
    ids = row.reshape(rollout.routing.shape[1:])
    ids = np.where(ids[..., :1] == ids[..., 1:], [0, 1], ids).astype("<u2")
    batch = {"input_ids": rollout.batch["input_ids"][1:2]}
    outputs = []
    for routing in (ids, ids.astype(np.int16), torch.tensor(ids.astype(np.uint8))):
        with replay_routing(model, routing), torch.inference_mode():
            outputs.append(model(**batch).logits)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[1], outputs[2])


# ---- gradients


def loss_of(model: Any, rollout: Rollout) -> Tensor:
    logits = model(**rollout.batch, use_cache=False).logits[rollout.batch["attention_mask"].bool()]
    loss: Tensor = -logits.log_softmax(-1)[:, 7].mean()
    return loss


def gradients(model: Any, rollout: Rollout) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, rollout).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("arch", KINDS)
def test_replaying_a_models_own_choice_changes_nothing(arch: str, make_engine: MakeEngine, load: Any) -> None:
    rollout, model = Rollout(make_engine(arch)), load(arch)
    plain = gradients(model, rollout)
    with replay_routing(model, experts_used(model, rollout)):
        replayed = gradients(model, rollout)
    # A library's products: last bits may follow where memory lies.
    torch.testing.assert_close(replayed, plain)


@pytest.mark.parametrize("arch", KINDS)
def test_gradients_are_those_of_the_loss_at_the_replayed_experts(
    arch: str, make_engine: MakeEngine, load: Any
) -> None:
    """A finite difference through every router at once, in float64: smooth, for the choice cannot change."""
    rollout, model = Rollout(make_engine(arch)), load(arch, torch.float64)
    model.set_experts_implementation("eager")  # the default's grouped products know no float64
    routers = [p for name, p in model.named_parameters() if "gate.weight" in name or "router.weight" in name]
    assert len(routers) == 2
    others = rollout.others(experts_used(model, rollout))
    torch.manual_seed(0)
    directions = [torch.randn_like(p) for p in routers]

    def moved(step: float) -> float:
        with torch.no_grad():
            for p, direction in zip(routers, directions, strict=True):
                p += step * direction
            loss = float(loss_of(model, rollout))
            for p, direction in zip(routers, directions, strict=True):
                p -= step * direction
        return loss

    with replay_routing(model, others):
        grad = gradients(model, rollout)
        slope = sum(float((p.grad * d).sum()) for p, d in zip(routers, directions, strict=True))
        assert abs(slope) > 1e-6 and grad
        # a step that drowns the rounding of the softmax, which is in float32 whatever the model is in
        assert (moved(1e-3) - moved(-1e-3)) / 2e-3 == pytest.approx(slope, rel=2e-3)


def test_gradient_checkpointing_runs_it_again(make_engine: MakeEngine, load: Any) -> None:
    rollout, model = Rollout(make_engine("qwen3_moe")), load("qwen3_moe").train()
    others = rollout.others(experts_used(model, rollout))
    with replay_routing(model, others):
        plain = gradients(model, rollout)
        model.activation_checkpointing_enable({"use_reentrant": False})
        again = gradients(model, rollout)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)


# ---- nothing is left behind, and nothing wrong is taken


def test_outside_the_block_the_model_is_as_before(make_engine: MakeEngine, load: Any) -> None:
    rollout, model = Rollout(make_engine("qwen3_moe")), load("qwen3_moe")
    before = rollout.logprobs_by(model)
    others = rollout.others(experts_used(model, rollout))
    with pytest.raises(ZeroDivisionError), replay_routing(model, others):
        assert rollout.logprobs_by(model) != before
        raise ZeroDivisionError
    with pytest.raises(RequestError, match="padding included"), replay_routing(model, others[:2]):
        rollout.logprobs_by(model)
    assert rollout.logprobs_by(model) == before


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        (torch.zeros(5, 3, 2, dtype=torch.int64), r"\[tokens, 2, 2\].*got \[5, 3, 2\]"),
        (torch.zeros(5, 2, 1, dtype=torch.uint8), r"got \[5, 2, 1\]"),
        (torch.zeros(2, 2, dtype=torch.uint8), r"got \[2, 2\]"),
        (torch.zeros(5, 2, 2), "integer expert ids"),
        (np.zeros((5, 2, 2)), "integer expert ids"),
        (torch.tensor([0, 8]).expand(5, 2, 2), "experts 0 to 8; this model's are 0 to 7"),
        (torch.tensor([-2, 1]).expand(5, 2, 2), "experts -2 to 1"),
        (torch.tensor([4, 4]).expand(5, 2, 2), "different experts"),
        (torch.tensor([-1, 4]).expand(5, 2, 2), "or -1 for all of them"),
    ],
)
def test_routing_that_does_not_fit_is_refused(routing: Any, message: str, load: Any) -> None:
    with pytest.raises(RequestError, match=message), replay_routing(load("qwen3_moe"), routing):
        raise AssertionError("it was taken")


def test_a_router_that_limits_groups_first_is_replayed_too() -> None:
    config = AutoConfig.for_model(
        "deepseek_v3", hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=8, n_group=2, topk_group=1, vocab_size=64,
        num_experts_per_tok=2, first_k_dense_replace=0, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8,
        v_head_dim=8, qk_nope_head_dim=8,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    routing = torch.tensor([7, 0]).expand(5, 2, 2)  # of two groups, which the model itself would never take
    listener = RoutedExperts(model)
    with replay_routing(model, routing), listener.capturing(True) as heard:
        model(torch.zeros(1, 5, dtype=torch.int64))
    assert heard.rows(range(5)) == [bytes([7, 0, 7, 0])] * 5


def test_models_without_such_routers_are_refused(load: Any) -> None:
    routing = torch.tensor([0, 1]).expand(5, 2, 2)
    with pytest.raises(UnsupportedModelError, match="no experts"), replay_routing(load("llama"), routing):
        raise AssertionError("it was taken")
    sorting = load("mixtral")
    gate = sorting.model.layers[1].mlp.gate
    gate.forward = lambda x: (x, torch.ones(len(x), 2), (x @ gate.weight.T).argsort(-1)[:, :2])
    with pytest.raises(UnsupportedModelError, match="0 times"), replay_routing(sorting, routing):
        sorting(torch.zeros(1, 5, dtype=torch.int64))
