"""Recorded samples of every mode are drawn again to the bit; an edit of any field that counts is caught."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.verify.faulty import FaultySampler
from benchmarks.verify.replays import (
    EDITS,
    IDS,
    MODEL,
    Line,
    add,
    asked,
    changed,
    edited,
    recorded,
    replayed,
    was_caught,
)
from myserve.cli import app as command
from myserve.sdk import DeploymentSampler
from myserve.verify.replay.records import read_records
from myserve.verify.replay.run import replay


@pytest.fixture(scope="module")
def url(sampler: tuple[str, FaultySampler]) -> str:
    return sampler[0]


@pytest.fixture(scope="module")
def lines(url: str) -> dict[str, Line]:
    """One record of each mode."""
    return recorded(url)


def test_every_mode_is_identical(url: str, lines: dict[str, Line], tmp_path: Path) -> None:
    results = replayed(url, tmp_path, list(lines.values()))
    assert {result.source: result for result in results if result.verdict != "identical"} == {}
    assert len(results) == len(lines) + 1 + 2 + 3 + 2  # those of several choices


def test_fifty_edited_records_are_caught(url: str, lines: dict[str, Line], tmp_path: Path) -> None:
    made = edited(lines)
    assert len(made) >= 50
    results = replayed(url, tmp_path, made)
    assert [EDITS[at][0] for at in range(len(made)) if not was_caught(results, at)] == []


@pytest.mark.parametrize(
    ("name", "edit"), [("greedy", asked(seed=77)), ("stop", asked(max_tokens=31)), ("chat", asked(user="x"))]
)
def test_a_digest_shows_what_no_draw_depends_on(
    name: str, edit: Callable[[Line], None], url: str, lines: dict[str, Line], tmp_path: Path
) -> None:
    line = copy.deepcopy(lines[name])
    edit(line)
    assert {result.verdict for result in replayed(url, tmp_path, [line])} == {"edited"}


def shifted(by: float) -> Callable[[Line], None]:
    def edit(line: Line) -> None:
        for one in line["response"]["choices"][0]["logprobs"]["content"]:
            one["logprob"] -= by

    return edit


@pytest.mark.parametrize(
    ("name", "edit", "cause"),
    [
        ("bias", shifted(1e-4), "arithmetic: another kind of CPU"),
        ("bias", shifted(0.5), "weights: the recorded tokens' logprobs differ by up to 0.5"),
        ("bias", add(1, -0.5), "an edited record: its logprobs are the server's up to token 1"),
        ("bias", asked(logit_bias={"25": 100}), "parameters, or an edited record"),
        ("chat", changed(weight_version=7), "weights: version 7 was recorded, 0 is served"),
        ("one", changed(prompt_token_ids=[1, 2, 3]), "the prompt: another chat template"),
    ],
)
def test_the_likely_cause_is_named(
    name: str, edit: Callable[[Line], None], cause: str, url: str, lines: dict[str, Line], tmp_path: Path
) -> None:
    line = copy.deepcopy({k: v for k, v in lines[name].items() if k != "digest"})
    if name == "one":
        line["response"]["usage"].pop("prompt_tokens")
    edit(line)
    result = replayed(url, tmp_path, [line])[0]
    assert result.verdict == "differs" and result.cause.startswith(cause), result
    if name == "bias" and "logit_bias" in line["request"] and "25" in line["request"]["logit_bias"]:
        assert result.token == 0 and "drawn 25" in result.what
        assert result.margin is not None


def test_what_a_record_lacks_is_said(url: str, lines: dict[str, Line], tmp_path: Path) -> None:
    answer = copy.deepcopy(lines["bias"]["response"])
    (alone,) = replayed(url, tmp_path, [answer])
    assert alone.verdict == "cannot" and "temperature" in alone.what
    answer["choices"][0].pop("seed")
    request = {name: value for name, value in lines["bias"]["request"].items() if name != "seed"}
    (unseeded,) = replayed(url, tmp_path, [{"request": request, "response": answer}])
    assert unseeded.verdict == "cannot" and "no seed" in unseeded.what


def test_a_journal_is_replayed_and_its_edits_are_caught(url: str, tmp_path: Path) -> None:
    """Its key is a fingerprint of the request: parameters, seed and prompt cannot be edited unseen."""
    path = tmp_path / "run.jsonl"

    async def sample() -> None:
        async with DeploymentSampler(url, MODEL, run_seed=1) as sampler:
            batch = sampler.sample_batch(
                [IDS["prompt"], [20, 21]],
                journal=path,
                n=3,
                max_tokens=6,
                logprobs=True,
                top_p=0.9,
                min_p=0.01,
            )
            assert len(await batch) == 2

    asyncio.run(sample())
    (results,) = asyncio.run(replay(read_records(path), [url]))
    assert [result.verdict for result in results] == ["identical"] * 6

    head, first, *_ = path.read_text().splitlines()

    def verdict(edit: Callable[[Line], object]) -> str:
        entry = json.loads(first)
        edit(entry)
        path.write_text(head + "\n" + json.dumps(entry) + "\n")
        ((result,),) = asyncio.run(replay(read_records(path), [url]))
        return result.verdict

    assert verdict(lambda entry: None) == "identical"
    assert verdict(lambda entry: entry["request"].update(top_p=0.8)) == "edited"
    assert verdict(lambda entry: entry["request"].update(seed=1)) == "edited"
    assert verdict(lambda entry: entry["sample"]["full_tokens"].__setitem__(0, 5)) == "edited"
    assert verdict(lambda entry: entry["sample"].update(index=2)) == "edited"
    assert verdict(lambda entry: entry["sample"]["full_tokens"].__setitem__(-1, 5)) == "differs"
    assert verdict(lambda entry: entry["sample"]["inference_logprobs"].__setitem__(0, -0.1)) == "differs"
    assert verdict(lambda entry: entry["sample"].update(text="no")) == "differs"
    assert verdict(lambda entry: entry.pop("request")) == "cannot"


def test_the_command_compares_servers_and_a_local_engine(
    url: str, lines: dict[str, Line], tmp_path: Path
) -> None:
    file, stream, answers = tmp_path / "one.json", tmp_path / "stream.txt", tmp_path / "results.json"
    file.write_text(json.dumps(lines["chat"]))
    stream.write_text(lines["chat streamed"]["stream"])
    (tmp_path / "request.json").write_text(json.dumps(lines["chat streamed"]["request"]))

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(command, ["replay", *map(str, arguments)], env={"COLUMNS": "200"})

    both = run(file, "--against", url, "--against", url, "--json", answers)
    assert both.exit_code == 0 and "3 of 3 records came out the same on all 2 servers" in both.output
    assert [len(results) for results in json.loads(answers.read_text())] == [3, 3]
    local = run(stream, "--engine", "embedded", "--request", tmp_path / "request.json")
    assert local.exit_code == 0 and "3 identical" in local.output, local.output

    line = copy.deepcopy(lines["chat"])
    line["response"]["choices"][1]["message"]["content"] += "!"
    file.write_text(json.dumps(line | {"digest": None}))
    wrong = run(file, "--against", url)
    assert wrong.exit_code == 1 and "2 identical, 1 differs" in wrong.output
    assert run(tmp_path / "none.json", "--against", url).exit_code == 1
