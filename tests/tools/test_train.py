"""The training script, end to end on a tiny setting: it learns, and one seed gives one set of bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from tools.embedded_model.data import IGNORED, PackedRows, batches, encode_documents, pack_rows
from tools.embedded_model.train import (
    TrainConfig,
    build_tokenizer,
    main,
    model_config,
    next_token_loss,
    save,
    train,
)

TINY = TrainConfig(
    documents=300,
    tokenizer_chats=300,
    vocab_size=300,
    hidden_size=64,
    num_layers=1,
    row_length=256,
    batch_rows=2,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_training_learns_and_saves_a_model_that_loads(tmp_path: Path) -> None:
    model, tokenizer = train(TINY)
    rows = pack_rows(encode_documents(tokenizer, 9, 40), TINY.row_length)
    (batch,) = batches(rows, len(rows.input_ids), seed=0)
    with torch.no_grad():
        trained = next_token_loss(model, batch)
        untrained = next_token_loss(Qwen3ForCausalLM(model_config(TINY, tokenizer)), batch)
    assert trained < untrained - 1
    save(model, tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()


def test_one_seed_gives_one_set_of_bits() -> None:
    short = replace(TINY, documents=60)
    first, second, other = (
        train(config)[0].state_dict() for config in (short, short, replace(short, seed=1))
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.norm.weight"], other["model.norm.weight"])


def test_training_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train(replace(TINY, documents=60))
    assert torch.equal(torch.rand(3), expected)


def test_a_packed_document_has_the_loss_that_it_has_alone() -> None:
    tokenizer = build_tokenizer(TINY)
    model = Qwen3ForCausalLM(model_config(TINY, tokenizer))
    documents = encode_documents(tokenizer, 9, 12)
    packed = pack_rows(documents, 1024)
    assert len(packed.input_ids) == 1, "the documents should share one row"
    with torch.no_grad():
        together = next_token_loss(model, packed)
        alone = [next_token_loss(model, pack_rows([document], 1024)) for document in documents]
        # The control: one document id for all lets each one see, and be predicted by, its neighbours.
        merged = PackedRows(
            packed.input_ids, packed.labels, packed.position_ids, torch.zeros_like(packed.document)
        )
        mixed = next_token_loss(model, merged)
    # The first label of a text without roles follows nothing, so it is not learned.
    counts = [sum(label != IGNORED for label in document.labels[1:]) for document in documents]
    expected = sum(loss * count for loss, count in zip(alone, counts, strict=True)) / sum(counts)
    assert torch.allclose(together, expected, atol=1e-5)
    assert not torch.allclose(mixed, expected, atol=1e-4)


@pytest.mark.thorough
def test_the_command_trains_saves_and_prints_the_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--out", str(tmp_path), "--documents", "200"])
    printed = capsys.readouterr().out
    assert "step 1/" in printed and "| one-digit sums |" in printed
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in tmp_path.iterdir()
    }
