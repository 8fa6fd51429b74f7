"""A killed run goes on where it stopped, asks for nothing twice, and ends as an unbroken one would."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from myserve.sdk.records.journal import Journal, JournalError
from myserve.sdk.types import SampledCompletion

PROMPTS = [[1, 2, number % 20] for number in range(40)]  # each prompt twice


def sample(index: int) -> SampledCompletion:
    return SampledCompletion(
        text=f"{index}",
        full_tokens=[1, index],
        prompt_len=1,
        finish_reason="stop",
        completion_len=1,
        index=index,
    )


def test_every_cut_of_the_file_leaves_a_journal_with_its_whole_lines(tmp_path):
    whole = tmp_path / "whole.jsonl"
    with Journal(whole, run_seed=7) as journal:
        for index in range(3):
            journal.add("a", sample(index))
    data = whole.read_bytes()
    cut = tmp_path / "cut.jsonl"
    # of a head that is cut so early it might be another file's first bytes: below
    for length in [0, *range(len('{"journal":'), len(data))]:
        cut.write_bytes(data[:length])
        lines = data[:length].count(b"\n")
        with Journal(cut, run_seed=8) as journal:
            assert journal.run_seed == (7 if lines else 8)
            assert journal.known("a") == {index: sample(index) for index in range(lines - 1)}
            journal.add("a", sample(9))  # what is added after a cut is whole again
        with Journal(cut, run_seed=8) as journal:
            assert journal.known("a")[9] == sample(9)


def test_a_damaged_line_costs_its_own_sample_alone(tmp_path):
    path = tmp_path / "run.jsonl"
    with Journal(path, run_seed=7) as journal:
        for index in range(3):
            journal.add("a", sample(index))
    lines = path.read_bytes().split(b"\n")
    lines[2] = lines[2][:-3] + b"\x00\x00\x00"
    path.write_bytes(b"\n".join(lines))
    with Journal(path, run_seed=7) as journal:
        assert journal.known("a") == {0: sample(0), 2: sample(2)}


def test_what_is_noted_of_a_sample_is_a_line_of_its_own(tmp_path):
    path = tmp_path / "run.jsonl"
    with Journal(path, run_seed=7) as journal:
        for index in range(2):
            journal.add("a", sample(index))
    before = path.read_bytes()
    with Journal(path, run_seed=7) as journal:
        journal.note(sample(1), reward=1, trainer_logprobs=[-0.5])
        journal.add("b", sample(2))
        journal.note(sample(2), reward=0.25)
        with pytest.raises(JournalError, match="has no sample 3"):
            journal.note(sample(3), reward=1.0)
        with pytest.raises(ValueError, match="has 2 numbers, the completion 1"):
            journal.note(sample(1), trainer_logprobs=[-0.5, -0.5])
        with pytest.raises(ValueError, match="finite"):
            journal.note(sample(1), reward=float("nan"))
    added = path.read_bytes().removeprefix(before).splitlines()
    assert [json.loads(line).get("note") for line in added] == [
        {"reward": 1.0, "trainer_logprobs": [-0.5]}, None, {"reward": 0.25}
    ]  # fmt: skip
    with Journal(path, run_seed=7) as journal:
        assert journal.known("a") == {index: sample(index) for index in range(2)}
        assert journal.known("b") == {2: sample(2)}


def test_two_runs_do_not_share_a_journal(tmp_path):
    with (
        Journal(tmp_path / "run.jsonl", run_seed=7),
        pytest.raises(BlockingIOError, match="in use by another run"),
    ):
        Journal(tmp_path / "run.jsonl", run_seed=7)


@pytest.mark.parametrize(
    "text",
    [
        '{"my": "notes"}\n',
        '{"my": "notes"}',  # one line without an end: this was emptied once
        "{",
        '{"journal":1,"run_seed":7,"mine":true}',
        '{"journal":"of a ship"}',
        '{"journal":2,"run_seed":7}\n',
        "a\nb",
        "\n",
        "\x00" * 50,
        "[" * 100_000,
    ],
)
def test_another_file_is_not_changed(tmp_path, text):
    path = tmp_path / "notes.jsonl"
    path.write_text(text)
    with pytest.raises(JournalError, match=r"notes\.jsonl is not a journal"):
        Journal(path, run_seed=7)
    assert path.read_text() == text


def edited(path, line, **changes):
    """Write changed fields into the sample of a line, as a person with an editor does."""
    lines = path.read_text().splitlines()
    entry = json.loads(lines[line])
    entry["sample"] |= changes
    lines[line] = json.dumps(entry)
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"full_tokens": "1, 2"}, "Expected `array`"),
        ({"full_tokens": [1, "x"]}, "Expected `int`"),
        ({"full_tokens": [1, 2, 3]}, "3 tokens, and 1 \\+ 1 lengths"),
        ({"prompt_len": -1, "completion_len": 3}, "below 0"),
        ({"inference_logprobs": [0.5]}, "a logprob is above 0"),
        ({"inference_logprobs": [-0.5, -0.5]}, "2 rows of inference_logprobs for 1 tokens"),
        ({"top_logprobs": 7}, "top_logprobs is a list of lists"),
        ({"top_logprobs": [[[3, "x", ""]]]}, "Expected `float"),
        ({"index": 2}, "index 1 holds sample 2"),
        ({"text": None}, "Expected `str`"),
    ],
)
def test_an_edited_sample_is_an_error_that_names_its_line(tmp_path, changes, words):
    path = tmp_path / "run.jsonl"
    with Journal(path, run_seed=7) as journal:
        for index in range(3):
            journal.add("a", sample(index))
    edited(path, 2, **changes)
    with (
        Journal(path, run_seed=7) as journal,
        pytest.raises(JournalError, match=rf"run\.jsonl, line 3, .*{words}"),
    ):
        journal.known("a")


@pytest.mark.parametrize(
    "line",
    ['{"key": ["a"], "index": 0, "sample": {}}', '{"key": "a", "index": "0", "sample": {}}',
     '{"key": "a", "index": -1, "sample": {}}', '{"key": "a", "index": true, "sample": {}}', "{}"],
)  # fmt: skip
def test_an_edited_entry_is_an_error_that_names_its_line(tmp_path, line):
    path = tmp_path / "run.jsonl"
    Journal(path, run_seed=7).close()
    before = path.read_text() + line + "\n"
    path.write_text(before)
    with pytest.raises(JournalError, match="line 2, is not as it was written"):
        Journal(path, run_seed=7)
    assert path.read_text() == before


def test_a_seed_that_was_edited_is_an_error(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text('{"journal":1,"run_seed":"7"}\n')
    with pytest.raises(JournalError, match=r"line 1, .*run_seed is '7'"):
        Journal(path, run_seed=7)


@pytest.mark.asyncio
async def test_a_sample_of_another_prompt_is_not_taken(make_sampler, tmp_path):
    path = tmp_path / "run.jsonl"
    await make_sampler().sample_batch([[1, 2]], journal=path, max_tokens=4)
    tokens = json.loads(path.read_text().splitlines()[1])["sample"]["full_tokens"]
    edited(path, 1, full_tokens=[1, 3, *tokens[2:]])
    with pytest.raises(JournalError, match="has another prompt"):
        await make_sampler().sample_batch([[1, 2]], journal=path, max_tokens=4)


@pytest.mark.asyncio
async def test_a_full_disk_stops_the_run_instead_of_passing_for_a_broken_connection(
    make_sampler, stub, tmp_path, monkeypatch
):
    def full(file: int, data: bytes) -> int:
        if b'"key"' not in data:
            return len(data)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(JournalError, match=r"cannot write .*run\.jsonl: No space left"):
        await make_sampler().sample_batch([[1, 2]], journal=tmp_path / "run.jsonl")
    assert len(stub.bodies) == 1  # nothing was asked again


PROGRAM = """
    import asyncio, json, sys
    from myserve.sdk import DeploymentSampler, FixedConcurrencyController
    url, journal, count = sys.argv[1:]
    sampler = DeploymentSampler(url, "toy", concurrency_controller=FixedConcurrencyController(6))
    prompts = [[1, 2, number % 20] for number in range(40)]
    async def main():
        batch = sampler.sample_batch(prompts, n=3, max_tokens=20, logprobs=True, journal=journal)
        async for group in batch:
            print(group.prompt_index, flush=True)
    asyncio.run(main())
