"""Records of every mode of sampling, and edits of them: `myserve replay` draws the ones again, and finds the others."""

from __future__ import annotations

import asyncio
import copy
import json
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from myserve.verify.replay.compare import ReplayResult
from myserve.verify.replay.records import read_records, record_of
from myserve.verify.replay.run import replay

__all__ = [
    "EDITS",
    "MODES",
    "Line",
    "add",
    "asked",
    "changed",
    "edited",
    "recorded",
    "replay_modes",
    "replayed",
]

Line = dict[str, Any]
MODEL = "myserve-demo"
SHARED = {"return_token_ids": True, "seed": 11}
COLOR = SHARED | {"messages": [{"role": "user", "content": "Say a color:"}], "max_tokens": 8}
STORY = SHARED | {"prompt": "Once upon a time", "max_tokens": 12}
IDS = SHARED | {"prompt": [19, 424, 223, 20, 495, 223], "max_tokens": 6}
PENALTIES = {"frequency_penalty": 0.9, "presence_penalty": 0.4, "repetition_penalty": 1.2}
SCHEMA = {"type": "object", "properties": {"color": {"enum": ["red", "green"]}}, "required": ["color"]}
FORM = {"type": "json_schema", "json_schema": {"name": "color", "schema": SCHEMA}}
WORDS = {"type": "object", "properties": {"word": {"type": "string", "maxLength": 4}}, "required": ["word"]}
PAINT = {"type": "function", "function": {"name": "paint", "parameters": SCHEMA}}
WRITE = {"type": "function", "function": {"name": "write", "parameters": WORDS}}
RENAMED = {"type": "function", "function": {"name": "colour", "parameters": SCHEMA}}
PARTS = [{"type": "const_string", "value": "So: "}, {"type": "regex", "pattern": "[a-z]{2,5}"}]
TAG = {"format": {"type": "sequence", "elements": PARTS}}
CALL = COLOR | {"logprobs": True, "max_tokens": 60}
MODES: dict[str, Line] = {
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
    "schema": COLOR | {"response_format": FORM, "max_tokens": 40, "logprobs": True},
    "regex": STORY | {"regex": "[a-d]{3,9}!", "logprobs": True},
    "choice": STORY | {"choice": ["red", "green", "blue"], "logprobs": True},
    "object": COLOR | {"response_format": {"type": "json_object"}, "max_tokens": 30, "logprobs": True},
    "grammar": STORY | {"grammar": 'start: ("a" | "b" | "cd")~3..8 "."', "logprobs": True},
    "tag": STORY | {"structured_outputs": {"structural_tag": TAG}, "logprobs": True},
    "tool": CALL | {"tools": [PAINT, WRITE], "tool_choice": {"type": "function", "function": {"name": "write"}}},
    "tools": CALL | {"tools": [PAINT, WRITE], "tool_choice": "required"},
    "generate": {"token_ids": IDS["prompt"], "sampling_params": {"max_tokens": 5, "logprobs": 1, "seed": 2}},
}  # fmt: skip
STREAMED = {
    "schema": "schema streamed",
    "chat": "chat streamed",
    "filters": "filters streamed",
    "stop": "stop streamed",
    "grammar": "grammar streamed",
    "tools": "tools streamed",
}


def post(url: str, body: Line) -> bytes:
    route = (
        "/v1/chat/completions" if "messages" in body
        else "/inference/v1/generate" if "token_ids" in body
        else "/v1/completions"
    )  # fmt: skip
    request = urllib.request.Request(
        url + route, json.dumps({"model": MODEL} | body).encode(), {"content-type": "application/json"}
    )
    answer: bytes = urllib.request.urlopen(request, timeout=300).read()
    return answer


def recorded(url: str, seed: int | None = None) -> dict[str, Line]:
    """Return one record of each mode, asked of a server; `seed` in place of the mode's own."""
    found = {}
    for name, body in MODES.items():
        body = {"model": MODEL} | (body if seed is None else with_seed(body, seed))
        found[name] = record_of(body, json.loads(post(url, body)))
        if name in STREAMED:
            streamed = {"stream": True} | body
            found[STREAMED[name]] = {"request": streamed, "stream": post(url, streamed).decode()}
    return found


