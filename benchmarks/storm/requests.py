"""The storm's requests: a table of whole ones with their seeds, and malformed ones of every kind."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

KINDS = 60  # different requests: each is asked for alone once, and many times in company
MODEL = "demo"
PEOPLE = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Kind:
    """A request, the same each time; `stream` is whoever asks' choice."""

    name: str
    path: str
    body: dict[str, Any]

    @property
    def is_free(self) -> bool:
        """Drawn without a grammar, so that `weight_replay` can draw it again."""
        return self.path == "/v1/completions"


def kinds(rng: random.Random) -> list[Kind]:
    """Most by token ids, with beginnings in common; a sixth each a chat, and an object by a schema."""
    stems = [[rng.randrange(3, 2000) for _ in range(rng.randint(1, 100))] for _ in range(8)]
    made = []
    for number in range(KINDS):
        body: dict[str, Any] = {
            "model": MODEL,
            "seed": rng.getrandbits(63),
            "max_tokens": rng.randint(1, 120),
            "temperature": rng.choice([0.0, 0.7, 1.0, 1.5]),
            "top_p": rng.choice([1.0, 0.9]),
            "n": rng.choice([1, 1, 1, 2, 4]),
            "logprobs": True,
            "return_token_ids": True,
        }
        path = "/v1/chat/completions"
        if number % 6 == 0:
            body |= {"messages": _messages(rng), "stop": ["e "]}
        elif number % 6 == 1:
            form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PEOPLE}}
            body |= {"messages": _messages(rng), "response_format": form, "max_tokens": rng.randint(30, 80)}
        else:
            path = "/v1/completions"
            prompt = rng.choice(stems) + [rng.randrange(3, 2000) for _ in range(rng.randint(1, 40))]
            body |= {"prompt": prompt, "ignore_eos": rng.random() < 0.5, "top_k": rng.choice([0, 20])}
        made.append(Kind(f"{number}", path, body))
    return made


def _messages(rng: random.Random) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Say {rng.randint(2, 9)} words about {rng.randint(10, 99)}."}]


def malformed(rng: random.Random) -> tuple[str, bytes]:
    """Yield a path and a malformed body, each to be refused with a 4xx."""
    whole: dict[str, Any] = {"model": MODEL, "prompt": [5, 6], "max_tokens": 4}
    change: dict[str, Any] = rng.choice(
        [
            {"temperature": -1},
            {"temperature": "hot"},
            {"top_p": 1.5},
            {"n": 0},
            {"n": 10**9},
            {"prompt": []},
            {"prompt": [10**12]},
            {"prompt": [5] * 100_000},
            {"prompt": {"a": 1}},
            {"seed": 2**70},
            {"model": "../../etc/passwd"},
            {"logit_bias": {"x": 1}},
            {"stop": ["a"] * 50},
            {"logprobs": 1000},
            {"regex": "("},
            {"regex": "(a{1000}){1000}"},
            {"grammar": "start: start"},
            {"json_schema": {"type": "nonsense"}},
            {"response_format": {"type": "json_schema"}},
        ]
    )
    bodies = [
        json.dumps(whole | change).encode(),
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[" * 5000,
        json.dumps(whole).encode()[:-1],
        rng.randbytes(rng.randint(1, 300)),
    ]
    body = bodies[0] if rng.random() < 0.7 else rng.choice(bodies[1:])
    return rng.choice(["/v1/completions", "/inference/v1/completions"]), body