"""


@pytest.mark.asyncio
async def test_a_run_that_is_killed_resumes(make_sampler, stub, tmp_path):
    stub.pause = 0.003
    journal = tmp_path / "run.jsonl"
    Journal(journal, run_seed=7).close()
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(PROGRAM), stub.url, str(journal), "40", stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    for _ in range(5):
        await child.stdout.readline()
    os.kill(child.pid, signal.SIGKILL)
    await child.wait()
    await asyncio.sleep(0.05)
    stub.pause = 0.0
    unbroken = await make_sampler(run_seed=7).sample_batch(PROMPTS, n=3, max_tokens=20, logprobs=True)
    with Journal(journal, run_seed=0) as left:
        kept = sum(len(samples) for samples in left._places.values())
    assert 15 <= kept < 120
    asked_before = len(stub.bodies)
    sampler = make_sampler()
    resumed = await sampler.sample_batch(PROMPTS, n=3, max_tokens=20, logprobs=True, journal=journal)
    assert sampler.stats.samples == 120 - kept  # nothing twice
    assert 0 < len(stub.bodies) - asked_before < 40
    assert [[(c.text, c.inference_logprobs) for c in group] for group in resumed] == [
        [(c.text, c.inference_logprobs) for c in group] for group in unbroken
    ]
    # A third run asks for nothing at all.
    asked_before = len(stub.bodies)
    assert (
        len(await make_sampler().sample_batch(PROMPTS, n=3, max_tokens=20, logprobs=True, journal=journal))
        == 40
    )
    assert len(stub.bodies) == asked_before
    # Control: with other options they are other samples.
    await make_sampler().sample_batch(PROMPTS, n=3, max_tokens=21, logprobs=True, journal=journal)
    assert len(stub.bodies) == asked_before + 40