def with_seed(body: Line, seed: int) -> Line:
    """Return a request with another seed."""
    if "sampling_params" in body:
        return body | {"sampling_params": body["sampling_params"] | {"seed": seed}}
    return body | {"seed": seed}


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


def call(**values: Any) -> Callable[[Line], None]:
    """Return an edit of a choice's first tool call."""

    def edit(line: Line) -> None:
        line["response"]["choices"][0]["message"]["tool_calls"][0]["function"].update(values)

    return edit


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
    "regex": {"regex": "[0-9]{3}"},
    "choice": {"choice": ["one", "two"]},
    "schema": {"response_format": None},
    "object": {"response_format": FORM},
    "grammar": {"grammar": 'start: "x" "y"'},
    "tag": {"structured_outputs": None},
    "tools": {"tool_choice": "none", "tools": [RENAMED]},
    "tool": {"tool_choice": {"type": "function", "function": {"name": "paint"}}},
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
    "tool": [changed(finish_reason="stop"), call(name="paint"), call(arguments='{"word":"x"}')],
    "tools": [changed(message={"role": "assistant", "content": "red"}), add(0, 0.01)],
    "grammar": [changed(text="a.")],
    "filters streamed": [
        in_stream('"finish_reason":"length"', '"finish_reason":"stop"'),
        in_stream('"logprob":-', '"logprob":-1'),
        in_stream('"text":" ', '"text":"'),
    ],
    "chat streamed": [
        in_stream('"seed":', '"seed":1'),
        in_stream('"weight_version":0', '"weight_version":1'),
    ],
    "tools streamed": [in_stream('"name":"', '"name":"x'), in_stream('"arguments":"', '"arguments":"x')],
}
EDITS: list[tuple[str, Callable[[Line], None]]] = [
    *(
        (name, asked(**{field: value}))
        for name, values in PARAMETERS.items()
        for field, value in values.items()
    ),
    *((name, edit) for name, edits in RESULTS.items() for edit in edits),
]


def edited(lines: dict[str, Line]) -> list[Line]:
    """Return each edit of its mode's record; without digests, so that it is the redraw that finds them."""
    made = []
    for name, edit in EDITS:
        line = copy.deepcopy({k: v for k, v in lines[name].items() if k != "digest"})
        edit(line)
        made.append(line)
    return made


def replayed(url: str, folder: Path, lines: Sequence[Line]) -> list[ReplayResult]:
    """Replay records by way of a file, as `myserve replay` does."""
    file = folder / "records.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (results,) = asyncio.run(replay(read_records(file), [url]))
    return results


def was_caught(results: Sequence[ReplayResult], number: int) -> bool:
    """Return whether the record of this line of the file was found to be wrong."""
    own = [result for result in results if f"records.jsonl:{number + 1} " in result.source + " "]
    return any(result.verdict in ("differs", "edited") for result in own)


def replay_modes(url: str, count: int) -> int:
    """Record so many choices or more, replay them, and then all edits; print what came out, return what is wrong."""
    verdicts: Counter[str] = Counter()
    tokens = seed = 0
    with tempfile.TemporaryDirectory() as name:
        while verdicts.total() < count:
            seed += 1
            lines = recorded(url, seed)
            for result in replayed(url, Path(name), list(lines.values())):
                verdicts[result.verdict] += 1
                tokens += result.num_tokens
                if result.verdict != "identical":
                    print(f"seed {seed}: {result}", flush=True)
        print(
            f"{verdicts.total()} choices of {len(MODES)} modes, {tokens:,} tokens: {dict(verdicts)}",
            flush=True,
        )
        results = replayed(url, Path(name), edited(recorded(url)))
        missed = [EDITS[i][0] for i in range(len(EDITS)) if not was_caught(results, i)]
        print(f"{len(EDITS)} edited records, not caught: {missed}", flush=True)
    return verdicts.total() - verdicts["identical"] + len(missed)
