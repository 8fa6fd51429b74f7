"""The experts that are reported are those that transformers' own routers choose, however a request was run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from myserve.core.params import SamplingParams
from myserve.engine.engine import Engine
from myserve.engine.requests.options import SubmitOptions
from myserve.engine.runner.routed_experts import routing_shape
from myserve.errors import RequestError
from runs import Asked, Completion, collect, run

MakeEngine = Callable[..., Engine]
each_kind = pytest.mark.parametrize("arch", ["qwen3_moe", "mixtral", "olmoe", "gpt_oss"])
PROMPT = list(range(40, 117))


def asking(seed: int = 1, **params: Any) -> SamplingParams:
    return SamplingParams(
        **({"max_tokens": 12, "seed": seed, "ignore_eos": True, "routed_experts": True} | params)
    )


def of_completion(engine: Engine, completion: Completion) -> np.ndarray[Any, Any]:
    assert engine.routing_shape is not None
    return engine.routing_shape.array([token.routed_experts or b"" for token in completion.tokens])


def of_prompt(engine: Engine, completion: Completion) -> np.ndarray[Any, Any]:
    assert engine.routing_shape is not None
    first, *rest = next(d.prompt_logprobs for d in completion.deltas if d.prompt_logprobs is not None)
    assert first.routed_experts is None, "nothing was run before the first token"
    return engine.routing_shape.array([token.routed_experts or b"" for token in rest])


def chosen_by(model: Any, token_ids: list[int]) -> np.ndarray[Any, Any]:
    """What transformers' routers choose for every token: [T, L, k]."""
    with torch.inference_mode():
        out = model(torch.tensor([token_ids]), output_router_logits=True, use_cache=False)
    k = model.config.num_experts_per_tok
    return torch.stack([logits.topk(k).indices for logits in out.router_logits], 1).numpy()


@each_kind
def test_every_row_is_what_the_models_own_router_chooses(
    arch: str, make_engine: MakeEngine, hf_model: Any
) -> None:
    engine = make_engine(arch)
    [choices] = run(engine, [Asked(PROMPT, asking(prompt_logprobs=0), n=3)])
    own = chosen_by(hf_model(arch), PROMPT)
    assert np.array_equal(of_prompt(engine, choices[0]), own[:-1])
    for choice in choices:
        own = chosen_by(hf_model(arch), PROMPT + choice.ids)
        assert np.array_equal(of_completion(engine, choice), own[len(PROMPT) - 1 : -1])


def test_control_a_perturbed_router_chooses_others(make_engine: MakeEngine, hf_model: Any) -> None:
    engine, model = make_engine("qwen3_moe"), hf_model("qwen3_moe")
    [[choice]] = run(engine, [Asked(PROMPT, asking())])
    gate = model.model.layers[0].mlp.gate.weight
    torch.nn.init.normal_(gate.data)
    own = chosen_by(model, PROMPT + choice.ids)
    assert not np.array_equal(of_completion(engine, choice), own[len(PROMPT) - 1 : -1])


def test_it_does_not_depend_on_how_a_request_is_run(make_engine: MakeEngine) -> None:
    asked = [Asked(PROMPT[: 9 * i + 1], asking(i, prompt_logprobs=0, max_tokens=40)) for i in range(1, 9)]
    company = [Asked(PROMPT[i:], SamplingParams(max_tokens=30, seed=i)) for i in range(4)]

    def everything(engine: Engine, requests: list[Asked]) -> list[list[list[Any]]]:
        done = [choices[0] for choices in run(engine, requests)][: len(asked)]
        return [[of_prompt(engine, c).tolist(), of_completion(engine, c).tolist()] for c in done]

    plain = make_engine("qwen3_moe", prefix_caching=False)
    alone = [everything(plain, [one])[0] for one in asked]
    assert everything(plain, asked + company) == alone
    ragged = make_engine(
        "qwen3_moe", prefix_caching=False, max_num_seqs=8, max_num_batched_tokens=23, prefill_chunk=7
    )
    assert everything(ragged, asked) == alone
    cached = make_engine("qwen3_moe")
    assert everything(cached, asked) == everything(cached, asked) == alone
    tight = make_engine("qwen3_moe", num_blocks=6, max_num_seqs=8)
    assert everything(tight, asked) == alone
    assert tight.scheduler.num_preemptions > 0, "the pool was not small enough to show anything"


