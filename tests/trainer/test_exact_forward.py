"""An `exact_forward` model has the server's bits at any width, number of rows and number of threads, and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from myserve import exact_forward, exact_logprobs
from myserve.core.params import SamplingParams
from myserve.engine.engine import Engine
from myserve.errors import RequestError
from myserve.trainer import exact_forward as module
from runs import Asked, run

PROMPTS = [[5, 7, 100, 200, 33], [41, 90, 12], list(range(20, 61))]
THREADS = (1, 2, 3, 5, 6, 8)
ODD = ["odd_llama", "odd_gemma3", "odd_starcoder2"]
DTYPES = ["float32", "bfloat16"]


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def logprobs_of(model: Any, rows: list[tuple[list[int], list[int]]]) -> list[float]:
    """The trainer's, of every completion token, from one padded batch."""
    sequences = [[*prompt, *ids] for prompt, ids in rows]
    width = max(map(len, sequences))
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([s + [0] * (width - len(s)) for s in sequences]),
            attention_mask=torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences]),
            use_cache=False,
        ).logits
    drawn = [logits[i, len(p) - 1 : len(p) - 1 + len(ids)] for i, (p, ids) in enumerate(rows)]
    return exact_logprobs(torch.cat(drawn), torch.tensor([i for _, ids in rows for i in ids])).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ODD)
def test_odd_widths_rows_and_threads_have_the_servers_logprobs(
    arch: str, dtype: str, make_engine: Callable[..., Engine], tiny_model: Callable[[str], Path]
) -> None:
    params = SamplingParams(max_tokens=25, seed=7, ignore_eos=True)
    drawn = run(make_engine(arch, dtype=dtype), [Asked(prompt, params) for prompt in PROMPTS])
    rows = [(prompt, choice.ids) for prompt, [choice] in zip(PROMPTS, drawn, strict=True)]
    served = [token.logprob for [choice] in drawn for token in choice.tokens]
    model = exact_forward(AutoModelForCausalLM.from_pretrained(tiny_model(arch), dtype=getattr(torch, dtype)))
    for threads in THREADS:
        torch.set_num_threads(threads)
        assert logprobs_of(model, rows) == served, f"{threads} threads"
    assert logprobs_of(model, rows[:1]) == served[:25]


@pytest.mark.parametrize("arch", ["odd_gemma3", "odd_starcoder2"])
def test_control_with_pytorchs_activations_it_has_not(
    arch: str,
    make_engine: Callable[..., Engine],
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = SamplingParams(max_tokens=25, seed=7, ignore_eos=True)
    drawn = run(make_engine(arch, dtype="float32"), [Asked(prompt, params) for prompt in PROMPTS])
    rows = [(prompt, choice.ids) for prompt, [choice] in zip(PROMPTS, drawn, strict=True)]
    monkeypatch.setattr(module, "install_activations", lambda *_: 0)
    model = exact_forward(AutoModelForCausalLM.from_pretrained(tiny_model(arch)))
    assert logprobs_of(model, rows) != [token.logprob for [choice] in drawn for token in choice.tokens]


@pytest.mark.parametrize("arch", ODD)
def test_gradients_are_the_usual_ones(arch: str, tiny_model: Callable[[str], Path]) -> None:
    gradients = []
    for wrap in (lambda model: model, exact_forward):
        model: Any = wrap(AutoModelForCausalLM.from_pretrained(tiny_model(arch)))
        model(input_ids=torch.tensor(PROMPTS[2:]), use_cache=False).logits.log_softmax(-1)[
            ..., 7
        ].mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5)


def test_a_model_on_another_device_is_refused(tiny_model: Callable[[str], Path]) -> None:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).to("meta")
    with pytest.raises(ValueError, match="CPU"):
        exact_forward(model)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shapes", "param", "said"),
    [
        (([1, 4], [2, 3], None), "x", r"x of shape \[1, 4\] does not fit weight \[2, 3\]"),
        (([], [2, 3], None), "x", "last dimension must be 3"),
        (([1, 3], [3], None), "weight", r"\[out, in\], got \[3\]"),
        (([1, 3], [2, 3], [1]), "bias", r"it must be \[2\]"),
        (([1, 3], [2, 3], [1, 2]), "bias", r"it must be \[2\]"),
    ],
)
def test_shapes_that_do_not_fit_are_the_callers_fault(shapes: Any, param: str, said: str) -> None:
    x, weight, bias = (None if shape is None else torch.ones(shape) for shape in shapes)
    with pytest.raises(RequestError, match=said) as caught:
        module.exact_linear(x, weight, bias)
    assert caught.value.param == param


