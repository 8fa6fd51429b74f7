"""The sweep finds nothing where text is right, and finds what the tokenizers library misreads."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenizer_zoo import tokenizer
from tools.tokenizer_sweep import main


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "wordpiece"])
def test_right_text_passes(tmp_path: Path, kind: str) -> None:
    tokenizer(kind).save_pretrained(tmp_path)
    assert main([str(tmp_path), "--lists", "50"]) == 0


def test_a_difference_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer("added_tokens").save_pretrained(tmp_path)  # with čaj, which we read and the library does not
    assert main([str(tmp_path), "--lists", "50"]) == 1
    assert "differ" in capsys.readouterr().out