def test_a_cached_prefix_leaves_no_row_out(make_engine: MakeEngine) -> None:
    engine = make_engine("mixtral")
    plain = SamplingParams(max_tokens=1, seed=1)
    run(engine, [Asked(PROMPT, plain)])
    [[warm]] = run(engine, [Asked(PROMPT, asking())])
    assert warm.metrics is not None and warm.metrics.cached_tokens == 64
    [[scored]] = run(engine, [Asked(PROMPT, asking(prompt_logprobs=0))])
    assert len(of_prompt(engine, scored)) == len(PROMPT) - 1
    assert np.array_equal(of_completion(engine, warm), of_completion(engine, scored))


def test_a_resumed_completion_goes_on_with_the_same_rows(make_engine: MakeEngine) -> None:
    engine = make_engine("olmoe")
    [[whole]] = run(engine, [Asked(PROMPT, asking())])

    async def resumed() -> Completion:
        prompt = PROMPT + whole.ids[:5]
        return (
            await collect(engine.submit(prompt, asking(max_tokens=7), SubmitOptions(num_prior_tokens=5)))
        )[0]

    rest = asyncio.run(resumed())
    assert rest.ids == whole.ids[5:]
    assert np.array_equal(of_completion(engine, rest), of_completion(engine, whole)[5:])


def test_only_who_asks_is_told_and_only_then_is_the_model_listened_to(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine("qwen3_moe")
    forward, hooks = engine.runner.forward, []

    def watched(*args: Any, **options: Any) -> Any:
        hooks.append(sum(len(module._forward_pre_hooks) for module in engine.runner.model.modules()))
        return forward(*args, **options)

    monkeypatch.setattr(engine.runner, "forward", watched)
    other = SamplingParams(max_tokens=6, seed=2, prompt_logprobs=0)
    run(engine, [Asked(PROMPT, other)])
    assert set(hooks) == {0}
    [[asked], [silent]] = run(engine, [Asked(PROMPT, asking()), Asked(PROMPT, other)])
    assert max(hooks) == 2
    assert all(token.routed_experts is None for token in silent.tokens)
    assert all(token.routed_experts is None for d in silent.deltas for token in d.prompt_logprobs or ())
    assert all(len(token.routed_experts or b"") == 2 * 2 for token in asked.tokens)


def test_over_256_experts_are_uint16(make_engine: MakeEngine) -> None:
    engine = make_engine("wide_moe")
    assert engine.routing_shape is not None
    assert (engine.routing_shape.num_experts, engine.routing_shape.dtype) == (300, "uint16")
    [[choice]] = run(engine, [Asked(PROMPT, asking(prompt_logprobs=0))])
    assert all(len(token.routed_experts or b"") == 2 * 4 * 2 for token in choice.tokens)
    ids = of_prompt(engine, choice)
    assert ids.shape == (len(PROMPT) - 1, 2, 4)
    assert 256 <= ids.max() < 300


def test_layers_without_experts_are_not_counted() -> None:
    config = AutoConfig.for_model(
        "qwen3_moe", num_hidden_layers=5, mlp_only_layers=[0, 3], hidden_size=32, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=8, intermediate_size=8, vocab_size=16,
    )  # fmt: skip
    shape = routing_shape(AutoModelForCausalLM.from_config(config))
    assert shape is not None and shape.num_moe_layers == 3


def test_a_dense_model_has_no_experts_to_report(make_engine: MakeEngine) -> None:
    engine = make_engine("llama")
    assert engine.routing_shape is None
    with pytest.raises(RequestError, match="dense"):
        run(engine, [Asked(PROMPT, asking())])
