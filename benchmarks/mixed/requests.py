"""Mixed requests: every way to draw and every report, on two routes, with prompts of text and of ids; by a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["KINDS", "MixedRequest", "mixed_requests"]

TEXTS = (
    "The capital of France is",
    "Once upon a time there was a king who had three daughters, and the youngest of them",
    "def fibonacci(n):\n    ",
    "Die Würde des Menschen ist",
    "日本の首都は",
    "Solve: 12 + 30 = 42. Solve: 7 + 5 =",
    "Write a list of three colours:\n1.",
    "La vie est belle, mais 🦄 naïve señor said that",
)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
}

Fields = Callable[[random.Random, int], Mapping[str, Any]]


def _ids(rng: random.Random, vocab_size: int, count: int) -> list[int]:
    return [rng.randrange(vocab_size) for _ in range(count)]


# What one request asks for, by name: (generator, size of the vocabulary) to fields.
KINDS: Mapping[str, Fields] = {
    "greedy": lambda rng, v: {"temperature": 0.0, "logprobs": 5},
    "plain": lambda rng, v: {},
    "temperature": lambda rng, v: {"temperature": rng.choice([0.3, 0.7, 1.6])},
    "top_k": lambda rng, v: {"top_k": rng.choice([1, 5, 50, 1000])},
    "top_p": lambda rng, v: {"top_p": rng.choice([0.1, 0.5, 0.9, 0.95])},
    "min_p": lambda rng, v: {"min_p": rng.choice([0.02, 0.2])},
    "typical_p": lambda rng, v: {"typical_p": rng.choice([0.5, 0.9]), "top_n_sigma": 1.5},
    "all stages": lambda rng, v: {"temperature": 0.8, "top_k": 200, "top_p": 0.95, "min_p": 0.01},
    "repetition": lambda rng, v: {"repetition_penalty": 1.2, "temperature": rng.choice([0.0, 0.9])},
    "counts": lambda rng, v: {"frequency_penalty": 0.5, "presence_penalty": -0.4},
    "bias": lambda rng, v: {"logit_bias": {str(i): 6.0 for i in _ids(rng, v, 4)}, "logprobs": 3},
    "allowed": lambda rng, v: {"allowed_token_ids": _ids(rng, v, 300)},
    "regex": lambda rng, v: {"regex": "[a-f]{3,9}( [0-9]{1,4}){2}"},
    "schema": lambda rng, v: {"json_schema": SCHEMA, "max_tokens": 40},
    "choice": lambda rng, v: {"choice": ["yes, of course", "no, never", "perhaps"]},
    "n": lambda rng, v: {"n": 3, "top_p": 0.9},
    "stop": lambda rng, v: {"stop": ["e", "\n\n"], "include_stop_str_in_output": rng.random() < 0.5},
    "stop ids": lambda rng, v: {"stop_token_ids": _ids(rng, v, min(v // 20, 900))},
    "prompt scored": lambda rng, v: {"prompt_logprobs": 3},
    "kept": lambda rng, v: {"top_k": 20, "kept": True, "logprob_token_ids": _ids(rng, v, 3)},
    "torch's noise": lambda rng, v: {"noise": "torch", "top_k": 40},
    "min_tokens": lambda rng, v: {"min_tokens": 9, "ignore_eos": False, "bad_words": ["the"]},
}
ECHO = "echo"  # on completions alone


@dataclass(frozen=True)
class MixedRequest:
    """One request, as it is sent."""

    number: int
    kind: str
    path: str
    fields: Mapping[str, Any]

    def body(self, *, stream: bool) -> dict[str, Any]:
        """The JSON of the request."""
        return dict(self.fields) | {"stream": stream}


def mixed_requests(
    model: str, *, count: int = 40, seed: int = 0, vocab_size: int, max_tokens: int = 16, longest: int = 300
) -> list[MixedRequest]:
    """Return `count` requests to `model`, each kind in turn; `longest`: tokens of the longest prompts of ids.

    >>> [request.kind for request in mixed_requests("m", count=3, vocab_size=100)]
    ['greedy', 'plain', 'temperature']
    """
    rng = random.Random(seed)
    kinds = [*KINDS, ECHO]
    stem = _ids(rng, vocab_size, 70)  # that some prompts begin with: more than two blocks of the prefix cache
    return [
        _request(rng, number, kinds[number % len(kinds)], model, stem, vocab_size, max_tokens, longest)
        for number in range(count)
    ]


def _request(
    rng: random.Random, number: int, kind: str, model: str, stem: list[int], vocab_size: int, max_tokens: int,
    longest: int,
) -> MixedRequest:  # fmt: skip
    fields: dict[str, Any] = {
        "model": model,
        "seed": rng.getrandbits(63),
        "max_tokens": rng.randint(max_tokens // 2, max_tokens),
        "temperature": 1.0,
        "logprobs": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    fields |= {"echo": True, "logprobs": 2} if kind == ECHO else KINDS[kind](rng, vocab_size)
    if {"regex", "json_schema", "choice"} & fields.keys():
        del fields["ignore_eos"]  # a grammar says itself where the text ends
    fields["max_tokens"] = max(fields["max_tokens"], fields.get("min_tokens", 0))
    is_chat = kind != ECHO and rng.random() < 0.3
    if is_chat or rng.random() < 0.6:  # the form that has the sampling logprobs too
        fields |= {"logprobs": True, "top_logprobs": fields["logprobs"]}
    if is_chat:
        messages = [{"role": "user", "content": rng.choice(TEXTS)}]
        return MixedRequest(number, kind, "/v1/chat/completions", fields | {"messages": messages})
    prompt: Any = rng.choice(TEXTS)
    if (form := rng.random()) < 0.5:
        prompt = _ids(rng, vocab_size, rng.choice([1, 2, 33, rng.randint(3, longest)]))
        prompt = stem + prompt if form < 0.2 else prompt
    return MixedRequest(number, kind, "/v1/completions", fields | {"prompt": prompt})
