"""The way of a device without our kernels, on a CPU: plain pages, flash attention's calls, graphs, fixed rows.

What only a device can do is stood in for: `flash_on_a_cpu` keeps to what FlashAttention 2 asks of its callers, and
`Reruns` gives what a graph gives. `test_cuda.py` runs the same proofs where there is a GPU.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import tests.engine.test_exactness as proofs
from myserve.core.params import SamplingParams
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.mixers import device_pages
from myserve.engine.mixers.attention import dense_attention
from myserve.engine.mixers.attention_pass import ATTENTION_NAME, register_attention
from myserve.engine.mixers.device_pages import FLASH_BLOCK, Heads, find_flash
from myserve.engine.runner import device_backend as backends
from myserve.engine.runner import self_test
from myserve.engine.runner.device_backend import DeviceBackend, device_backend, heads_of
from myserve.engine.runner.model_structure import observe
from myserve.engine.scheduling.batch import ScheduledTokens
from myserve.engine.scheduling.request import Request
from myserve.engine.steps import fixed_rows
from myserve.engine.steps.cuda_graphs import WARM_UPS, Graphs
from myserve.engine.steps.fixed_rows import FIXED_ROWS, fixed_experts_forward, groups
from myserve.engine.steps.inputs import Shape, Staging, StepInputs
from myserve.engine.steps.recorder import NotRecordableError
from myserve.engine.steps.recordings import RecordedSteps
from myserve.engine.weights import loader
from myserve.trainer.exact_forward import exact_forward
from runs import Asked, run, run_one, thorough

# engines of other backends have other findings: none takes over the self-test of another
pytestmark = pytest.mark.usefixtures("monkeypatch")

CPU = torch.device("cpu")
HEADS = Heads(heads=4, kv_heads=2, head_dim=8, dtype=torch.bfloat16)


def flash_on_a_cpu(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool, seqused_k: Tensor, block_table: Tensor,
    num_splits: int | None,
) -> Tensor:  # fmt: skip
    """Asks of its callers what `mha_varlen_fwd` of FlashAttention 2 does; then attends, row by row, in one order."""
    pages_, size, kv_heads, dim = key.shape
    assert size % 256 == 0, "Paged KV cache block size must be divisible by 256"
    assert query.dtype == key.dtype == value.dtype and query.dtype in (torch.float16, torch.bfloat16)
    assert query.shape[2] == dim <= 256 and dim % 8 == 0 and query.shape[1] % kv_heads == 0 and enable_gqa
    assert all(x.dtype == torch.int32 for x in (cu_seq_q, seqused_k, block_table))
    assert cu_seq_q.is_contiguous() and seqused_k.is_contiguous() and block_table.stride(-1) == 1
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    requests = len(cu_seq_q) - 1
    assert block_table.shape[0] == len(seqused_k) == requests and num_splits == 1
    starts, lens = cu_seq_q.tolist(), seqused_k.tolist()
    assert max_q >= max(b - a for a, b in itertools.pairwise(starts)) and max_q > 1
    assert max_k == block_table.shape[1] * size >= max(lens)
    out = torch.full_like(query, torch.nan)  # rows of nobody are not written
    window = window_size[0] + 1
    for r in range(requests):
        table = block_table[r, : -(-lens[r] // size)].long()
        assert all(0 <= page < pages_ - 1 for page in table.tolist()), "the last page is nobody's"
        keys, values = (x[table].flatten(0, 1).transpose(0, 1) for x in (key, value))
        for row in range(starts[r], starts[r + 1]):
            end = lens[r] - (starts[r + 1] - 1 - row)
            one = query[row][:, None]
            out[row] = dense_attention(one, keys[:, :end], values[:, :end], scale=scale, window=window)[:, 0]
    return out


class Reruns:
    """Stands in for CUDA graphs: the same forward pass again, on what its inputs then hold, into the same memory."""

    ahead = None  # nothing is recorded ahead of use, as with graphs

    def __init__(self, _: nn.Module) -> None:
        self.replayed = 0
        self._out: Tensor | None = None

    def __call__(self, forward: Callable[[], Tensor]) -> Rerun:
        logits = forward()
        if self._out is None:
            self._out = logits.new_empty(FIXED_ROWS, logits.shape[1])
        return Rerun(self, forward, self._out[: len(logits)].copy_(logits))


class Rerun:
    def __init__(self, reruns: Reruns, forward: Callable[[], Tensor], out: Tensor) -> None:
        self._reruns, self._forward, self.out = reruns, forward, out

    def replay(self) -> Tensor:
        self._reruns.replayed += 1
        return self.out.copy_(self._forward())


MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def open_engine(tiny_model: Callable[[str], Path]) -> Iterator[Callable[..., Engine]]:
    """An engine on a backend that is made for its model."""
    engines: dict[tuple[object, ...], Engine] = {}

    def open_(arch: str, make: Callable[[Any], DeviceBackend], **config: object) -> Engine:
        key = (arch, make, *sorted(config.items()))
        if key not in engines:
            settled = EngineConfig(**({"num_blocks": 128} | config))  # type: ignore[arg-type]
            loaded = loader.load(str(tiny_model(arch)), settled)
            engines[key] = Engine(loaded, settled, make(loaded.model))
        return engines[key]

    yield open_
    for engine in engines.values():
        engine.scheduler.check_integrity()
        engine.shutdown()


def on_pages(model: Any) -> DeviceBackend:
    """All of a GPU's way."""
    made = device_backend(heads_of(observe(model).calls, model.dtype), CPU, flash_on_a_cpu)
    return replace(made, recorder=Reruns, settings=(FIXED_ROWS,))


