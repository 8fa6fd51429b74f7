"""The corpus: one seed gives one corpus, only answers are learned, and packing loses and mixes nothing."""

from __future__ import annotations

from random import Random

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tools.embedded_model.data import IGNORED, Document, batches, draw_chat, encode_documents, pack_rows


def test_a_seed_gives_one_corpus(tokenizer: PreTrainedTokenizerBase) -> None:
    assert encode_documents(tokenizer, 3, 50) == encode_documents(tokenizer, 3, 50)
    assert encode_documents(tokenizer, 3, 50) != encode_documents(tokenizer, 4, 50)


def test_only_answers_are_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    chats, texts = 0, 0
    for document in encode_documents(tokenizer, 3, 300):
        learned = tokenizer.decode([label for label in document.labels if label != IGNORED])
        whole = tokenizer.decode(document.input_ids)
        if whole.startswith("<|im_start|>"):
            turns = whole.split("<|im_start|>assistant\n")[1:]
            assert learned == "".join(turn.split("<|im_end|>")[0] + "<|im_end|>" for turn in turns)
            chats += 1
        else:
            assert learned == whole and whole.endswith("<|endoftext|>")
            texts += 1
    assert chats > 200 and texts > 5


def test_packing_keeps_every_document_whole() -> None:
    rng = Random(0)
    documents = [
        Document(ids, ids) for ids in ([rng.randrange(1, 999)] * rng.randint(1, 16) for _ in range(200))
    ]
    rows = pack_rows(documents, 16)
    unpacked = []
    for row in range(len(rows.input_ids)):
        for index in range(int(rows.document[row].max()) + 1):
            place = rows.document[row] == index
            assert rows.position_ids[row][place].tolist() == list(range(int(place.sum())))
            unpacked.append(rows.input_ids[row][place].tolist())
    assert sorted(unpacked) == sorted(document.input_ids for document in documents)
    assert (rows.labels[rows.document == -1] == IGNORED).all()


def test_a_document_longer_than_a_row_is_left_out() -> None:
    rows = pack_rows([Document([1] * 9, [1] * 9), Document([2], [2])], 8)
    assert rows.input_ids.tolist() == [[2, 0, 0, 0, 0, 0, 0, 0]]


def test_batches_visit_every_row_once() -> None:
    rows = pack_rows([Document([number] * 4, [number] * 4) for number in range(1, 7)], 4)
    seen = torch.cat([batch.input_ids[:, 0] for batch in batches(rows, 2, seed=0)])
    assert sorted(seen.tolist()) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("seed", range(20))
def test_chats_alternate_and_end_with_an_answer(seed: int) -> None:
    roles = [message["role"] for message in draw_chat(Random(seed))]
    turns = roles[1:] if roles[0] == "system" else roles
    assert turns == ["user", "assistant"] * (len(turns) // 2)
