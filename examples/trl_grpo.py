"""TRL's GRPOTrainer with rollouts from our server, which gets the trainer's weights after every step.

pip install trl datasets
python examples/trl_grpo.py                  # starts a server of the embedded model
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any

import torch
from support.serving import Server
from support.sums import MAX_TOKENS, PRACTICE, question
from transformers import AutoModelForCausalLM, AutoTokenizer

from myserve.adapters.trl import Rollouts, trl_rollout_func
from myserve.embedded import embedded_model_path
from myserve.sdk import DeploymentSampler


def rewards(prompts: list[str], completions: list[str], answer: list[str], **_: object) -> list[float]:
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


class OnPolicy:
    """TRL's `rollout_func`: before it draws, the server has the weights that the trainer has."""

    def __init__(self, server: Server, sampler: DeploymentSampler, weights_dir: Path) -> None:
        self._server, self._sampler, self._weights_dir = server, sampler, weights_dir
        self._draw = trl_rollout_func(sampler, max_tokens=MAX_TOKENS)
        self._loaded = 0  # the server starts with the weights that the trainer starts with

    def __call__(self, prompts: list[Any], trainer: Any) -> Rollouts:
        step = trainer.state.global_step
        if step != self._loaded:
            trainer.model.save_pretrained(self._weights_dir / f"step-{step:04}")
            asyncio.run(self._server.load(self._sampler, step))
            self._loaded = step
        return self._draw(prompts, trainer)


def main(steps: int = 4, prompts: int = 16, n: int = 8) -> list[dict[str, float]]:
    """TRL's log, a row a step."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    path = embedded_model_path()
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    rows = [{"prompt": question(pair), "answer": str(sum(pair))} for pair in PRACTICE]
    options = {"max_steps": steps, "per_device_train_batch_size": prompts * n, "num_generations": n}
    options |= {
        "max_completion_length": MAX_TOKENS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    options |= {"learning_rate": 1e-5, "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    with tempfile.TemporaryDirectory() as weights_dir, Server(str(path), Path(weights_dir)) as server:
        tokenizer = AutoTokenizer.from_pretrained(path)
        sampler = DeploymentSampler(server.url, server.name, "", tokenizer, run_seed=7)
        trainer = GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=rewards,
            args=GRPOConfig(output_dir=weights_dir, **options),
            train_dataset=Dataset.from_list(rows),
            rollout_func=OnPolicy(server, sampler, Path(weights_dir)),
        )
        trainer.train()
        return [row for row in trainer.state.log_history if "reward" in row]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=4)
    main(**vars(parser.parse_args()))