@pytest.mark.parametrize("other", [torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 3, device="meta")])
def test_exact_linear_takes_floating_point_on_a_cpu(other: torch.Tensor) -> None:
    with pytest.raises(RequestError, match=r"x is .* on .*: exact_linear takes floating point on a CPU"):
        module.exact_linear(other, torch.ones(2, 3))


def test_layers_that_share_keys_take_padded_batches_and_all_positions(
    make_engine: Callable[..., Engine], tiny_model: Callable[[str], Path]
) -> None:
    """Gemma 4 slices its masks there, and with `logits_to_keep` leaves positions out, which is refused."""
    params = SamplingParams(max_tokens=25, seed=7, ignore_eos=True)
    drawn = run(make_engine("gemma4-shared", num_blocks=16), [Asked(prompt, params) for prompt in PROMPTS])
    rows = [(prompt, choice.ids) for prompt, [choice] in zip(PROMPTS, drawn, strict=True)]
    model: Any = exact_forward(AutoModelForCausalLM.from_pretrained(tiny_model("gemma4-shared")))
    assert logprobs_of(model, rows) == [token.logprob for [choice] in drawn for token in choice.tokens]
    with pytest.raises(ValueError, match="without logits_to_keep"):
        model(torch.tensor([PROMPTS[2]]), use_cache=False, logits_to_keep=1)


# --- int8 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ["odd_llama", "odd_gemma3", "odd_starcoder2", "gpt2"])
def test_on_int8_rollouts_the_mismatch_is_zero(
    arch: str, dtype: str, make_engine: Callable[..., Engine], tiny_model: Callable[[str], Path]
) -> None:
    """The trainer's float weights, quantised as it goes; the control is the same trainer unquantised."""
    params = SamplingParams(max_tokens=25, seed=7, ignore_eos=True)
    drawn = run(
        make_engine(arch, dtype=dtype, quantize="int8"), [Asked(prompt, params) for prompt in PROMPTS]
    )
    rows = [(prompt, choice.ids) for prompt, [choice] in zip(PROMPTS, drawn, strict=True)]
    served = [token.logprob for [choice] in drawn for token in choice.tokens]

    def trainer(quantize: Any) -> Any:
        model = AutoModelForCausalLM.from_pretrained(tiny_model(arch), dtype=getattr(torch, dtype))
        return exact_forward(model, quantize=quantize)

    model = trainer("int8")
    for threads in THREADS:
        torch.set_num_threads(threads)
        assert logprobs_of(model, rows) == served, f"{threads} threads"
    assert logprobs_of(model, rows[:1]) == served[:25]
    off = logprobs_of(trainer("off"), rows)
    assert max(abs(a - b) for a, b in zip(off, served, strict=True)) > 1e-3


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe", "gpt2"])
def test_gradients_go_straight_through_the_rounding(arch: str, tiny_model: Callable[[str], Path]) -> None:
    """A layer's gradients are those of the float product: to its float weights, to its input, to its bias."""
    model: Any = exact_forward(AutoModelForCausalLM.from_pretrained(tiny_model(arch)), quantize="int8")
    logits = model(input_ids=torch.tensor(PROMPTS[2:]), use_cache=False).logits
    logits.log_softmax(-1)[..., 7].mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    assert all(
        g.abs().max() > 0 for name, g in gradients.items() if name.endswith("weight") and g is not None
    )

    x, weight = torch.randn(5, 40, requires_grad=True), torch.randn(7, 40, requires_grad=True)
    bias, grad = torch.randn(7, requires_grad=True), torch.randn(5, 7)
    module.exact_linear(x, weight, bias, quantize="int8").backward(grad)
    assert x.grad is not None and weight.grad is not None and bias.grad is not None
    torch.testing.assert_close(x.grad, grad @ weight)
    torch.testing.assert_close(weight.grad, grad.T @ x)
    torch.testing.assert_close(bias.grad, grad.sum(0))


def test_another_quantization_is_refused(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="off or int8"):
        exact_forward(AutoModelForCausalLM.from_pretrained(tiny_model("llama")), quantize="int4")  # type: ignore[arg-type]
