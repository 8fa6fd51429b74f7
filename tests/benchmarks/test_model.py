"""The benchmark's tokenizer: a letter is a token, and a token at random is whole text."""

from __future__ import annotations

import random
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.contender import _texts, prompt_ids
from benchmarks.model import VOCAB_SIZE, write_tokenizer
from myserve.bench.workload import Workload


def test_a_text_prompt_has_as_many_tokens_as_asked_and_outputs_are_never_held_back(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == VOCAB_SIZE
    for text in _texts(Workload(3, 128, 1), seed=1):
        assert len(tokenizer(text)["input_ids"]) == 128
    for token_id in random.Random(2).sample(prompt_ids(VOCAB_SIZE), 500):
        assert tokenizer.decode([token_id]).isascii()
    assert tokenizer.decode([tokenizer("é")["input_ids"][0]]) == "\ufffd", "the control: half a character"
