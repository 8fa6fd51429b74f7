"""Recorded samples of every mode are drawn again to the bit; an edit of any field that counts is caught."""

from __future__ import annotations

import asyncio
import copy
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.verify.faulty import FaultySampler
from myserve.cli import app as command
from myserve.sdk import DeploymentSampler
from myserve.verify.replay.compare import ReplayResult
from myserve.verify.replay.records import read_records, record_of
from myserve.verify.replay.run import replay

Line = dict[str, Any]
MODEL = "myserve-demo"
SHARED = {"return_token_ids": True, "seed": 11}
COLOR = SHARED | {"messages": [{"role": "user", "content": "Say a color:"}], "max_tokens": 8}
STORY = SHARED | {"prompt": "Once upon a time", "max_tokens": 12}
IDS = SHARED | {"prompt": [19, 424, 223, 20, 495, 223], "max_tokens": 6}
PENALTIES = {"frequency_penalty": 0.9, "presence_penalty": 0.4, "repetition_penalty": 1.2}
BODIES: dict[str, Line] = {
    "greedy": STORY | {"temperature": 0, "logprobs": True},
    "lists": STORY | {"logprobs": 3, "n": 2},
    "filters": STORY | {"top_p": 0.9, "top_k": 50, "min_p": 0.01, "temperature": 0.8, "logprobs": True, "kept": True},
    "penalties": STORY | PENALTIES | {"logprobs": True},
    "bias": IDS | {"logit_bias": {"21": 2}, "logprobs": True, "top_logprobs": 3},
    "stop": STORY | {"stop": ["the"], "max_tokens": 30, "logprobs": True},
    "torch": STORY | {"noise": "torch", "logprobs": True},
    "chat": COLOR | {"logprobs": True, "top_logprobs": 2, "n": 3},
    "one": COLOR | {"logprobs": True},
    "many": {"prompt": ["One, two,", "Say a"], "max_tokens": 5, "n": 2, "logprobs": True, "seed": 5},
    "arrays": STORY | {"token_arrays": True},
    "echo": IDS | {"echo": True, "logprobs": True},
    "generate": {"token_ids": IDS["prompt"], "sampling_params": {"max_tokens": 5, "logprobs": 1, "seed": 2}},
}  # fmt: skip
STREAMED = {"chat": "chat streamed", "filters": "filters streamed", "stop": "stop streamed"}


def post(url: str, body: Line) -> bytes:
    route = (
        "/v1/chat/completions" if "messages" in body
        else "/inference/v1/generate" if "token_ids" in body
        else "/v1/completions"
    )  # fmt: skip
    request = urllib.request.Request(
        url + route, json.dumps({"model": MODEL} | body).encode(), {"content-type": "application/json"}
    )
    answer: bytes = urllib.request.urlopen(request, timeout=60).read()
    return answer


@pytest.fixture(scope="module")
def url(sampler: tuple[str, FaultySampler]) -> str:
    return sampler[0]


@pytest.fixture(scope="module")
def lines(url: str) -> dict[str, Line]:
    """One record of each mode."""
    found = {}
    for name, body in BODIES.items():
        found[name] = record_of({"model": MODEL} | body, json.loads(post(url, body)))
    for name, streamed in STREAMED.items():
        body = {"model": MODEL, "stream": True} | BODIES[name]
        found[streamed] = {"request": body, "stream": post(url, body).decode()}
    return found


def replayed(url: str, tmp_path: Path, *lines: Line) -> list[ReplayResult]:
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (results,) = asyncio.run(replay(read_records(file), [url]))
    return results


def test_every_mode_is_identical(url: str, lines: dict[str, Line], tmp_path: Path) -> None:
    results = replayed(url, tmp_path, *lines.values())
    assert {result.source: result for result in results if result.verdict != "identical"} == {}
    assert len(results) == len(lines) + 1 + 2 + 3 + 2  # those of several choices


def changed(**values: Any) -> Callable[[Line], None]:
    """Return an edit of a choice's fields."""
    return lambda line: line["response"]["choices"][0].update(values)


def asked(**values: Any) -> Callable[[Line], None]:
    return lambda line: line["request"].update(values)


def entry(place: int, **values: Any) -> Callable[[Line], None]:
    return lambda line: line["response"]["choices"][0]["logprobs"]["content"][place].update(values)


def add(place: int, by: float, name: str = "logprob") -> Callable[[Line], None]:
    def edit(line: Line) -> None:
        line["response"]["choices"][0]["logprobs"]["content"][place][name] += by

    return edit


def other_id(line: Line) -> None:
    line["response"]["choices"][0]["token_ids"][1] += 1


def in_stream(old: str, new: str) -> Callable[[Line], None]:
    def edit(line: Line) -> None:
        assert old in line["stream"]
        line["stream"] = line["stream"].replace(old, new, 1)

    return edit


