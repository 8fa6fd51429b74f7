"""Models whose index chooses keys are served exactly in contexts that it takes whole, and say where these end.

That greedy tokens and logprobs are transformers' own is in `test_model_zoo.py` too; indexes choose 100 keys here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from drafters import run_drafting
from myserve.core.params import SamplingParams
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.errors import ContextLengthError, RequestError, UnsupportedModelError
from myserve.trainer.completion_logits import completion_logits
from myserve.trainer.exact_forward import exact_forward
from myserve.trainer.exact_logprobs import exact_logprobs
from runs import Asked, mixed_requests, run

MakeEngine = Callable[..., Engine]
LIMIT = 100
PROMPT = [(3 + 7 * i) % 380 for i in range(75)]
of_keys_and_of_blocks = pytest.mark.parametrize("arch", ["deepseek_v32", "minimax_m3_vl_text"])


def numbers(engine: Engine, asked: list[Asked]) -> list[list[tuple[int, float, float]]]:
    done = [choices[0].numbers for choices in run(engine, asked)]
    engine.scheduler.check_integrity()
    return done


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [("deepseek_v32", "bfloat16"), ("glm_moe_dsa", "float32"), ("minimax_m3_vl_text", "bfloat16")],
    ids=str,
)
def test_alone_together_chunked_and_drafted_a_request_has_the_same_bits_and_a_trainer_too(
    arch: str, dtype: str, make_engine: MakeEngine, tiny_model: Callable[[str], Path]
) -> None:
    engine = make_engine(arch, dtype=dtype, speculation="5")
    assert engine.exactness["rows_are_independent"]
    long = Asked(PROMPT, SamplingParams(max_tokens=LIMIT - len(PROMPT), seed=5, ignore_eos=True))
    asked = [*mixed_requests(6, seed=2, max_tokens=10), long]
    plain = run(engine, asked)
    together = [choices[0].numbers for choices in plain]
    assert [numbers(engine, [one])[0] for one in asked] == together
    ragged = make_engine(arch, dtype=dtype, max_num_seqs=8, max_num_batched_tokens=23, prefill_chunk=7)
    assert numbers(ragged, asked) == together
    assert [c[0].numbers for c in run_drafting(engine, asked, "mixed", plain)] == together
    model = AutoModelForCausalLM.from_pretrained(tiny_model(arch), dtype=getattr(torch, dtype)).eval()
    prompts, ids = [PROMPT[:30], PROMPT], [PROMPT[:4], plain[-1][0].ids]
    with torch.no_grad():  # packed, more rows than the index takes; contexts, which are not
        logits = completion_logits(exact_forward(model), prompts, ids)
    wanted = [token.logprob for token in plain[-1][0].tokens]
    assert exact_logprobs(logits, torch.tensor([*ids[0], *ids[1]])).tolist()[4:] == wanted


@of_keys_and_of_blocks
def test_the_last_token_before_the_limit_is_transformers(
    arch: str, tiny_model: Callable[[str], Path]
) -> None:
    engine = Engine.from_pretrained(tiny_model(arch), EngineConfig(num_blocks=16))
    try:
        params = SamplingParams(max_tokens=LIMIT - len(PROMPT), temperature=0, ignore_eos=True)
        ((completion,),) = run(engine, [Asked(PROMPT, params)])
    finally:
        engine.shutdown()
    own = AutoModelForCausalLM.from_pretrained(tiny_model(arch)).eval()
    own.generation_config.eos_token_id = None
    ids = own.generate(torch.tensor([PROMPT]), max_new_tokens=LIMIT - len(PROMPT), do_sample=False)[0]
    assert completion.ids == ids[len(PROMPT) :].tolist()


@of_keys_and_of_blocks
@torch.inference_mode()
def test_control_beyond_the_limit_attention_to_all_keys_is_another_model(
    arch: str, tiny_model: Callable[[str], Path]
) -> None:
    ids = torch.tensor([[(3 + 7 * i) % 380 for i in range(LIMIT + 20)]])
    own = AutoModelForCausalLM.from_pretrained(tiny_model(arch)).eval()
    wanted = own(ids, use_cache=False).logits[0]
    ours = exact_forward(own)(ids, use_cache=False).logits[0]
    torch.testing.assert_close(ours[:LIMIT], wanted[:LIMIT], rtol=1e-3, atol=1e-3)
    assert (ours[LIMIT:] - wanted[LIMIT:]).abs().max() > 0.1


def test_the_limit_is_told_and_kept(
    make_engine: MakeEngine, tiny_model: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = str(tiny_model("axk2"))
    engine = Engine.from_pretrained(path, EngineConfig(num_blocks=16))
    try:
        assert engine.max_model_len == LIMIT
        assert "contexts of 100 tokens; beyond 100 tokens an index chooses" in str(engine.exactness["limit"])
        assert "is served with a limit: contexts of 100 tokens" in caplog.text
        with pytest.raises(ContextLengthError, match="maximum context length is 100"):
            run(engine, [Asked(PROMPT, SamplingParams(max_tokens=26))])
    finally:
        engine.shutdown()
    with pytest.raises(
        UnsupportedModelError, match="max_model_len is 101, and beyond 100 tokens an index chooses"
    ):
        Engine.from_pretrained(path, EngineConfig(num_blocks=16, max_model_len=101))
    assert "limit" not in make_engine("llama").exactness


@pytest.mark.parametrize("arch", ["glm_moe_dsa", "minimax_m3_vl_text"])
def test_a_trainers_longer_context_is_refused(arch: str, tiny_model: Callable[[str], Path]) -> None:
    model: Any = exact_forward(AutoModelForCausalLM.from_pretrained(tiny_model(arch)).eval())
    assert model(torch.tensor([[5] * LIMIT])).logits.shape[1] == LIMIT
    with pytest.raises(RequestError, match="position 100 is beyond the 100 tokens"):
        model(torch.tensor([[5] * (LIMIT + 1)]))
