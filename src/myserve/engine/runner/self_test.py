"""A self-test of the loaded model, on this machine: steps give its own logits, and rows are batch-invariant.

Reading a config answers only for what its reader thought of, and tests answer only for the machines they ran on. What
is compared: prefilled in a batch, prefilled and decoded alone, and beyond the longest window, with the model's plain
forward and with each other.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from myserve.engine.batch_invariance.patch import products
from myserve.engine.batch_invariance.quantized import QuantizedWeight
from myserve.engine.mixers.attention_pass import ATTENTION_NAME
from myserve.engine.mixers.recurrent_functions import calls_functions
from myserve.engine.runner.layer_agreement import Forward, correlation, layers_agree
from myserve.engine.runner.library_products import library_products
from myserve.engine.runner.model_runner import ModelRunner
from myserve.engine.scheduling.batch import Batch, ScheduledTokens
from myserve.engine.scheduling.request import Request
from myserve.errors import MyserveError, UnsupportedModelError

__all__ = ["choose_batch_invariant_mode", "is_batch_invariant"]

log = logging.getLogger(__name__)

INT8_ROWS = (1, 7, 33)  # of an int8 product that is computed by its definition as well
INT8_COLUMNS = 64
# Of requests that share a step, a short one behind a long one, whose keys would show in it. Together, and the first
# alone, they fill one recording, which is proved by that.
LENGTHS = (30, 2)
DECODED = 2  # last tokens of a prompt that are decoded, too: recorded, and replayed and compared
# Rows of the steps that prefill the first alone: one and few and odd ones, for where a library's vectors end its
# functions give an element other bits (sigmoid, GELU), and a step of one row is all end.
PIECES = (1, 4)
CROWD = (1, 14, 57, 121, 249, 505)  # rows of another beside the first: libraries change at powers of two
# Libraries share elementwise work out among threads from 32,768 elements for each on, and treat the last elements of a
# share in another way. Odd numbers of threads cut between the elements of a vector.
CUTTING_THREADS = (3, 7)
ELEMENTS_A_THREAD, MOST_SHARES = 32768, 7
# Logits that are compared of such a step: beyond, every second row's, every third's and so on.
LOGITS_AT_ONCE = 1 << 24
# Rows of a request's last tokens, run together as a draft is; the last once more, replayed.
VERIFIED = (2, 5, 8, 16, 16)
SINGLES = 7  # requests of one token, decoded together: an odd number of rows
# Correlation of a sequence's logits with the plain forward's. In half precision rounding costs a few thousandths, and
# an expert chosen otherwise at a tie much of a row; a wrong mask or position costs nearly all of it.
AGREEMENT = {torch.float32: 0.99}
AGREEMENT_HALF = 0.9
BEYOND = 16  # tokens of a prompt beyond the longest window
CHUNK = 256  # rows of a step that prefills it
# What the proof beyond a window may cost: multiply-adds of one forward pass over the prompt, a second or so of a CPU.
MOST_WORK = 2e11
# What configs call lengths beyond which attention changes.
LENGTH_NAMES = ("sliding_window", "attention_chunk_size", "window_size", "local_attention_window")


def choose_batch_invariant_mode(runner: ModelRunner, vocab_size: int) -> bool:
    """Set the runner to the first mode whose rows are found batch-invariant; return whether there is one.

    Where there is none, the first mode stays, which costs the least: where products are a library's, on a GPU and with
    `exact` off. Raises UnsupportedModelError for a model whose steps do not give its own logits, and where products
    are ours for one whose rows are dependent all the same (decision 0111).
    """
    try:
        prove_int8(runner.model)
        for number, rows in enumerate(runner.settings):
            runner.use_rows(rows)
            if number == 0:
                prove_beyond_windows(runner, vocab_size)
            if is_batch_invariant(runner, vocab_size):
                return True
    except MyserveError:
        raise
    except Exception as error:
        lines = str(error).splitlines() or ["no reason given"]
        raise UnsupportedModelError(
            f"{type(runner.model).__name__} fails in the self-test ({type(error).__name__}: {lines[0][:200]}); serve "
            "another model, or report this one"
        ) from error
    if runner.backend.packs and runner.exact_report.mode == "on":
        raise _dependent(runner)
    runner.use_rows(runner.settings[0])
    return False


def _dependent(runner: ModelRunner) -> UnsupportedModelError:
    """Say why a model is not served: which of its modules multiply by themselves, if that is it."""
    try:
        found = library_products(runner.model)
    except Exception:
        log.debug("its products were not found", exc_info=True)
        found = []
    because = f": {', '.join(found[:3])} multiplies by PyTorch's own product" if found else ""
    return UnsupportedModelError(
        f"{type(runner.model).__name__} gives a token other bits in another batch{because}, so it cannot be served "
        "exactly; serve another model, or this one with --exact off, where tokens depend on their batch"
    )


@torch.inference_mode()
def is_batch_invariant(runner: ModelRunner, vocab_size: int) -> bool:
    """Return whether every row has the same bits batched and alone, prefilled whole and token by token.

    Raises UnsupportedModelError unless packed and decoded logits are the model's own, but for rounding.
    """
    prompts = _prompts(runner, vocab_size)
    own = _own_logits(runner.model, prompts)
    packed = _packed_logits(runner, prompts)
    _compare(runner, "packed", packed, own, prompts, lambda by: _packed_logits(runner, prompts, forward=by))
    alone = [
        _logits_alone(runner, prompts[0]),
        *(_packed_logits(runner, [prompt])[0] for prompt in prompts[1:]),
    ]
    pair = [alone[0][-DECODED:]], [own[0][-DECODED:]]
    _compare(runner, "decoded", *pair, prompts[:1], lambda by: _logits_alone(runner, prompts[0], forward=by))
    same = all(map(torch.equal, packed, alone)) and _verified_rows_leave_alone(runner, prompts[0], alone[0])
    if not runner.backend.packs:
        return same and _crowds_leave_alone(runner, prompts[0], alone[0], vocab_size)
    return (
        same
        and _odd_rows_leave_alone(runner, prompts[0], alone[0])
        and _thread_cuts_leave_alone(runner, prompts[0], alone[0])
    )


@torch.inference_mode()
def prove_beyond_windows(runner: ModelRunner, vocab_size: int) -> int:
    """Compare a prompt longer than every window, in chunks and decoded, with the own forward; return its length.

    What a window hides was read off the model's masks at any length (`attention_observer`); this runs it. 0: no
    window, or one so long that a run would take longer than a start may: `MOST_WORK`.
    Raises UnsupportedModelError where the logits differ.
    """
    config = runner.model.config.get_text_config(decoder=True)
    named = [value for name in LENGTH_NAMES if isinstance(value := getattr(config, name, None), int)]
    room = min(runner.max_model_len, runner.kv_cache.num_blocks * runner.kv_cache.block_size)
    work = runner.num_weights
    fitting = [n for n in {*named, runner.structure.longest_window} if 0 < n <= room - BEYOND]
    lengths = [n + BEYOND for n in fitting if (n + BEYOND) * work <= MOST_WORK]
    if not lengths:
        return 0
    prompt = _tokens(max(lengths), vocab_size, 3)
    pair = [_logits_alone(runner, prompt, last=BEYOND)], _own_logits(runner.model, [prompt], last=BEYOND)
    _compare(
        runner, "run beyond its window", *pair, [prompt], lambda by: _logits_alone(runner, prompt, forward=by)
    )
    return len(prompt)


@torch.inference_mode()
def prove_int8(model: Any) -> int:
    """Compare int8 products on this CPU with the integers' own sums, one of each width; return how many that were.

    Raises UnsupportedModelError where they differ: the trainer's bits, and another machine's, would be others.
    """
    quantised = [each for each in products(model) if isinstance(each, QuantizedWeight)]
    one_of_each = {(each.in_features, each.dtype): each for each in quantised}.values()
    for product in one_of_each:
        generator = torch.Generator().manual_seed(0)
        for rows in INT8_ROWS:
            x = torch.randn(rows, product.in_features, generator=generator).to(product.dtype)
            columns = min(INT8_COLUMNS, product.out_features)
            wanted = product.by_definition(x, INT8_COLUMNS)
            if not torch.equal(product(x)[:, :columns], wanted):
                raise UnsupportedModelError(
                    f"{type(model).__name__}: int8 products of {product.in_features} terms come out wrong on this "
                    "CPU; serve with quantize off, and report this"
                )
    return len(one_of_each)


def _crowds_leave_alone(runner: ModelRunner, prompt: list[int], alone: Tensor, vocab_size: int) -> bool:
    """Return whether the first prompt has the same bits beside more rows, for as many as fit."""
    blocks, size = runner.kv_cache.num_blocks, runner.kv_cache.block_size
    fitting = [rows for rows in CROWD if rows <= runner.max_model_len and rows <= (blocks - 1) * size]
    crowds = [[(5 + 13 * i) % vocab_size for i in range(rows)] for rows in fitting]
    return all(torch.equal(_packed_logits(runner, [prompt, crowd])[0], alone) for crowd in crowds)


def _odd_rows_leave_alone(runner: ModelRunner, prompt: list[int], alone: Tensor) -> bool:
    """Return whether the first token has the same bits as one of an odd number of decodes."""
    count = min(SINGLES, runner.kv_cache.num_blocks)
    return all(torch.equal(row, alone[:1]) for row in _packed_logits(runner, [prompt[:1]] * count))


def _verified_rows_leave_alone(runner: ModelRunner, prompt: list[int], alone: Tensor) -> bool:
    """Return whether the last tokens have the same bits run together, every row wanted: this verifies a draft.

    The tokens before them are run twice, as a prompt is, of which few rows are wanted: recorded, and replayed.
    """
    request, length = _request_from_the_end(runner, prompt), len(prompt)
    before = length - max(VERIFIED)
    parts = [(0, before, DECODED)] * 2 + [(length - rows, length, rows) for rows in VERIFIED]
    if runner.structure.states:  # each needs the state at its own beginning
        pairs = (((0, length - rows, DECODED), (length - rows, length, rows)) for rows in VERIFIED)
        parts = [part for pair in pairs for part in pair]
    for start, end, wanted in parts:
        batch = Batch()
        batch.add(ScheduledTokens(request, start, end - start))
        logits = runner.forward(batch, list(range(end - start - wanted, end - start)))
        _take_state(request)
        if not torch.equal(logits, alone[end - wanted : end]):
            return False
    return True


def _thread_cuts_leave_alone(runner: ModelRunner, prompt: list[int], alone: Tensor) -> bool:
    """Return whether all copies of the first prompt agree, in so many that threads share out even elementwise work.

    It is tried on the process's number of threads and on `CUTTING_THREADS`: each cuts in other rows.
    """
    width = runner.model.get_input_embeddings().weight.shape[1]
    fitting = runner.kv_cache.num_blocks // -(-len(prompt) // runner.kv_cache.block_size)
    for threads in sorted({torch.get_num_threads(), *CUTTING_THREADS}):
        elements = ELEMENTS_A_THREAD * min(threads, MOST_SHARES)
        copies = min(fitting, elements // (width * len(prompt)) + 1)
        stride = -(-copies * alone.numel() // LOGITS_AT_ONCE)
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


def _compare(
    runner: ModelRunner, how: str, ours: Sequence[Tensor], own: Sequence[Tensor], prompts: Sequence[list[int]],
    steps: Callable[[Forward], object],
) -> None:  # fmt: skip
    """Raise UnsupportedModelError unless each sequence's logits [T, V] agree, or in half precision each layer does.

    `steps(forward)` runs the steps of these prompts again, by another `forward`.
    """
    model, name = runner.model, type(runner.model).__name__
    agreement = min(correlation(a, b) for a, b in zip(ours, own, strict=True))
    if agreement > AGREEMENT.get(model.dtype, AGREEMENT_HALF):
        return
    if model.dtype != torch.float32 and runner.backend.packs and _each_layer_agrees(runner, prompts, steps):
        log.info(
            "%s in %s: each layer is its own; all of them have other logits %s than alone (correlation %.3f), for so "
            "sensitive is it to rounding",
            name,
            str(model.dtype).removeprefix("torch."),
            how,
            agreement,
        )
        return
    raise UnsupportedModelError(
        f"{name} gives other logits {how} than alone (correlation {agreement:.3f}): it "
        "keeps state, masks or positions of its own, so its requests cannot be batched; serve another model"
    )


def _each_layer_agrees(
    runner: ModelRunner, prompts: Sequence[list[int]], steps: Callable[[Forward], object]
) -> bool:
    model, plain = runner.model, functools.partial(runner.forward, replay=False)
    mixers = {call.module: None for call in runner.structure.calls}
    mixers |= {module: None for module in model.modules() if calls_functions(module)}
    agree = layers_agree(
        model,
        mixers,
        prompts,
        lambda prompt: _own_logits(model, [prompt]),
        lambda forced: steps(forced(plain)),
    )
    steps(plain)  # the cache has the keys of its own steps again, which later ones read
    return agree


def _prompts(runner: ModelRunner, vocab_size: int) -> list[list[int]]:
    """As many as the cache has blocks for; each fits one."""
    lengths = LENGTHS[: runner.kv_cache.num_blocks]
    return [_tokens(n, vocab_size, number) for number, n in enumerate(lengths)]


def _tokens(count: int, vocab_size: int, number: int) -> list[int]:
    return [(17 + 31 * i + 7 * number) % vocab_size for i in range(count)]


def _logits_alone(
    runner: ModelRunner, prompt: list[int], last: int | None = None, *, forward: Forward | None = None
) -> Tensor:
    """The logits of the last rows (None: of all), prefilled in pieces but for the last two, which are decoded.

    The blocks are counted from the end: nothing that was stored in another run stands where it is read.
    """
    request = _request_from_the_end(runner, prompt)
    first, prefilled, rows = len(prompt) - (last or len(prompt)), len(prompt) - DECODED, []
    starts = [start for start in accumulate((0, *PIECES)) if start < prefilled]
    starts += range(starts[-1] + CHUNK, prefilled, CHUNK)
    for start, end in pairwise([*starts, *range(max(0, prefilled), len(prompt) + 1)]):
        batch = Batch()
        batch.add(ScheduledTokens(request, start, end - start))
        wanted = list(range(max(0, first - start), end - start)) or [end - start - 1]
        logits = (forward or runner.forward)(batch, wanted).clone()
        _take_state(request)
        rows += [logits] if end > first else []
    return torch.cat(rows)


def _request_from_the_end(runner: ModelRunner, prompt: list[int]) -> Request:
    """Return a request whose blocks are counted from the end of the cache."""
    cache = runner.kv_cache
    request = Request(id="self-test", prompt_token_ids=prompt, max_tokens=1)
    request.block_table = [cache.num_blocks - 1 - i for i in range(-(-len(prompt) // cache.block_size))]
    if cache.states:
        request.state_slot, request.next_state_slot = cache.num_state_slots - 1, cache.num_state_slots - 2
    return request


def _take_state(request: Request) -> None:
    """Let a request go on from the state that its last step has left."""
    request.state_slot, request.next_state_slot = request.next_state_slot, request.state_slot


def _packed_logits(
    runner: ModelRunner, prompts: list[list[int]], stride: int = 1, *, forward: Forward | None = None
) -> list[Tensor]:
    """The logits of every prompt, [T, V] each, from one step; of every `stride`th row."""
    batch = Batch()
    blocks = iter(range(runner.kv_cache.num_blocks))
    wanted: list[int] = []
    for number, prompt in enumerate(prompts):
        request = Request(id=f"self-test-{number}", prompt_token_ids=prompt, max_tokens=1)
        request.block_table = [next(blocks) for _ in range(0, len(prompt), runner.kv_cache.block_size)]
        wanted += range(batch.num_tokens, batch.num_tokens + len(prompt), stride)
        batch.add(ScheduledTokens(request, 0, len(prompt)))
    logits = (forward or runner.forward)(batch, wanted).clone()  # [wanted, V]
    return list(torch.split(logits, [-(-len(prompt) // stride) for prompt in prompts]))


def _own_logits(model: Any, prompts: list[list[int]], last: int = 0) -> list[Tensor]:
    """transformers' own forward and attention, one sequence at a time; of the `last` rows, 0: of all."""
    try:
        _attend_as_transformers(model)
        return [
            model(
                input_ids=torch.tensor([prompt], device=model.device), use_cache=False, logits_to_keep=last
            ).logits[0]
            for prompt in prompts
        ]
    finally:
        model.set_attn_implementation(ATTENTION_NAME)


def _attend_as_transformers(model: Any) -> None:
    """Give a model transformers' own attention; a model in parts may have one that knows no sdpa (Gemma 4's audio)."""
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:
        model.set_attn_implementation("eager")