# Of records without a digest: it is the redraw that finds them.
PARAMETERS: dict[str, Line] = {
    "filters": {
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.3,
        "seed": 3,
        "max_tokens": 5,
        "kept": False,
    }
    | {"prompt": "Twice upon a time"},
    "penalties": {"frequency_penalty": -2, "presence_penalty": -2, "repetition_penalty": 3.0, "seed": 4},
    "bias": {"logit_bias": {"30": 9}, "prompt": [19, 424, 223, 21, 495, 223]},
    "stop": {"stop": ["a"], "max_tokens": 2},
    "torch": {"noise": "counter"},
    "many": {"prompt": ["Say a", "One, two,"], "seed": 6, "n": 4},
    "echo": {"echo": False},
    "generate": {
        "token_ids": [19, 424],
        "sampling_params": {"max_tokens": 5, "logprobs": 1, "top_p": 0.1, "seed": 5},
    },
    "chat": {"messages": [{"role": "user", "content": "Roll a die."}]},
}
RESULTS: dict[str, list[Callable[[Line], None]]] = {
    "bias": [add(1, 1e-3), add(0, 1e-6), other_id],
    "stop": [changed(finish_reason="length"), changed(stop_reason="a"), changed(text="Once")],
    "greedy": [
        other_id,
        add(2, -0.5),
        entry(3, token_id=7),
        entry(1, token="x"),
        entry(1, bytes=[1]),
        entry(2, text_offset=3),
        entry(0, sampling_logprob=-1.0),
        asked(temperature=1.0),
    ],
    "chat": [
        changed(seed=12345),
        changed(message={"role": "assistant", "content": "blurple"}),
        changed(message={"role": "user", "content": ""}),
        changed(weight_version=3),
        changed(index=1),
        changed(prompt_token_ids=[1, 2, 3]),
        changed(token_ids=[5]),
        entry(0, top_logprobs=[{"token": "x", "logprob": -1.0}]),
    ],
    "torch": [changed(seed=1), add(0, 0.1, "sampling_logprob")],
    "one": [changed(finish_reason="length"), entry(0, logprob=-0.5)],
    "arrays": [changed(text="x"), changed(token_arrays={"count": 0})],
    "echo": [add(4, 0.01)],
    "generate": [changed(token_ids=[21])],
    "filters streamed": [
        in_stream('"finish_reason":"length"', '"finish_reason":"stop"'),
        in_stream('"logprob":-', '"logprob":-1'),
        in_stream('"text":" ', '"text":"'),
    ],
    "chat streamed": [
        in_stream('"seed":', '"seed":1'),
        in_stream('"weight_version":0', '"weight_version":1'),
    ],
}
EDITS: list[tuple[str, Callable[[Line], None]]] = [
    *(
        (name, asked(**{field: value}))
        for name, values in PARAMETERS.items()
        for field, value in values.items()
    ),
    *((name, edit) for name, edits in RESULTS.items() for edit in edits),
]


def test_fifty_edited_records_are_caught(url: str, lines: dict[str, Line], tmp_path: Path) -> None:
    edited = []
    for name, edit in EDITS:
        line = copy.deepcopy({k: v for k, v in lines[name].items() if k != "digest"})
        edit(line)
        edited.append(line)
    assert len(edited) >= 50
    results = replayed(url, tmp_path, *edited)
    for number, (name, _) in enumerate(EDITS):
        own = [result for result in results if f"records.jsonl:{number + 1} " in result.source + " "]
        assert any(result.verdict in ("differs", "edited") for result in own), (number, name, own)


@pytest.mark.parametrize(
    ("name", "edit"), [("greedy", asked(seed=77)), ("stop", asked(max_tokens=31)), ("chat", asked(user="x"))]
)
def test_a_digest_shows_what_no_draw_depends_on(
    name: str, edit: Callable[[Line], None], url: str, lines: dict[str, Line], tmp_path: Path
) -> None:
    line = copy.deepcopy(lines[name])
    edit(line)
    assert {result.verdict for result in replayed(url, tmp_path, line)} == {"edited"}


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
    result = replayed(url, tmp_path, line)[0]
    assert result.verdict == "differs" and result.cause.startswith(cause), result
    if name == "bias" and "logit_bias" in line["request"] and "25" in line["request"]["logit_bias"]:
        assert result.token == 0 and "drawn 25" in result.what
        assert result.margin is not None


def test_what_a_record_lacks_is_said(url: str, lines: dict[str, Line], tmp_path: Path) -> None:
    answer = copy.deepcopy(lines["bias"]["response"])
    (alone,) = replayed(url, tmp_path, answer)
    assert alone.verdict == "cannot" and "temperature" in alone.what
    answer["choices"][0].pop("seed")
    request = {name: value for name, value in lines["bias"]["request"].items() if name != "seed"}
    (unseeded,) = replayed(url, tmp_path, {"request": request, "response": answer})
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
