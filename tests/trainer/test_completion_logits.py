"""A trainer's cheap way gives the bits and the gradients of the dear one, and is cheap because prompts are shared."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from myserve import completion_logits, exact_forward
from myserve.errors import RequestError, UnsupportedModelError

ARCHITECTURES = [
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "olmo2", "gpt2", "qwen3_moe", "mixtral",
    "olmoe", "gpt_oss",
]  # fmt: skip
# a prompt's length, its completions'
GROUPS = [(1, [1, 5]), (19, [3, 3, 20, 1]), (16, [17]), (40, [2, 30, 2])]


@pytest.fixture
def samples() -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and completions, the groups shuffled among each other."""
    rng = random.Random(7)
    ids = lambda count: [rng.randrange(384) for _ in range(count)]  # noqa: E731 - a word for the next line
    rows = [(prompt, ids(c)) for p, lengths in GROUPS for prompt in [ids(p)] for c in lengths]
    rng.shuffle(rows)
    return [prompt for prompt, _ in rows], [completion for _, completion in rows]


def padded_logits(model: Any, prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
    """The dear way: every sample whole, logits everywhere."""
    whole = [p + c for p, c in zip(prompts, completions, strict=True)]
    width = max(map(len, whole))
    logits = model(
        input_ids=torch.tensor([s + [0] * (width - len(s)) for s in whole]),
        attention_mask=torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in whole]),
        use_cache=False,
    ).logits
    return torch.cat(
        [logits[i, len(p) - 1 : len(s) - 1] for i, (p, s) in enumerate(zip(prompts, whole, strict=True))]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_logits_are_those_of_whole_sequences_bit_for_bit(
    arch: str, dtype: torch.dtype, load: Any, samples
) -> None:
    model = exact_forward(load(arch, dtype))
    with torch.no_grad():
        assert torch.equal(completion_logits(model, *samples), padded_logits(model, *samples))


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2", "qwen3_moe", "gpt_oss"])
def test_the_gradients_are_those_of_whole_sequences(arch: str, load: Any, samples) -> None:
    found = []
    for way in (completion_logits, padded_logits):
        model = exact_forward(load(arch))
        logits = way(model, *samples)
        (logits.log_softmax(-1)[:, 7] * torch.linspace(-1, 1, len(logits))).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    shared, whole = found
    assert shared.keys() == whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(
            shared[name], gradient, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_prompt_is_computed_once_and_logits_where_tokens_were_drawn(load: Any, samples) -> None:
    model = exact_forward(load("llama"))
    seen: dict[str, int] = {}
    for name, module in (("embedded", model.model.embed_tokens), ("scored", model.lm_head)):
        module.register_forward_hook(lambda _, args, out, n=name: seen.update({n: out.shape[:-1].numel()}))
    prompts, completions = samples
    completion_logits(model, prompts, completions)
    distinct = {tuple(prompt) for prompt in prompts}
    behind = sum(len(c) - 1 for c in completions)  # nothing is drawn from behind the last token
    assert seen == {"embedded": sum(map(len, distinct)) + behind, "scored": len(distinct) + behind}


def test_an_empty_completion_has_no_rows(load: Any, samples) -> None:
    model = exact_forward(load("llama"))
    prompts, completions = samples
    with_empty = completion_logits(model, [[9, 9], *prompts, prompts[0]], [[], *completions, []])
    assert torch.equal(with_empty, completion_logits(model, prompts, completions))


def test_experts_are_replayed_and_prompts_of_other_routing_are_not_shared(load: Any) -> None:
    model = exact_forward(load("qwen3_moe"))
    prompts, completions = [[1, 2, 3]] * 3, [[4, 5], [4, 5], [4, 5]]
    shape = (5, model.config.num_hidden_layers, model.config.num_experts_per_tok)
    own = torch.full(shape, -1)
    other = torch.arange(shape[-1]).expand(shape).clone()
    plain = completion_logits(model, prompts, completions)
    assert torch.equal(completion_logits(model, prompts, completions, routing=[own] * 3), plain)
    a, b, c = completion_logits(model, prompts, completions, routing=[own, other, own.numpy()]).split(2)
    assert torch.equal(a, plain[:2]) and torch.equal(c, plain[:2])
    assert not torch.equal(b[0], a[0])  # the first token of an answer is drawn from its prompt's own routing
    assert torch.equal(b, completion_logits(model, prompts[:1], completions[:1], routing=[other]))


def test_what_does_not_fit_is_said(load: Any) -> None:
    model = exact_forward(load("qwen3_moe"))
    with pytest.raises(RequestError, match="exact_forward"):
        completion_logits(load("llama"), [[1]], [[2]])
    with pytest.raises(RequestError, match="prompt 1 is empty"):
        completion_logits(model, [[1], []], [[2], [3]])
    with pytest.raises(RequestError, match="each completion needs a prompt"):
        completion_logits(model, [[1]], [[2], [3]])
    with pytest.raises(RequestError, match="no completion tokens"):
        completion_logits(model, [[1]], [[]])
    with pytest.raises(RequestError, match="routing 0 has 1 rows for 2 \\+ 2 tokens"):
        completion_logits(model, [[1, 2]], [[3, 4]], routing=[torch.zeros(1, 2, 2, dtype=torch.long)])
    model.activation_checkpointing_enable()
    with pytest.raises(RequestError, match="gradient checkpointing"):
        completion_logits(model, [[1]], [[2]], routing=[torch.zeros(2, 2, 2, dtype=torch.long)])
    model._is_stateful = True
    with pytest.raises(UnsupportedModelError, match="state between tokens"):
        completion_logits(model, [[1]], [[2]])


def test_a_model_that_hands_no_keywords_down_shares_prompts_too(load: Any, samples) -> None:
    model = exact_forward(load("nemotron"))
    with torch.no_grad():
        assert torch.equal(completion_logits(model, *samples), padded_logits(model, *samples))
    model.activation_checkpointing_enable()
    with pytest.raises(UnsupportedModelError, match="hands no keywords down"):
        completion_logits(model, *samples)