def on_libraries(model: Any) -> DeviceBackend:
    """PyTorch's products in fixed rows, and our attention: in float32, where PyTorch's own depends on its rows."""
    return replace(backends.CPU, packs=False, recorder=None, settings=(FIXED_ROWS,))


WAYS = [
    thorough(on_pages, "llama", "bfloat16"),
    (on_pages, "gemma3_text", "bfloat16"),
    thorough(on_pages, "qwen3_moe", "bfloat16"),
    thorough(on_libraries, "llama", "float32"),
    thorough(on_libraries, "gpt2", "float32"),
    (on_libraries, "qwen3_moe", "float32"),
]
each_way = pytest.mark.parametrize(("way", "arch", "dtype"), WAYS)
PROOFS = [
    proofs.test_alone_is_in_a_batch_of_32,
    proofs.test_whole_is_chunked_at_ragged_sizes,
    proofs.test_one_is_the_first_of_sixteen,
    proofs.test_teacher_forcing_is_decoding,
]


@each_way
@pytest.mark.parametrize("proof", PROOFS)
def test_what_is_proved_of_a_cpu(
    proof: Any, way: Callable[[Any], DeviceBackend], arch: str, dtype: str, open_engine: Callable[..., Engine]
) -> None:
    proof(arch, dtype, lambda arch, **config: open_engine(arch, way, **config))


def test_control_without_fixed_rows_the_batch_shows(open_engine: Callable[..., Engine]) -> None:
    def in_any_rows(model: Any) -> DeviceBackend:
        return replace(on_libraries(model), settings=(0,))

    engine = open_engine("llama", in_any_rows, dtype="float32", prefix_caching=False)
    asked = proofs.mixed_requests(32)
    assert proofs.together(engine, asked) != proofs.alone(engine, asked)


def test_control_a_product_depends_on_its_rows_and_not_in_fixed_ones() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(96, 512), torch.randn(FIXED_ROWS, 512)
    x[:, 256:] = -x[:, :256] * 1.0001  # sums that cancel show their order at once
    weight[:, 256:] = weight[:, :256]
    whole = F.linear(x, weight)
    counts = range(1, FIXED_ROWS)
    assert any(not torch.equal(F.linear(x[:n], weight), whole[:n]) for n in counts)
    for n in counts:
        filled = torch.cat([x[:n], torch.full((FIXED_ROWS - n, 512), torch.nan)])
        assert torch.equal(F.linear(filled, weight)[:n], whole[:n])


