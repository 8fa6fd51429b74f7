"""A whole model: each architecture's rows are independent, in the engine's order of work and in a trainer's."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from myserve.engine.batch_invariance.patch import ExactLinear, make_exact
from myserve.engine.kernels.attend import BLOCK_SIZE
from myserve.engine.mixers.attention import PagedContext, allocate_layer
from myserve.engine.mixers.attention_pass import ATTENTION_NAME, attending, register_attention
from myserve.engine.runner.model_structure import observe
from myserve.trainer.exact_forward import exact_forward
from runs import thorough

ARCHITECTURES = [
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "olmo2", "gpt2", "qwen3_moe", "mixtral",
    "olmoe", "gpt_oss",
]  # fmt: skip
LIKE_OTHERS = ("qwen2", "qwen3", "mistral", "gemma2", "olmo2", "mixtral", "olmoe")
TYPED = [
    thorough(arch, dtype) if dtype == torch.float32 and arch in LIKE_OTHERS else (arch, dtype)
    for arch in ARCHITECTURES
    for dtype in (torch.float32, torch.bfloat16)
]
LENGTHS = [1, 5, 70, 33, 140, 17]
VOCAB_SIZE = 384

Rows = dict[tuple[int, int], Tensor]  # (sequence, position) -> logits


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


class Packed:
    """Sequences in pages, run a piece at a time as the engine would."""

    def __init__(self, model: Any, sequences: list[list[int]]) -> None:
        self.model, self.sequences, self.calls = model, sequences, observe(model).calls
        blocks = [-(-len(s) // BLOCK_SIZE) for s in sequences]
        pages = torch.randperm(sum(blocks)).split(blocks)
        self.tables = torch.zeros(len(blocks), max(blocks), dtype=torch.int32)
        for table, mine in zip(self.tables, pages, strict=True):
            table[: len(mine)] = mine
        self.layers = [
            allocate_layer(sum(blocks), call.kv_heads, call.key_dim, model.dtype) for call in self.calls
        ]

    @torch.inference_mode()
    def run(self, pieces: list[tuple[int, int, int]]) -> Rows:
        """Pieces are (sequence, start, count)."""
        places = [(r, i) for r, start, count in pieces for i in range(start, start + count)]
        context = PagedContext(
            layers=self.layers,
            slot_mapping=torch.tensor(
                [int(self.tables[r, i // BLOCK_SIZE]) * BLOCK_SIZE + i % BLOCK_SIZE for r, i in places]
            ),
            block_tables=self.tables[[r for r, _, _ in pieces]],
            query_start=torch.tensor([0, *(count for _, _, count in pieces)]).cumsum(0).int(),
            context_lens=torch.tensor([start + count for _, start, count in pieces], dtype=torch.int32),
        )
        with attending(context, self.calls):
            logits = self.model(
                input_ids=torch.tensor([[self.sequences[r][i] for r, i in places]]),
                position_ids=torch.tensor([[i for _, i in places]]),
                use_cache=False,
            ).logits[0]
        return dict(zip(places, logits, strict=True))


def alone(model: Any, sequences: list[list[int]]) -> Rows:
    rows: Rows = {}
    for r, sequence in enumerate(sequences):
        result = Packed(model, [sequence]).run([(0, 0, len(sequence))])
        rows |= {(r, i): logits for (_, i), logits in result.items()}
    return rows


def in_company(model: Any, sequences: list[list[int]]) -> Rows:
    return Packed(model, sequences).run([(r, 0, len(s)) for r, s in enumerate(sequences)])


def in_ragged_pieces(model: Any, sequences: list[list[int]], seed: int = 0) -> Rows:
    """Chunks of any size mixed with decodes, as they come."""
    rng, packed, rows = random.Random(seed), Packed(model, sequences), {}
    done = [0] * len(sequences)
    while done != [len(s) for s in sequences]:
        pieces = []
        for r, sequence in enumerate(sequences):
            count = min(len(sequence) - done[r], rng.choice([0, 1, 1, 2, 3, 7, 16, 31, 40]))
            if count:
                pieces.append((r, done[r], count))
                done[r] += count
        if pieces:
            rows |= packed.run(pieces)
    return rows


def differing(got: Rows, want: Rows) -> int:
    assert got.keys() == want.keys()
    return sum(not torch.equal(got[place], want[place]) for place in want)


def served(model: Any, mode: Any = "on") -> Any:
    register_attention()
    model.set_attn_implementation(ATTENTION_NAME)
    make_exact(model, mode=mode)
    return model


@pytest.mark.parametrize(("arch", "dtype"), TYPED)
def test_rows_are_the_same_alone_in_company_and_in_pieces(load: Any, arch: str, dtype: torch.dtype) -> None:
    model, sequences = served(load(arch, dtype)), prompts(LENGTHS)
    expected = alone(model, sequences)
    assert differing(in_company(model, sequences), expected) == 0
    assert differing(in_ragged_pieces(model, sequences), expected) == 0


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3_moe"])
def test_control_the_librarys_products_tell_the_difference(load: Any, arch: str) -> None:
    model, sequences = served(load(arch, torch.float32), mode="off"), prompts(LENGTHS)
    assert differing(in_ragged_pieces(model, sequences), alone(model, sequences)) > 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_agrees_with_transformers(load: Any, arch: str) -> None:
    (sequence,) = prompts([70])
    with torch.inference_mode():
        wanted = load(arch, torch.float32)(input_ids=torch.tensor([sequence]), use_cache=False).logits[0]
    got = alone(served(load(arch, torch.float32)), [sequence])
    torch.testing.assert_close(torch.stack([got[0, i] for i in range(70)]), wanted, rtol=2e-5, atol=2e-5)


def test_the_report_says_what_was_replaced(load: Any) -> None:
    dense, moe = (make_exact(load(arch, torch.float32))[0] for arch in ("llama", "qwen3_moe"))
    assert (dense.mode, dense.unit, dense.linears, dense.routers, dense.experts) == ("on", "lanes", 15, 0, 0)
    assert (moe.linears, moe.routers, moe.experts) == (9, 2, 2)
    off, quantization = make_exact(load("llama", torch.float32), mode="off")
    assert (off.as_dict()["unit"], quantization.as_dict()) == ("library", {"method": "off"})


def test_weights_are_held_once(load: Any) -> None:
    model = load("llama", torch.bfloat16)
    make_exact(model)
    linears = [module for module in model.modules() if isinstance(module, ExactLinear)]
    assert len(linears) == 15 and not any(list(module.parameters()) for module in linears)


def padded_batch(sequences: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, sequences))
    return {
        "input_ids": torch.tensor([s + [0] * (width - len(s)) for s in sequences]),
        "attention_mask": torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences]),
    }


@pytest.mark.parametrize(("arch", "dtype"), TYPED)
def test_a_trainers_model_gives_the_engines_bits(load: Any, arch: str, dtype: torch.dtype) -> None:
    sequences = prompts(LENGTHS)
    expected = in_ragged_pieces(served(load(arch, dtype)), sequences)
    logits = exact_forward(load(arch, dtype))(**padded_batch(sequences), use_cache=False).logits.detach()
    got = {(r, i): logits[r, i] for r, s in enumerate(sequences) for i in range(len(s))}
    assert differing(got, expected) == 0


def test_control_a_plain_model_gives_others(load: Any) -> None:
    sequences = prompts(LENGTHS)
    expected = in_ragged_pieces(served(load("llama", torch.float32)), sequences)
    with torch.inference_mode():
        logits = load("llama", torch.float32)(**padded_batch(sequences), use_cache=False).logits
    got = {(r, i): logits[r, i] for r, s in enumerate(sequences) for i in range(len(s))}
    assert differing(got, expected) > 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_trainers_model_has_the_usual_gradients(load: Any, arch: str) -> None:
    gradients = []
    for wrap in (lambda model: model, exact_forward):
        model = wrap(load(arch, torch.float32))
        batch = padded_batch(prompts([40, 33]))
        logits = model(**batch, use_cache=False).logits
        real = batch["attention_mask"].bool()
        logits[real].log_softmax(-1)[:, 7].mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, exact = gradients
    assert plain.keys() == exact.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(
            exact[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
