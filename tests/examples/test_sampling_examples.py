"""Best of n, pairs for DPO and pass@k, small, on a real server of the embedded model."""

from __future__ import annotations

import json
from itertools import combinations

import pytest

pytestmark = pytest.mark.asyncio


async def test_pass_at_k_is_reproducible_to_the_digit_and_grows_with_k(embedded_url):
    import eval_pass_at_k

    first, again = [await eval_pass_at_k.main(n=8, problems=24, url=embedded_url) for _ in range(2)]
    assert first == again
    means = [mean for mean, *_ in first.values()]
    assert means == sorted(means) and means[0] < means[-1]
    assert all(low <= mean <= high for mean, low, high in first.values())
    assert await eval_pass_at_k.main(n=8, problems=24, url=embedded_url, seed=8) != first


async def test_the_estimator_is_the_mean_over_all_choices_of_k():
    from eval_pass_at_k import pass_at_k

    for n, right, k in [(6, 2, 3), (5, 0, 2), (5, 5, 1), (7, 6, 4)]:
        answers = [True] * right + [False] * (n - right)
        choices = [any(chosen) for chosen in combinations(answers, k)]
        assert pass_at_k(n, right, k) == pytest.approx(sum(choices) / len(choices))


async def test_the_best_of_several_is_better_than_the_first(embedded_url):
    import best_of_n

    shares = await best_of_n.main(n=8, problems=60, url=embedded_url)
    assert shares["the first"] < min(shares["likeliest"], shares["most common"])


async def test_pairs_hold_what_was_sampled(embedded_url, tmp_path):
    import dpo_pairs
    from support.sums import PRACTICE, question
    from transformers import AutoTokenizer

    from myserve.embedded import embedded_model_path

    count = await dpo_pairs.main(str(tmp_path / "pairs.jsonl"), n=8, problems=30, url=embedded_url)
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == count > 5
    right = {question(pair): str(sum(pair)) for pair in PRACTICE}
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    for pair in pairs:
        wanted = right[pair["prompt"][0]["content"]]
        assert pair["chosen"][0]["content"] == wanted != pair["rejected"][0]["content"]
        assert tokenizer.decode(pair["chosen_ids"], skip_special_tokens=True) == wanted
        assert pair["chosen_ids"][-1] == pair["rejected_ids"][-1] == tokenizer.eos_token_id
        assert pair["chosen_ref_logp"] < 0
