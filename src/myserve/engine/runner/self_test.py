"""Two questions to a model before it serves: can it be packed at all, and do its rows depend on their company?

Reading a config answers only for what someone thought of, and tests answer only for the machines they ran on; this
asks the loaded model, on this machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from myserve.engine.mixers.attention import ATTENTION_NAME
from myserve.engine.runner.model_runner import ModelRunner
from myserve.engine.scheduling.request import Request
from myserve.engine.scheduling.scheduler import Batch, ScheduledTokens
from myserve.errors import UnsupportedModelError

# Of requests that share a step, a short one behind a long one, whose keys would show in it. Together, and the first
# alone, they fill one recording, which is proved by that.
LENGTHS = (30, 2)
DECODED = 2  # tokens of the first that are decoded, too: recorded, and replayed and compared
CROWD = (1, 14, 57, 121, 249, 505)  # rows of another beside the first: libraries change at powers of two
# Libraries share elementwise work out among threads from 32,768 elements for each on, and treat the last elements of a
# share in another way. Odd numbers of threads cut between the elements of a vector.
CUTTING_THREADS = (3, 7)
SHARED_ELEMENTS = 7 * 32768
LOGITS_AT_ONCE = (
    1 << 24
)  # that are compared of such a step: beyond, every second row's, every third's and so on
SINGLES = 7  # requests of one token, decoded together: an odd number of rows
# correlation of logits: rounding costs a few thousandths, a wrong mask or position nearly all of it
AGREEMENT = 0.9


def choose_batch_invariant_mode(runner: ModelRunner, vocab_size: int) -> bool:
    """Set the runner to the first mode whose rows are found batch-invariant; return whether there is one.

    Where there is none, the first mode stays, which costs the least. Raises `UnsupportedModelError`.
    """
    for rows in runner.settings:
        runner.use_rows(rows)
        if is_batch_invariant(runner, vocab_size):
            return True
    runner.use_rows(runner.settings[0])
    return False


@torch.inference_mode()
def is_batch_invariant(runner: ModelRunner, vocab_size: int) -> bool:
    """Whether every row has the same bits in company and alone, prefilled whole and token by token.

    Raises UnsupportedModelError unless packed logits are those of the model's own forward, but for rounding.
    """
    prompts = _prompts(runner, vocab_size)
    packed = _packed_logits(runner, prompts)
    _compare(runner, packed, _own_logits(runner.model, prompts))
    alone = [_packed_logits(runner, [prompt])[0] for prompt in prompts]
    decoded = _decoded_logits(runner, prompts[0][:DECODED])
    same = all(map(torch.equal, packed, alone)) and torch.equal(decoded, packed[0][:DECODED])
    if not runner.backend.packs:
        return same and _crowds_leave_alone(runner, prompts[0], alone[0], vocab_size)
    return (
        same
        and _odd_rows_leave_alone(runner, prompts[0], alone[0])
        and _thread_cuts_leave_alone(runner, prompts[0], alone[0])
    )


def _crowds_leave_alone(runner: ModelRunner, prompt: list[int], alone: Tensor, vocab_size: int) -> bool:
    """Whether the first prompt is the same beside more rows, for as many as fit."""
    blocks, size = runner.kv_cache.num_blocks, runner.kv_cache.block_size
    fitting = [rows for rows in CROWD if rows <= runner.max_model_len and rows <= (blocks - 1) * size]
    crowds = [[(5 + 13 * i) % vocab_size for i in range(rows)] for rows in fitting]
    return all(torch.equal(_packed_logits(runner, [prompt, crowd])[0], alone) for crowd in crowds)


def _odd_rows_leave_alone(runner: ModelRunner, prompt: list[int], alone: Tensor) -> bool:
    """Whether the first token has the same bits as one of an odd number of decodes."""
    count = min(SINGLES, runner.kv_cache.num_blocks)
    return all(torch.equal(row, alone[:1]) for row in _packed_logits(runner, [prompt[:1]] * count))


def _thread_cuts_leave_alone(runner: ModelRunner, prompt: list[int], alone: Tensor) -> bool:
    """Whether every copy of the first prompt is the same, in so many that threads share out even elementwise work.

    It is tried on the process's number of threads and on `CUTTING_THREADS`: each cuts in other rows.
    """
    width = runner.model.get_input_embeddings().weight.shape[1]
    fitting = runner.kv_cache.num_blocks // -(-len(prompt) // runner.kv_cache.block_size)
    copies = min(fitting, SHARED_ELEMENTS // (width * len(prompt)) + 1)
    stride = -(-copies * alone.numel() // LOGITS_AT_ONCE)
    for threads in sorted({torch.get_num_threads(), *CUTTING_THREADS}):
        with _unrecorded(runner, threads):
            packed = _packed_logits(runner, [prompt] * copies, stride)
        if not all(torch.equal(rows, alone[::stride]) for rows in packed):
            return False
    return True


@contextmanager
def _unrecorded(runner: ModelRunner, threads: int) -> Iterator[None]:
    """On so many threads; a recording would hold their number for good."""
    steps, before = runner.recorded_steps, torch.get_num_threads()
    usable, steps.usable = steps.usable, False
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        steps.usable = usable


def _compare(runner: ModelRunner, packed: list[Tensor], own: list[Tensor]) -> None:
    agreement = min(_correlation(a, b) for a, b in zip(packed, own, strict=True))
    if not agreement > AGREEMENT:
        raise UnsupportedModelError(
            f"{type(runner.model).__name__} gives other logits packed than alone (correlation {agreement:.3f}): it "
            "keeps state, masks or positions of its own, so its requests cannot be batched unpadded"
        )


def _prompts(runner: ModelRunner, vocab_size: int) -> list[list[int]]:
    """As many as the cache has blocks for; each fits one."""
    lengths = LENGTHS[: runner.kv_cache.num_blocks]
    return [[(17 + 31 * i + 7 * r) % vocab_size for i in range(n)] for r, n in enumerate(lengths)]


def _decoded_logits(runner: ModelRunner, prompt: list[int]) -> Tensor:
    """One token a step, as it is decoded."""
    request = Request(id="check", prompt_token_ids=prompt, max_tokens=1, block_table=[0])
    rows = []
    for position in range(len(prompt)):
        batch = Batch()
        batch.add(ScheduledTokens(request, position, 1))
        rows.append(runner.forward(batch, [0]).clone())
    return torch.cat(rows)


def _packed_logits(runner: ModelRunner, prompts: list[list[int]], stride: int = 1) -> list[Tensor]:
    """The logits of every prompt, [T, V] each, from one step; of every `stride`th row."""
    batch = Batch()
    blocks = iter(range(runner.kv_cache.num_blocks))
    wanted: list[int] = []
    for number, prompt in enumerate(prompts):
        request = Request(id=f"check-{number}", prompt_token_ids=prompt, max_tokens=1)
        request.block_table = [next(blocks) for _ in range(0, len(prompt), runner.kv_cache.block_size)]
        wanted += range(batch.num_tokens, batch.num_tokens + len(prompt), stride)
        batch.add(ScheduledTokens(request, 0, len(prompt)))
    logits = runner.forward(batch, wanted).clone()  # [wanted, V]
    return list(torch.split(logits, [-(-len(prompt) // stride) for prompt in prompts]))


def _own_logits(model: Any, prompts: list[list[int]]) -> list[Tensor]:
    """transformers' own forward and attention, one sequence at a time."""
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        return [
            model(input_ids=torch.tensor([prompt], device=model.device), use_cache=False).logits[0]
            for prompt in prompts
        ]
    finally:
        model.set_attn_implementation(ATTENTION_NAME)


def _correlation(a: Tensor, b: Tensor) -> float:  # [T, V] each
    """Of all logits of a sequence, each row about its own mean."""
    a, b = (x.double() - x.double().mean(-1, keepdim=True) for x in (a, b))
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-30))
