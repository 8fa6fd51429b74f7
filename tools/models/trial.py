"""One kind is made, computed by transformers, served in several ways, and trained on; the verdict says what came of it.

Served in float32: eight requests at once, two of them greedy with their prompts scored; each alone; and again by
another engine, which cuts prompts into pieces of sixteen tokens. All have the same bits, or the verdict says which have
not. And loaded in bfloat16, in which most are published, where the self-test must find its rows independent, too.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks.combine.tiny import VOCAB_SIZE
from myserve.core.params import SamplingParams
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.weights.empty_model import auto_class, has_more_than_text
from myserve.errors import BadCheckpointError, UnsupportedModelError
from myserve.trainer.exact_forward import exact_forward
from myserve.trainer.exact_logprobs import exact_logprobs
from tools.models.kinds import make

__all__ = ["FLOAT32_ALONE", "Verdict", "judge", "try_kind"]

PROMPTS = tuple(
    [(start + 31 * i) % (VOCAB_SIZE - 8) + 4 for i in range(n)] for start, n in ((17, 120), (5, 37))
)
GREEDY = 32  # tokens drawn behind each
SAMPLED = tuple([(7 + 13 * i * n) % (VOCAB_SIZE - 8) + 4 for i in range(n)] for n in (1, 9, 33, 64, 65, 90))
CLOSE = 2e-3  # nats: float32 sums in another order, through a few layers; or so many times what they cost transformers
TIMES_OWN = 4
SECONDS = 900.0  # of a kind that takes twelve on a quiet machine
LONGEST_REFUSAL = 420  # characters of a sentence
FLOAT32_ALONE = "in float32 alone"  # what a limit begins with where bfloat16 is refused
Numbers = tuple[
    list[int], list[float]
]  # a request's tokens, prompt included, and the logprobs of all but the first


@dataclass
class Verdict:
    """What came of one kind: `result` is "served", "refused", "not made", "WRONG" or "BROKEN"."""

    kind: str
    result: str
    words: str = ""
    rows_are_independent: bool = True
    trainer_has_the_bits: bool = True
    is_text_alone: bool = False  # of a model that also sees or hears
    differs: str = ""  # where the same requests had other bits: "alone", "in pieces, after a restart"
    limit: str = ""  # why its contexts are shorter than it was made for, or it is not served in bfloat16

    @property
    def is_bad(self) -> bool:
        """Whether this may not be."""
        return self.result in ("WRONG", "BROKEN")

    def line(self) -> str:
        """Say it in a line."""
        marks = "" if self.rows_are_independent else "; rows depend on their batch"
        marks += "" if self.trainer_has_the_bits else "; a trainer has other bits"
        marks += f"; other bits {self.differs}" if self.differs else ""
        marks += f"; {self.limit}" if self.limit else ""
        return f"{self.kind}: {self.result}: {self.words}{marks}"


@torch.inference_mode()
def _own(folder: Path, served: Sequence[Numbers]) -> tuple[float, float, float]:
    """Compare served tokens and logprobs with transformers' own, whole and without a cache.

    Returns the largest difference of logprobs; by how much a greedy token falls short of the likeliest, 0 where
    it is that; and the largest difference of transformers' own logprobs from the same in float64.
    """
    model = _load(folder)
    gap = short = rounding = 0.0
    rows = [_rows(model, ids) for ids, _ in served]
    for (ids, logprobs), row, prompt in zip(served, rows, PROMPTS, strict=True):
        targets = torch.tensor(ids[1:])
        own = row[:-1].gather(1, targets[:, None])[:, 0]
        gap = max(gap, float((own - torch.tensor(logprobs)).abs().max()))
        drawn = slice(len(prompt) - 1, None)
        short = max(short, float((row[:-1][drawn].amax(1) - own[drawn]).max()))
    try:
        precise = [_rows(model.double(), ids) for ids, _ in served]
    except RuntimeError:  # it names float32 somewhere
        return gap, short, 0.0
    for (ids, _), row, right in zip(served, rows, precise, strict=True):
        targets = torch.tensor(ids[1:])[:, None]
        difference = row[:-1].gather(1, targets) - right[:-1].gather(1, targets)
        rounding = max(rounding, float(difference.abs().max()))
    return gap, short, rounding


def _load(folder: Path) -> Any:
    load = auto_class(AutoConfig.from_pretrained(folder)).from_pretrained
    try:
        model = load(folder, attn_implementation="eager").eval()
    except ValueError:  # it has no such attention
        model = load(folder).eval()
    model.set_experts_implementation("eager")  # a grouped product has no widths but multiples of 16 bytes
    return model


def _rows(model: Any, ids: list[int]) -> torch.Tensor:  # [T, V]
    rows: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
    return rows


def _requests() -> list[tuple[list[int], SamplingParams]]:
    greedy = SamplingParams(max_tokens=GREEDY, temperature=0, ignore_eos=True, prompt_logprobs=0)
    return [(prompt, greedy) for prompt in PROMPTS] + [
        (prompt, SamplingParams(max_tokens=12, seed=i, ignore_eos=True)) for i, prompt in enumerate(SAMPLED)
    ]


async def _one(engine: Engine, prompt: list[int], params: SamplingParams) -> Numbers:
    ids, logprobs = list(prompt), list[float]()
    async for delta in engine.submit(prompt, params):
        if delta.error is not None:
            raise delta.error
        scored = (delta.prompt_logprobs or ())[1:]
        logprobs += [entry.logprob for entry in scored if entry.logprob is not None]
        ids += [token.token_id for token in delta.tokens]
        logprobs += [token.logprob for token in delta.tokens]
    return ids, logprobs


async def _at_once(engine: Engine) -> list[Numbers]:
    return list(await asyncio.gather(*(_one(engine, *request) for request in _requests())))


def _served(folder: Path) -> tuple[list[Numbers], dict[str, Any], str]:
    """Return the two greedy answers; what the engine says of its exactness; and where bits differed."""
    sizes: dict[str, Any] = {"num_blocks": 96, "max_num_seqs": 8, "self_test": "always"}
    engine = Engine.from_pretrained(str(folder), EngineConfig(**sizes))
    whole = asyncio.run(_at_once(engine))
    alone = [asyncio.run(_one(engine, *request)) for request in _requests()]
    exactness = engine.exactness
    engine.shutdown()
    exactness |= _in_half(folder, exactness, sizes)
    # "kept": the self-test of the same weights was passed above, or is not kept and runs again
    engine = Engine.from_pretrained(
        str(folder), EngineConfig(**sizes, prefill_chunk=16, max_num_batched_tokens=24)
    )
    pieces = asyncio.run(_at_once(engine))
    engine.shutdown()
    differs = ["alone"] * (alone != whole) + ["in pieces, after a restart"] * (pieces != whole)
    return whole[: len(PROMPTS)], exactness, " and ".join(differs)


def _in_half(folder: Path, exactness: dict[str, Any], sizes: dict[str, Any]) -> dict[str, Any]:
    """Return what loading a kind in bfloat16, as most are published, changes in what is said of it."""
    try:
        engine = Engine.from_pretrained(str(folder), EngineConfig(**sizes, dtype="bfloat16"))
    except UnsupportedModelError as error:
        return {"limit": f"{FLOAT32_ALONE}: {error}".replace(str(folder), "it")}
    both = exactness["rows_are_independent"] and engine.exactness["rows_are_independent"]
    engine.shutdown()
    return {"rows_are_independent": both}


def judge(kind: str, folder: Path, sizes: str = "usual") -> Verdict:
    """Make, compute, serve and train one kind, in this process."""
    try:
        make(kind, folder, sizes)
        with torch.inference_mode():
            _rows(_load(folder), PROMPTS[1])
    except Exception as error:
        return Verdict(kind, "not made", f"{type(error).__name__}: {_one_line(error)}")
    try:
        served, exactness, differs = _served(folder)
    except (UnsupportedModelError, BadCheckpointError) as error:
        clear = "\n" not in str(error) and len(str(error)) <= LONGEST_REFUSAL
        return Verdict(kind, "refused" if clear else "BROKEN", str(error).replace(str(folder), "it"))
    except Exception as error:
        return Verdict(kind, "BROKEN", f"{type(error).__name__}: {_one_line(error)}")
    gap, short, rounding = _own(folder, served)
    close = max(CLOSE, TIMES_OWN * rounding)
    independent = bool(exactness["rows_are_independent"])
    verdict = Verdict(
        kind,
        "served" if gap < close and short < close else "WRONG",
        f"logprobs differ by {gap:.2g}",
        independent,
        is_text_alone=has_more_than_text(AutoConfig.from_pretrained(folder)),
        differs=differs,
        limit=str(exactness.get("limit", "")),
    )
    if short >= close:
        verdict.words += f", a greedy token is {short:.2g} below the likeliest"
    if differs and independent:
        verdict.result = "WRONG"  # it was said to be exact
    verdict.trainer_has_the_bits, why = _trainer_has_the_bits(folder, served)
    verdict.words += why
    return verdict


def _trainer_has_the_bits(folder: Path, served: Sequence[Numbers]) -> tuple[bool, str]:
    try:
        model = exact_forward(auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder).eval())
        with torch.no_grad():
            gaps = [
                max(abs(a - b) for a, b in zip(_trained(model, ids), logprobs, strict=True))
                for ids, logprobs in served
            ]
    except Exception as error:
        return False, f"; exact_forward raises {type(error).__name__}: {_one_line(error)}"
    return max(gaps) == 0.0, "" if max(gaps) == 0.0 else f"; of a trainer by {max(gaps):.2g}"


def _trained(model: Any, ids: list[int]) -> list[float]:
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
    logprobs: list[float] = exact_logprobs(logits, torch.tensor(ids[1:])).tolist()
    return logprobs


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def try_kind(kind: str, seconds: float = SECONDS, sizes: str = "usual") -> Verdict:
    """Judge one kind in a process of its own, which may die or hang. (Forked: it has all that is imported here.)"""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def child() -> None:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        with tempfile.TemporaryDirectory() as folder:
            verdict = judge(kind, Path(folder), sizes)
        sending.send(asdict(verdict))
        os._exit(0)  # the engine's thread and its helpers end with the process

    process = context.Process(target=child)
    process.start()
    sending.close()
    try:
        if receiving.poll(seconds):
            return Verdict(**receiving.recv())
        process.kill()
        return Verdict(kind, "BROKEN", f"no verdict within {seconds:.0f} s")
    except EOFError:
        process.join()
        return Verdict(kind, "BROKEN", f"its process ended with {process.exitcode}")
    finally:
        process.join()
        receiving.close()
