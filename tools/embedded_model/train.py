"""Trains the embedded model, from drawing its text to saving its files: one seed, one command, two cores.

python -m tools.embedded_model.train --out DIR      # about a quarter of an hour on two idle cores
python -m tools.embedded_model.train --evaluate     # the figures in docs/demo_model.md
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from myserve.embedded import embedded_model_path
from tools.embedded_model.data import IGNORED, PackedRows, batches, draw_chat, encode_documents, pack_rows
from tools.embedded_model.evaluate import report
from tools.embedded_model.tokenizer import END_OF_TEXT, IM_END, MAX_LENGTH, train_tokenizer


@dataclass(frozen=True)
class TrainConfig:
    """All that a run depends on, beside the versions of torch and the number of its threads."""

    documents: int = 60_000
    seed: int = 0
    tokenizer_chats: int = 20_000  # enough to meet every word there is
    vocab_size: int = 2048
    hidden_size: int = 192
    num_layers: int = 4
    row_length: int = 128  # tokens; the longest chats are a few turns of 30
    batch_rows: int = 24  # small batches: many cheap steps beat few good ones at this size
    matrix_lr: float = 2e-3
    other_lr: float = 3e-3


def train(config: TrainConfig) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerBase]:
    """Return a trained model in float32 and its tokenizer; the same bits for the same config and thread count."""
    tokenizer = build_tokenizer(config)
    documents = encode_documents(tokenizer, config.seed, config.documents)
    rows = pack_rows(documents, config.row_length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Qwen3ForCausalLM(model_config(config, tokenizer))
    steps = len(rows.input_ids) // config.batch_rows
    optimizers = build_optimizers(model, config)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(each, partial(warmup_then_cosine, steps=steps))
        for each in optimizers
    ]
    model.train()
    began = time.monotonic()
    for step, batch in enumerate(batches(rows, config.batch_rows, config.seed)):
        loss = next_token_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            print(
                f"step {step + 1}/{steps}  loss {loss.item():.4f}  {time.monotonic() - began:.0f} s",
                flush=True,
            )
    model.train(False)
    return model, tokenizer


def build_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    """Train the tokenizer on chats like those of the model's corpus."""
    rng = Random(config.seed)
    chats = (draw_chat(rng) for _ in range(config.tokenizer_chats))
    return train_tokenizer((message["content"] for chat in chats for message in chat), config.vocab_size)


def model_config(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Qwen3Config:
    """Qwen3 in miniature: grouped queries, query and key norms, rotary positions, tied embeddings."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.hidden_size * 8 // 3,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.hidden_size // 32,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        eos_token_id=tokenizer.get_vocab()[IM_END],
        pad_token_id=tokenizer.get_vocab()[END_OF_TEXT],
        bos_token_id=None,
    )


def build_optimizers(model: Qwen3ForCausalLM, config: TrainConfig) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices inside, AdamW for embeddings and norms, as Muon's authors advise."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    return (
        torch.optim.Muon(matrices, lr=config.matrix_lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=config.other_lr, betas=(0.9, 0.95), weight_decay=0.0),
    )


def warmup_then_cosine(step: int, steps: int) -> float:
    """Return the share of the peak learning rate at `step`: up over the first twentieth, then down to 3 %.

    >>> [round(warmup_then_cosine(step, 100), 2) for step in (0, 4, 50, 100)]
    [0.2, 1.0, 0.52, 0.03]
    """
    return min(1.0, (step + 1) / (0.05 * steps)) * (
        0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / steps))
    )


def next_token_loss(model: Qwen3ForCausalLM, batch: PackedRows) -> Tensor:
    """Mean cross-entropy over the learned tokens; a document attends to itself alone."""
    same = batch.document[:, :, None] == batch.document[:, None, :]
    length = batch.input_ids.shape[1]
    mask = (same & torch.ones(length, length, dtype=torch.bool).tril())[:, None]  # [B, 1, T, T]
    hidden = model.model(
        input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state[:, :-1]
    target = batch.labels[:, 1:]
    # The first token of a document follows nothing: the end of its neighbour must not predict it.
    learned = (target != IGNORED) & (batch.document[:, 1:] == batch.document[:, :-1])
    # Only a third of all places is learned, so only they pay for the vocabulary's logits.
    return F.cross_entropy(model.lm_head(hidden[learned]), target[learned])


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write the folder that `from_pretrained` reads, weights in bfloat16."""
    ids = tokenizer.get_vocab()
    # Written afresh: one that is derived from the model's config would name a single end of text.
    ends = {"eos_token_id": [ids[IM_END], ids[END_OF_TEXT]], "pad_token_id": ids[END_OF_TEXT]}
    model.generation_config = GenerationConfig.from_dict(ends)
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.embedded_model.train", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--evaluate", action="store_true", help="print the figures of --model and train nothing"
    )
    parser.add_argument("--model", type=Path, default=embedded_model_path(), help="the folder to evaluate")
    parser.add_argument("--out", type=Path, default=Path("out/demo_model"), help="the folder to train into")
    parser.add_argument(
        "--documents", type=int, default=TrainConfig.documents, help="how much text to train on"
    )
    parser.add_argument("--seed", type=int, default=TrainConfig.seed)
    options = parser.parse_args(arguments)
    folder = options.model if options.evaluate else options.out
    if not options.evaluate:
        save(*train(TrainConfig(documents=options.documents, seed=options.seed)), folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    print(report(model, AutoTokenizer.from_pretrained(folder)))


if __name__ == "__main__":
    main()