def test_a_gpus_way_is_told(open_engine: Callable[..., Engine]) -> None:
    told = open_engine("llama", on_pages, dtype="bfloat16").exactness
    assert told["mode"] == "on" and told["rows_are_independent"] is True
    assert (told["unit"], told["attention"], told["fixed_rows"]) == ("library", "flash", FIXED_ROWS)
    engine = open_engine("gemma2", on_pages, dtype="bfloat16")
    assert engine.exactness["attention"] == "gathered: varlen_attn caps no scores"
    assert engine.runner.kv_cache.block_size == device_pages.PLAIN_BLOCK
    assert run_one(engine, [1, 2, 3], max_tokens=3, ignore_eos=True).finish_reason == "length"


def test_steps_are_replayed_and_prompts_are_among_them(open_engine: Callable[..., Engine]) -> None:
    engine = open_engine("qwen3", on_pages, dtype="bfloat16")
    steps = engine.runner.recorded_steps
    run(engine, [Asked(list(range(9, 90)), SamplingParams(max_tokens=9, ignore_eos=True))] * 3)
    reruns = steps._record_pass
    assert isinstance(reruns, Reruns) and reruns.replayed > 9 and steps.usable
    shapes = {Shape(FIXED_ROWS, FIXED_ROWS, wanted) for wanted in (1, FIXED_ROWS)}
    assert set(steps._steps) == shapes


def test_decodes_are_recorded_by_their_number_where_rows_are_not_fixed(
    open_engine: Callable[..., Engine],
) -> None:
    def in_any_rows(model: Any) -> DeviceBackend:
        return replace(on_pages(model), settings=(0,))

    engine = open_engine("qwen3", in_any_rows, dtype="bfloat16")
    # the first asked decodes alone for a while, and the others beside it until its end
    asked = Asked(list(range(9, 90)), SamplingParams(max_tokens=40, ignore_eos=True))
    run(engine, [asked])
    run(engine, [asked] * 3)
    shapes = engine.runner.recorded_steps._steps
    assert {shape.requests for shape in shapes} >= {1, 3}
    assert all(shape.rows == shape.requests == shape.wanted for shape in shapes)


def test_a_prefix_is_found_in_pages(open_engine: Callable[..., Engine]) -> None:
    engine = open_engine("llama", on_pages, dtype="bfloat16")
    asked = Asked([i % 300 for i in range(290)], SamplingParams(max_tokens=4, seed=1))
    cold, warm = (run(engine, [asked])[0][0] for _ in range(2))
    assert warm.metrics is not None and warm.metrics.cached_tokens == FLASH_BLOCK
    assert proofs.everything(cold) == proofs.everything(warm)


def test_routing_is_heard_in_every_group(make_engine: MakeEngine, open_engine: Callable[..., Engine]) -> None:
    params = SamplingParams(max_tokens=3, seed=1, routed_experts=True, prompt_logprobs=0, ignore_eos=True)
    prompt = [(7 * i) % 300 for i in range(150)]
    ours = run(make_engine("qwen3_moe", dtype="float32"), [Asked(prompt, params)])[0][0]
    fixed = run(open_engine("qwen3_moe", on_libraries, dtype="float32"), [Asked(prompt, params)])[0][0]
    for heard, wanted in zip(fixed.deltas, ours.deltas, strict=True):
        assert [s.routed_experts for s in heard.prompt_logprobs or ()] == [
            s.routed_experts for s in wanted.prompt_logprobs or ()
        ]
    assert [t.routed_experts for t in fixed.tokens] == [t.routed_experts for t in ours.tokens]


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_new_weights_are_those_that_compute(arch: str, open_engine: Callable[..., Engine]) -> None:
    engine = open_engine(arch, on_pages, dtype="bfloat16", num_blocks=64)
    asked = proofs.mixed_requests(6)
    before = proofs.together(engine, asked)
    old = {name: w.clone() for name, w in engine.runner.model.state_dict().items()}
    engine.update_weights({name: w * 1.5 for name, w in old.items()}).result(60)
    between = proofs.together(engine, asked)
    engine.update_weights(old).result(60)
    assert between != before and proofs.together(engine, asked) == before
    assert engine.runner.recorded_steps.usable


