"""TRL's GRPOTrainer with rollouts from our server: `pip install trl datasets`, and a server of the same model.

python examples/trl_grpo.py --url http://localhost:8000
"""

from __future__ import annotations

import argparse

from sums import PRACTICE, question
from transformers import AutoTokenizer

from myserve.demo import embedded_model_path
from myserve.sdk import DeploymentSampler
from myserve.sdk.adapters import trl_rollout_func


def rewards(prompts: list[str], completions: list[str], answer: list[str], **_: object) -> list[float]:
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def main(url: str) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model = str(embedded_model_path())
    sampler = DeploymentSampler(url, "myserve-demo", "", AutoTokenizer.from_pretrained(model), run_seed=7)
    rows = [{"prompt": question(pair), "answer": str(sum(pair))} for pair in PRACTICE[:512]]
    GRPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=GRPOConfig(output_dir="runs/trl", max_steps=4, num_generations=8, report_to="none"),
        train_dataset=Dataset.from_list(rows),
        rollout_func=trl_rollout_func(sampler, max_tokens=8),
    ).train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://localhost:8000")
    main(**vars(parser.parse_args()))
