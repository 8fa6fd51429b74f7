"""Entries are valid JSON, their bytes are the text's, and tokens that the text leaves out have none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from myserve.engine.outputs import PromptLogprob, TokenOutput
from myserve.engine.token_bytes import TokenBytes
from myserve.server.answers.logprobs import TextOffsets, TokenWriter, legacy


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Callable[[str], Path]) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model("qwen3"))


@pytest.fixture(scope="module")
def table(tokenizer: Any) -> TokenBytes:
    return TokenBytes(tokenizer, len(tokenizer))


def writer(table: TokenBytes, **changes: bool) -> TokenWriter:
    return TokenWriter(table, **({"skip_special_tokens": True, "as_ids": False} | changes))


def token(token_id: int, **fields: Any) -> TokenOutput:
    return TokenOutput(token_id, -1.0, -0.5, **fields)


@given(st.text(max_size=20))
def test_joined_bytes_are_the_texts_and_offsets_its_characters(
    table: TokenBytes, tokenizer: Any, text: str
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    entries = [writer(table).entry(token(i)) for i in ids]
    TextOffsets(table).write(entries)
    joined = b"".join(bytes(entry["bytes"] or ()) for entry in entries)
    assert joined.decode() == text
    done = b""
    for entry in entries:
        whole_characters = len(done.decode("utf-8", "ignore"))
        assert entry["text_offset"] == whole_characters
        done += bytes(entry["bytes"] or ())


def test_a_special_token_has_bytes_only_where_the_text_has_it(table: TokenBytes) -> None:
    (special, *_) = sorted(table.special_ids)
    assert writer(table).entry(token(special))["bytes"] is None
    assert writer(table, skip_special_tokens=False).entry(token(special))["bytes"] == list(table[special])
    assert writer(table).entry(token(65), in_text=False)["bytes"] is None


def test_what_cannot_be_drawn_is_not_listed_and_no_infinity_reaches_json(table: TokenBytes) -> None:
    entry = writer(table).entry(
        TokenOutput(
            65,
            -1.0,
            -math.inf,
            top_logprobs=((66, -0.5), (67, -math.inf)),
            token_id_logprobs=((1, -math.inf), (2, None), (3, -2.0)),
        )
    )
    assert [alternative["token_id"] for alternative in entry["top_logprobs"]] == [66]
    assert [given["logprob"] for given in entry["token_id_logprobs"]] == [None, None, -2.0]
    assert entry["sampling_logprob"] is None
    json.dumps(entry, allow_nan=False)


def test_tokens_as_ids_are_unambiguous(table: TokenBytes) -> None:
    broken = [i for i in range(len(table)) if "�" in writer(table).text(i)]
    assert len({writer(table).text(i) for i in broken}) < len(broken)  # the control: texts collide
    by_id = writer(table, as_ids=True)
    assert {by_id.text(i) for i in broken} == {f"token_id:{i}" for i in broken}


def test_the_older_form(table: TokenBytes) -> None:
    write = writer(table)
    entries = [
        write.prompt_entry(PromptLogprob(65, None), top=2),
        write.prompt_entry(PromptLogprob(66, -2.0, ((67, -0.1), (66, -2.0))), top=1),
        write.entry(token(68, top_logprobs=((68, -0.3), (69, -1.3)))),
    ]
    TextOffsets(table).write(entries)
    text = [write.text(i) for i in (65, 66, 67, 68, 69)]
    assert legacy(entries) == {
        "tokens": [text[0], text[1], text[3]],
        "token_logprobs": [None, -2.0, -1.0],
        "top_logprobs": [None, {text[2]: -0.1, text[1]: -2.0}, {text[3]: -0.3, text[4]: -1.3}],
        "text_offset": [0, 1, 2],
    }


def test_of_equal_texts_none_is_lost(table: TokenBytes) -> None:
    write = writer(table)
    a, b, c, d = [i for i in range(len(table)) if write.text(i) == "�"][:4]
    likeliest, own_second, own_not_listed = (
        write.entry(token(a, top_logprobs=((a, -0.1), (b, -0.2), (c, -0.3)))),
        write.entry(token(b, top_logprobs=((a, -0.1), (b, -0.2), (c, -0.3)))),
        write.entry(token(d, top_logprobs=((a, -0.1), (b, -0.2), (65, -0.3)))),
    )
    entries = [likeliest, own_second, own_not_listed]
    TextOffsets(table).write(entries)
    assert legacy(entries)["top_logprobs"] == [
        {"�": -0.1, f"token_id:{b}": -0.2, f"token_id:{c}": -0.3},
        {f"token_id:{a}": -0.1, "�": -0.2, f"token_id:{c}": -0.3},
        {f"token_id:{a}": -0.1, f"token_id:{b}": -0.2, write.text(65): -0.3, "�": -1.0},
    ]


def test_prompt_ranks_are_by_id(table: TokenBytes) -> None:
    write = writer(table)
    assert write.prompt_ranks(PromptLogprob(65, None), 5) is None
    ranks = write.prompt_ranks(PromptLogprob(65, -3.0, ((66, -0.1), (67, -1.0)), rank=7), 1)
    assert ranks == {
        "65": {"logprob": -3.0, "rank": 7, "decoded_token": write.text(65)},
        "66": {"logprob": -0.1, "rank": 1, "decoded_token": write.text(66)},
    }
