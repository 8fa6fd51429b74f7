"""Proves text against a tokenizer's own decoding, on many lists: `python -m tools.tokenizer_sweep FOLDER ...`."""

from __future__ import annotations

import argparse
import random
import sys
from typing import Any

from transformers import AutoTokenizer

from myserve.engine.token_bytes import TokenBytes

MAX_SHOWN = 5  # differences that are printed


def differences(tokenizer: Any, count: int, seed: int) -> list[tuple[list[int], str, str]]:
    """Return the lists of ids whose text is not the tokenizer's own, with ours and its."""
    known = sorted(set(tokenizer.get_vocab().values()))
    table = TokenBytes(tokenizer, known[-1] + 1)
    print(f"{tokenizer.name_or_path}: {table!r}")
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        ids = draw.choices(known, k=draw.randint(1, 256))
        own = tokenizer.decode(ids)
        reader = table.reader(skip_special_tokens=False)
        ours = "".join([*map(reader.feed, ids), reader.end()])
        # the one difference that is meant: a first token's spaces stay
        if table.decode(ids, skip_special_tokens=False) != own or ours.lstrip(" ") != own.lstrip(" "):
            found.append((ids, ours, own))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Sweep every folder; return 1 where text differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", help="folders or hub ids of tokenizers")
    parser.add_argument("--lists", type=int, default=20_000, help="lists of ids for each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    num_wrong = 0
    for folder in options.folders:
        found = differences(AutoTokenizer.from_pretrained(folder), options.lists, options.seed)
        print(f"{len(found)} of {options.lists} lists differ")
        for ids, ours, own in found[:MAX_SHOWN]:
            print(f"  {ids}\n    ours {ours!r}\n    own  {own!r}")
        num_wrong += len(found)
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
