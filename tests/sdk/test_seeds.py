"""Seeds: of one run, prompt, occurrence and index each its own; the same on every machine and in every version."""

from __future__ import annotations

from itertools import product

from myserve.sdk.seeds import MAX_SEED, index_seed, prompt_seed, random_seed


def test_they_are_what_they_were() -> None:
    """A journal names samples by them: another value would be another sample."""
    assert prompt_seed(7, [1, 2], 0) == 8_486_566_230_286_686_776
    assert prompt_seed(7, [1, 2], 1) == 4_294_132_625_080_342_091
    assert index_seed(7, 1) == 3_920_789_355_655_775_238


def test_no_two_samples_of_a_run_share_one() -> None:
    prompts = [[], [0], [1], [12], [1, 2], [2, 1], [1, 2, 3]]
    seeds = [prompt_seed(run, prompt, again) for run, prompt, again in product(range(5), prompts, range(5))]
    seeds += [index_seed(seed, index) for seed in range(20) for index in range(1, 20)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed <= MAX_SEED for seed in seeds)


def test_run_and_occurrence_are_not_mistaken_for_tokens() -> None:
    assert prompt_seed(1, [2, 3], 0) != prompt_seed(1, [3], 2)
    assert prompt_seed(1, [23], 0) != prompt_seed(1, [2, 3], 0)


def test_a_call_without_a_seed_gets_one_of_its_own() -> None:
    drawn = {random_seed() for _ in range(100)}
    assert len(drawn) == 100 and max(drawn) <= MAX_SEED