# -- fixed rows ------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 200), min_size=1, max_size=8), st.integers(1, 70), st.data())
def test_groups_are_the_step_in_its_order(counts: list[int], size: int, data: st.DataObject) -> None:
    request = Request(id="0", prompt_token_ids=[1] * 300, max_tokens=1)
    scheduled = [ScheduledTokens(request, 7 * i, count) for i, count in enumerate(counts)]
    total = sum(counts)
    wanted = sorted(data.draw(st.sets(st.integers(0, total - 1), max_size=9)))
    made = list(groups(scheduled, wanted, size))
    sizes = [sum(part.count for part in group) for group, _ in made]
    assert sizes[:-1] == [size] * (len(sizes) - 1) and 0 < sizes[-1] <= size and sum(sizes) == total
    assert [g * size + row for g, (_, rows) in enumerate(made) for row in rows] == wanted
    positions = [p.start + i for group, _ in made for p in group for i in range(p.count)]
    assert positions == [part.start + i for part in scheduled for i in range(part.count)]


@pytest.mark.parametrize("arch", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_experts_in_fixed_rows_are_the_models_own(arch: str, load: Callable[..., Any]) -> None:
    experts = next(m for m in load(arch).modules() if hasattr(m, "_is_expert_parallel"))
    torch.manual_seed(1)
    x, scores = torch.randn(FIXED_ROWS, 32), torch.randn(FIXED_ROWS, experts.down_proj.shape[0]).softmax(-1)
    top, index = scores.topk(2)
    with torch.no_grad():
        experts.config._experts_implementation = "eager"
        wanted = experts(x, index, top)
        got = fixed_experts_forward(experts, x, index, top)
        x[5:] = torch.nan
        assert torch.equal(fixed_experts_forward(experts, x, index, top)[:5], got[:5])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_the_first_setting_that_is_found_exact_is_taken(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = open_engine("llama", on_pages, dtype="bfloat16", num_blocks=32).runner
    runner.settings = (0, 64, 8)
    tried: list[int] = []

    def found(good: tuple[int, ...]) -> tuple[bool, int]:
        def check(runner: Any, vocab_size: int) -> bool:
            tried.append(runner.exact_report.fixed_rows)
            return tried[-1] in good

        tried.clear()
        monkeypatch.setattr(self_test, "is_batch_invariant", check)
        return self_test.choose_batch_invariant_mode(runner, 384), runner.exact_report.fixed_rows

    assert (found((0, 64)), tried) == ((True, 0), [0])
    assert (found((64, 8)), tried) == ((True, 64), [0, 64])
    assert (found(()), tried) == ((False, 0), [0, 64, 8])
    runner.use_rows(FIXED_ROWS)


def test_the_probe_finds_rows_that_only_a_crowd_changes(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = open_engine("llama", lambda _: backends.CPU, dtype="float32").runner
    own = runner._run_model

    def shaken(inputs: StepInputs) -> Tensor:
        """As by a library that has another kernel from 200 rows on."""
        logits = own(inputs)
        return logits * (1 + 2**-20) if inputs.ids.shape[1] > 200 else logits

    monkeypatch.setattr(runner.recorded_steps, "usable", False)
    monkeypatch.setattr(runner, "_run_model", shaken)
    assert not self_test.is_batch_invariant(runner, 384), "kernels of our own are not believed either"
    monkeypatch.setattr(runner, "backend", replace(backends.CPU, packs=False))
    assert not self_test.is_batch_invariant(runner, 384)
    monkeypatch.setattr(self_test, "CROWD", (1, 14, 57, 121))
    assert self_test.is_batch_invariant(runner, 384), "only the large crowd showed it"


def test_sums_are_kept_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.backends.cuda.matmul
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "to be put back")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    fixed_rows.keep_sums_whole()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not matmul.allow_bf16_reduced_precision_reduction
    assert not matmul.allow_fp16_reduced_precision_reduction
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_trainers_exact_forward_is_a_cpus(load: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="CPU alone"):
        exact_forward(load("llama").to("meta"))


# -- flash attention -------------------------------------------------------------------------------------------


def refuses_missing_starts(*args: Any, **kwargs: Any) -> Tensor:
    if args[4] is None:
        raise RuntimeError("cu_seqlens_k must have dtype int32\nand a stack")
    return flash_on_a_cpu(*args, **kwargs)


def knows_no_pages(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("block_table needs FlashAttention 3\nand a stack")


def sees_all_keys(*args: Any, **kwargs: Any) -> Tensor:
    return flash_on_a_cpu(*args, **kwargs | {"window_size": (-1, 0)})


def test_how_flash_is_called_is_found_out() -> None:
    flash, told = find_flash(HEADS, CPU, flash_on_a_cpu)
    assert flash is not None and not flash.key_starts and told == "flash"
    flash, told = find_flash(HEADS, CPU, refuses_missing_starts)
    assert flash is not None and flash.key_starts and told == "flash"


@pytest.mark.parametrize(
    ("heads", "varlen", "reason"),
    [
        (HEADS, None, "takes no pages"),
        (replace(HEADS, dtype=torch.float32), flash_on_a_cpu, "float32"),
        (replace(HEADS, head_dim=20), flash_on_a_cpu, "heads of 20"),
        (replace(HEADS, head_dim=512), flash_on_a_cpu, "heads of 512"),
        (replace(HEADS, softcap=50.0), flash_on_a_cpu, "caps no scores"),
        (replace(HEADS, sinks=True), flash_on_a_cpu, "no sinks"),
        (HEADS, knows_no_pages, "needs FlashAttention 3"),
        (HEADS, sees_all_keys, "differs from attention"),
    ],
)
def test_where_flash_does_not_do_the_reason_is_told(heads: Heads, varlen: Any, reason: str) -> None:
    flash, told = find_flash(heads, CPU, varlen)
    assert flash is None and told.startswith("gathered: ") and reason in told and "\n" not in told


def test_a_library_is_taken_by_its_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_an_older_release(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> None: ...

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", of_an_older_release)
    assert device_pages.library_attention() is None
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash_on_a_cpu)
    assert device_pages.library_attention() is flash_on_a_cpu


@pytest.mark.parametrize("arch", ["gemma2", "gpt_oss"])
def test_what_a_model_asks_of_attention_is_read_off_it(arch: str, load: Callable[..., Any]) -> None:
    register_attention()
    model = load(arch, torch.bfloat16)
    model.set_attn_implementation(ATTENTION_NAME)
    heads = heads_of(observe(model).calls, model.dtype)
    assert (heads.heads, heads.kv_heads, heads.head_dim, heads.dtype) == (4, 2, 8, torch.bfloat16)
    assert (bool(heads.softcap), heads.sinks) == (arch == "gemma2", arch == "gpt_oss")


# -- graphs ----------------------------------------------------------------------------------------------------


class FakeCuda:
    """Writes down what is asked of torch.cuda."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.captures = False

    def graph_pool_handle(self) -> str:
        return "pool"

    def current_stream(self) -> FakeStream:
        return FakeStream("main", self.calls)

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.calls.append(f"on {device}")
        yield

    def Stream(self, device: torch.device) -> FakeStream:  # noqa: N802
        return FakeStream("aside", self.calls)

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.calls.append(f"enter {stream.name}")
        yield
        self.calls.append(f"leave {stream.name}")

    def CUDAGraph(self) -> FakeCuda:  # noqa: N802
        return self

    @contextmanager
    def graph(
        self, graph: FakeCuda, *, pool: str, stream: FakeStream, capture_error_mode: str
    ) -> Iterator[None]:
        self.calls.append(f"capture in {pool} on {stream.name}, {capture_error_mode}")
        self.captures = True
        try:
            yield
        finally:
            self.captures = False
        self.calls.append("end")

    def replay(self) -> None:
        self.calls.append("replay")


class FakeStream:
    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self._calls = name, calls

    def wait_stream(self, other: FakeStream) -> None:
        self._calls.append(f"{self.name} waits for {other.name}")


def test_a_graph_is_made_as_pytorchs_notes_say() -> None:
    cuda = FakeCuda()
    graphs = Graphs(CPU, 8, cuda)
    x = torch.ones(3, 5)

    def forward() -> Tensor:
        cuda.calls.append("forward")
        return x * 2

    first = graphs(forward)
    assert cuda.calls == [
        "on cpu", "aside waits for main", "enter aside", *["forward"] * WARM_UPS, "leave aside", "main waits for aside",
        "capture in pool on aside, thread_local", "forward", "end", "replay",
    ]  # fmt: skip
    assert torch.equal(first.out, x * 2)
    del cuda.calls[:]
    assert first.replay() is first.out and cuda.calls == ["replay"]
    second = graphs(lambda: torch.zeros(1, 5))
    assert second.out.data_ptr() == first.out.data_ptr(), "one place for all logits"


def test_a_forward_that_cannot_be_captured_runs_as_it_is() -> None:
    def asks(inputs: StepInputs) -> Tensor:
        if cuda.captures:
            raise RuntimeError("operation not permitted when stream is capturing\nand a stack")
        return inputs.ids[0, :, None].float()

    cuda = FakeCuda()
    with pytest.raises(NotRecordableError, match=r"not permitted when stream is capturing$"):
        Graphs(CPU, 8, cuda)(lambda: asks(inputs_of_one()))
    steps = RecordedSteps(
        asks, inputs_of_one(), Graphs(CPU, 8, cuda), lambda scheduled, wanted: Shape(1, 1, 1)
    )
    request = Request(id="0", prompt_token_ids=[7], max_tokens=1, block_table=[0])
    logits = steps.logits([ScheduledTokens(request, 0, 1)], [0])
    assert logits is not None and logits.tolist() == [[7.0]] and not steps.usable


class OneCache:
    layers = ()
    states = ()
    block_size = 4
    device = CPU
    pages = device_pages.DevicePages(None)


def inputs_of_one() -> StepInputs:
    return StepInputs.of(Shape(1, 1, 1), OneCache(), 2)


def test_a_step_is_written_once_the_last_is_sent_and_sent_in_one_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    for name, deed in [("wait", Staging.wait), ("send", Staging.send)]:
        monkeypatch.setattr(Staging, name, lambda self, n=name, d=deed: (done.append(n), d(self)))
    write = StepInputs._write
    monkeypatch.setattr(StepInputs, "_write", lambda self, *args: (done.append("write"), write(self, *args)))
    inputs = StepInputs.of(Shape(6, 3, 2), OneCache(), 5)
    request = Request(id="0", prompt_token_ids=list(range(50, 63)), max_tokens=1, block_table=[9, 4, 7, 2])
    inputs.cut(Shape(4, 2, 1)).fill([ScheduledTokens(request, 10, 3)], [2])
    assert done == ["wait", "write", "send"]
    part, context = inputs.cut(Shape(4, 2, 1)), inputs.cut(Shape(4, 2, 1)).context
    assert part.ids.tolist() == [[60, 61, 62, 0]] and part.positions.tolist() == [[10, 11, 12, 0]]
    assert context.slot_mapping.tolist() == [30, 31, 8, -1] and part.wanted.tolist() == [2]
    assert context.block_tables.tolist()[0] == [9, 4, 7, 2, 0]
    assert (context.query_start.tolist(), context.context_lens.tolist()) == ([0, 3, 3], [13, 0])
    known = context.on_host
    assert known is not None and known.context_lens.tolist() == [13, 0]
    assert known.context_lens.data_ptr() != context.context_lens.data_ptr()


def test_what_nobody_owns_is_stored_where_nobody_looks() -> None:
    pages = device_pages.DevicePages(None)
    keys, values = pages.allocate(2, 4, 1, 8, torch.float32, CPU)
    ones = torch.ones(3, 1, 8)
    pages.store(ones, ones * 2, keys, values, torch.tensor([5, -1, 0]))
    assert keys[:2].sum() == 16 and values[:2].sum() == 32
    assert keys[1, 1].all() and keys[0, 0].all() and keys[2, 3].all()
