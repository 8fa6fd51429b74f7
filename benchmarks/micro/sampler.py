"""The sampler alone: milliseconds a step, ours beside torch.multinomial and transformers' warpers, in one run.

python -m benchmarks.micro.sampler [--vocab 151936] [--threads 2] [--repeats 9] [--spread 2.5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.generation import logits_process as theirs

from myserve.core.sampling import RowState, Sampler, SamplingParams

WORKLOADS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "T=1": {},
    "T=0.7": {"temperature": 0.7},
    "top-p .95": {"top_p": 0.95},
    "T=1, 5 logprobs": {"top_logprobs": 5},
    "everything": {
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.01,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.1,
        "top_logprobs": 5,
    },
}


def median_ms(step: Callable[[], object], repeats: int) -> float:
    """Return the median of `repeats` timed calls, after one that is not timed."""
    step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def rows_for(batch: int, vocab: int, params: SamplingParams) -> list[RowState]:
    """Requests in mid-completion: 128 tokens of prompt, 64 drawn."""
    return [
        RowState(
            params,
            seed=seed,
            sample_index=0,
            prompt_token_ids=range(128),
            completion_token_ids=range(0, 64 * 7, 7),
            vocab_size=vocab,
            eos_token_ids=(0,),
        )
        for seed in range(batch)
    ]


def multinomial(logits: Tensor) -> Tensor:
    """Temperature 1 as `transformers.generate` draws it."""
    return torch.multinomial(torch.softmax(logits, -1), 1)


def warpers(logits: Tensor) -> Tensor:
    """Top-k 50 and top-p .95 as `transformers.generate` does them, with its draw."""
    no_ids = torch.zeros(len(logits), 0, dtype=torch.int64)
    return multinomial(theirs.TopPLogitsWarper(0.95)(no_ids, theirs.TopKLogitsWarper(50)(no_ids, logits)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--spread", type=float, default=2.5, help="standard deviation of the logits")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logits = torch.randn(64, args.vocab, generator=torch.Generator().manual_seed(0)) * args.spread
    batches = (1, 8, 64)
    print(f"V={args.vocab}, {args.threads} threads, float32, ms: " + "  ".join(f"B={b}" for b in batches))

    def report(name: str, step: Callable[[Tensor], Callable[[], object]]) -> None:
        times = [median_ms(step(logits[:b]), args.repeats) for b in batches]
        print(f"{name:34}" + "".join(f"{ms:9.2f}" for ms in times), flush=True)

    report("read the logits once (the floor)", lambda some: lambda: some.amax())
    report("torch: softmax + multinomial", lambda some: lambda: multinomial(some))
    report("transformers: top-k 50, top-p .95", lambda some: lambda: warpers(some))
    sampler = Sampler()
    for name, fields in WORKLOADS.items():
        params = SamplingParams(**fields)  # type: ignore[arg-type]  # a table of keyword arguments

        def ours(some: Tensor, params: SamplingParams = params) -> Callable[[], object]:
            rows = rows_for(len(some), args.vocab, params)
            return lambda: sampler.sample(some, rows)

        report(f"myserve: {name}", ours)


if __name__ == "__main__":
    main()
