"""What quantisation costs: KL and perplexity of a text against the model's own type, by the server's bits.

`python -m benchmarks.quality MODEL [--text FILE ...] [--bytes 20000]`: the logits are those that the
server draws from, by its own engine. The text is this project's own pages unless files are named.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.scheduling.request import Request
from myserve.engine.scheduling.scheduler import Batch, ScheduledTokens

__all__ = ["Quality", "compare", "main", "windows"]

PAGES = Path(__file__).parents[1] / "docs"
# prose, and not those that are written by a program
TEXTS = ("sampling.md", "structured.md", "weights.md", "training.md", "architecture.md")
WINDOW = 512  # tokens of one context
ROWS = 64  # whose logits are wanted of a step


@dataclass(frozen=True, slots=True)
class Quality:
    """Sums over tokens, of the model as it is and of the quantised one. Logarithms in nats."""

    tokens: int
    perplexity: float
    perplexity_quantized: float
    kl_per_token: float  # of the quantised distribution from the model's own
    kl_median: float
    kl_99: float  # which one token of a hundred exceeds
    same_top_token: float  # share of places at which both have the same most likely token


def windows(token_ids: Sequence[int], bos: int | None) -> Iterator[list[int]]:
    """Cut a text into contexts of WINDOW tokens, each with BOS where the tokenizer has one.

    >>> [len(w) for w in windows(range(700), None)]
    [512, 188]
    """
    step = WINDOW - (bos is not None)
    for start in range(0, len(token_ids), step):
        yield ([] if bos is None else [bos]) + list(token_ids[start : start + step])


@torch.inference_mode()
def compare(own: Engine, quantised: Engine, contexts: Sequence[Sequence[int]]) -> Quality:
    """Return how two engines differ over the texts."""
    losses, losses_quantised, kl, same = [], [], [], []
    for ids in contexts:
        targets = torch.tensor(ids[1:])
        for a, b, wanted in zip(_logits(own, ids), _logits(quantised, ids), targets.split(ROWS), strict=True):
            p, q = (rows.float().log_softmax(-1) for rows in (a, b))
            losses.append(-p.gather(-1, wanted[:, None])[:, 0])
            losses_quantised.append(-q.gather(-1, wanted[:, None])[:, 0])
            kl.append((p.exp() * (p - q)).sum(-1, dtype=torch.float64))
            same.append(a.argmax(-1) == b.argmax(-1))
    divergence = torch.cat(kl)
    return Quality(
        tokens=len(divergence),
        perplexity=math.exp(torch.cat(losses).double().mean()),
        perplexity_quantized=math.exp(torch.cat(losses_quantised).double().mean()),
        kl_per_token=float(divergence.mean()),
        kl_median=float(divergence.median()),
        kl_99=float(divergence.quantile(0.99)),
        same_top_token=float(torch.cat(same).double().mean()),
    )


def _logits(engine: Engine, ids: Sequence[int]) -> Iterator[Tensor]:
    """The logits of all rows but the last, a few rows at a time, by the engine's own steps."""
    runner = engine.runner
    request = Request(id="quality", prompt_token_ids=list(ids), max_tokens=1)
    request.block_table = list(range(-(-len(ids) // runner.kv_cache.block_size)))
    for start in range(0, len(ids) - 1, ROWS):
        count = min(ROWS, len(ids) - 1 - start)
        batch = Batch()
        batch.add(ScheduledTokens(request, start, count))
        yield runner.forward(batch, list(range(count))).clone()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--quantize", default="int8", choices=["int8"])
    parser.add_argument("--text", nargs="*", type=Path, default=[PAGES / name for name in TEXTS])
    parser.add_argument("--bytes", type=int, default=20_000)
    asked = parser.parse_args()
    text = "\n".join(path.read_text() for path in asked.text).encode()[: asked.bytes].decode(errors="ignore")

    def load(quantize: Any) -> Engine:
        return Engine.from_pretrained(asked.model, EngineConfig(quantize=quantize, num_blocks=64))

    own, quantised = load("off"), load(asked.quantize)
    token_ids = own.tokenizer(text, add_special_tokens=False)["input_ids"]
    contexts = list(windows(token_ids, own.tokenizer.bos_token_id))
    print(json.dumps(asdict(compare(own, quantised, contexts)), indent=2))


if __name__ == "__main__":
    main()
