"""An environment of tinker-cookbook, played by our server: `SamplerTokenCompleter` is its `TokenCompleter`.

pip install tinker tinker-cookbook
python examples/tinker_completer.py          # starts a server of the embedded model
"""

from __future__ import annotations

import argparse
import asyncio
from statistics import fmean
from typing import Any

from support.serving import sampler_for
from support.sums import HELD_OUT, MAX_TOKENS, Sum, question

from myserve.adapters.tinker import SamplerTokenCompleter


def sum_env(pair: Sum, tokenizer: Any) -> Any:
    """Return a sum as an `Env`: one turn, reward 1 for the right number."""
    import tinker
    from tinker_cookbook.rl.types import Env, StepResult

    class SumEnv(Env):
        async def initial_observation(self) -> Any:
            turn = [{"role": "user", "content": question(pair)}]
            ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
            return tinker.ModelInput.from_ints(ids), [tokenizer.eos_token_id]

        async def step(self, action: list[int], *, extra: Any = None) -> Any:
            ended = action[-1] == tokenizer.eos_token_id
            right = ended and tokenizer.decode(action[:-1]) == str(sum(pair))
            return StepResult(
                reward=float(right),
                episode_done=True,
                next_observation=tinker.ModelInput.from_ints([]),
                next_stop_condition=[],
            )

    return SumEnv()


async def main(problems: int = 100, n: int = 4, url: str = "") -> list[Any]:
    """Play n trajectories of each problem; print the mean reward."""
    from tinker_cookbook.rl.rollouts import do_single_rollout

    async with sampler_for(url) as sampler:
        policy: Any = SamplerTokenCompleter(sampler, max_tokens=MAX_TOKENS)
        envs = [sum_env(pair, sampler.tokenizer) for pair in HELD_OUT[:problems] for _ in range(n)]
        trajectories = await asyncio.gather(*(do_single_rollout(policy, env) for env in envs))
    rewards = [fmean(t.reward for t in trajectory.transitions) for trajectory in trajectories]
    print(f"{len(rewards)} trajectories, mean reward {fmean(rewards):.3f}")
    return list(trajectories)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="")
    parser.add_argument("--problems", type=int, default=100)
    asyncio.run(main(**vars(parser.parse_args())))
