"""Kinds of models that differ from Llama's are served with transformers' own numbers, or refused by name."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import trained_tokenizer
from model_zoo import REFUSED, SERVED
from myserve.core.params import SamplingParams
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.errors import UnsupportedModelError
from myserve.trainer.exact_forward import exact_forward
from myserve.trainer.exact_logprobs import exact_logprobs
from runs import Asked, Completion, run, thorough

PROMPTS = [
    [(17 + 31 * i) % 380 for i in range(70)],
    [(5 + 13 * i) % 380 for i in range(11)],
]  # the first: two windows
GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, prompt_logprobs=0)
CLOSE = 1e-3  # float32: 1e-5 for most; HRM's many passes add up


# Those that have what another of them has; and the many passes of HRM cost as much as ten others.
REPEATS = {
    "cohere", "falcon_h1", "hrm_text", "llama-yarn", "llama4_text-odd", "minicpm3", "olmo_hybrid", "opt-projected",
    "phi", "phimoe-window", "qwen2_moe", "qwen3_next", "smollm3", "stablelm", "starcoder2",
}  # fmt: skip


@pytest.fixture(params=[thorough(name) if name in REPEATS else name for name in SERVED])
def served(
    request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]
) -> Iterator[tuple[Engine, Path]]:
    path = tiny_model(request.param)
    engine = Engine.from_pretrained(str(path), EngineConfig(num_blocks=64, max_num_seqs=8))
    yield engine, path
    engine.shutdown()
    gc.collect()


def test_greedy_tokens_and_logprobs_are_transformers_alone_and_together(served: tuple[Engine, Path]) -> None:
    engine, path = served
    asked = [Asked(prompt, GREEDY) for prompt in PROMPTS]
    together = [choices[0] for choices in run(engine, asked)]
    own = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    for completion, prompt in zip(together, PROMPTS, strict=True):
        ids = [*prompt, *completion.ids]
        with torch.inference_mode():
            logprobs = own(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)  # [T, V]
        drawn = logprobs[len(prompt) - 1 : -1]
        assert completion.ids == drawn.argmax(-1).tolist()
        wanted = [float(logprobs[i, token]) for i, token in enumerate(ids[1:])]
        assert numbers(completion) == pytest.approx(wanted, abs=CLOSE)
    alone = [run(engine, [one])[0][0] for one in asked]
    assert [c.numbers for c in alone] == [c.numbers for c in together]
    assert engine.exactness["rows_are_independent"]


def numbers(completion: Completion) -> list[float]:
    """The logprobs of the prompt's tokens and of those drawn."""
    scored: Any = next(d.prompt_logprobs for d in completion.deltas if d.prompt_logprobs is not None)
    return [entry.logprob for entry in scored[1:]] + [token.logprob for token in completion.tokens]


@pytest.mark.parametrize(
    "name",
    [
        "deepseek_v3",
        "qwen2_moe-window",
        "phimoe-window",
        "diffllama",
        "starcoder2",
        "gpt_bigcode",
        "afmoe",
        "qwen2_moe",
        "gemma4-shared",
        "olmo_hybrid",
        "falcon_h1",
        "lfm2",
        "llama4_text",
        "llama4_text-odd",
        "jetmoe",
        "hy_v4",
    ],
)
def test_a_trainer_has_the_servers_bits(name: str, tiny_model: Callable[[str], Path]) -> None:
    """Where values are narrower than keys, where a window stands in the mask alone, and with gates, biases, GELU.

    `python -m tools.models` compares every kind that runs.
    """
    path = tiny_model(name)
    engine = Engine.from_pretrained(str(path), EngineConfig(num_blocks=64))
    try:
        ((completion,),) = run(engine, [Asked(PROMPTS[0], GREEDY)])
    finally:
        engine.shutdown()
    model = exact_forward(AutoModelForCausalLM.from_pretrained(path).eval())
    ids = torch.tensor([[*PROMPTS[0], *completion.ids]])
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    assert numbers(completion) == exact_logprobs(logits, ids[0, 1:]).tolist()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    arch, config, word = REFUSED[name]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **config)).save_pretrained(tmp_path)
    trained_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=word) as caught:
        Engine.from_pretrained(str(tmp_path), EngineConfig(num_blocks=16))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
