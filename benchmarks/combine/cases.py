"""Random requests over all fields at once: usual values, the ends of each declared range, and what lies beyond them."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

from benchmarks.combine.tiny import CONTEXT, VOCAB_SIZE
from myserve.core.params import SamplingParams
from myserve.core.ranges import Range, ranges_of
from myserve.engine.requests.options import SubmitOptions

__all__ = ["ROUTES", "Case", "case_beyond", "random_case"]

ROUTES = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "generate": "/inference/v1/generate",
}
ASKED = 0.3  # of the fields, in one request
NARROW = 0.2  # of the requests: those of few fields
LETTERS = "abcdefghij eo tn\n"

_USUAL: dict[str, list[Any]] = {
    "max_tokens": [0, 1, 2, 8, 20, 30],
    "min_tokens": [0, 1, 3, 8],
    "temperature": [0.0, 0.0, 0.5, 0.9, 1.0, 1.5],
    "top_k": [-1, 0, 1, 2, 10, 50, VOCAB_SIZE, VOCAB_SIZE + 1],
    "top_p": [0.0, 0.1, 0.5, 0.9, 0.99],
    "min_p": [0.0, 0.01, 0.2, 1.0],
    "typical_p": [0.1, 0.5, 0.9, 0.95],
    "top_n_sigma": [0.1, 0.5, 1.0, 3.0],
    "repetition_penalty": [0.8, 1.0, 1.2, 2.0],
    "frequency_penalty": [-0.5, 0.0, 0.5, 2.0],
    "presence_penalty": [-2.0, 0.0, 1.0],
    "top_logprobs": [0, 1, 5, 20],
    "prompt_logprobs": [0, 1, 3],
    "n": [1, 2, 3],
    "num_prior_tokens": [0, 1, 2],
}
_OF_THE_ORIGINAL = (
    "seed",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "presence_penalty",
    "frequency_penalty",
)
# of the routes, below the engine's; a prompt is scored from its beginning, as the judges read it
_LARGEST = {"n": 128, "sample_index": 2**31 - 1, "top_logprobs": 20, "prompt_logprob_start": 0}
_HUGE = (2**31, 2**62, 2**63, 2**64, 2**70, 10**30)  # beyond the range of most fields


@dataclass(frozen=True)
class Case:
    """One request: the sampling fields that it asks for, on one route of one model."""

    number: int
    model: str
    route: str
    prompt: tuple[int, ...]  # of the routes that take ids
    text: str  # of a chat
    asked: dict[str, Any]

    @property
    def path(self) -> str:
        """Where it is sent."""
        return ROUTES[self.route]

    @property
    def must_be_refused(self) -> bool:
        """Whether a number lies outside the range that its field declares."""
        declared = dict(ranges_of(SamplingParams)) | dict(ranges_of(SubmitOptions))
        return any(value not in declared[name] for name, value in self.asked.items() if name in declared)

    def body(self, *, stream: bool) -> dict[str, Any]:
        """The JSON of the request."""
        common = {"model": self.model, "stream": stream, "return_token_ids": True}
        if self.route == "generate":
            outside = {name: self.asked[name] for name in ("priority", "cache_salt") if name in self.asked}
            inside = {name: value for name, value in self.asked.items() if name not in outside}
            top = inside.pop("top_logprobs", 0)
            return (
                common | outside | {"token_ids": self.prompt, "sampling_params": inside | {"logprobs": top}}
            )
        if self.route == "chat":
            return (
                common | self.asked | {"messages": [{"role": "user", "content": self.text}], "logprobs": True}
            )
        return common | self.asked | {"prompt": self.prompt, "logprobs": True}


def random_case(rng: random.Random, number: int) -> Case:
    """Draw a request; the same generator state gives the same one."""
    model = rng.choice(["dense", "moe"])
    route = rng.choice(list(ROUTES))
    prompt = tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([1, 2, 5, 17, 32, 33, 70])))
    text = "".join(rng.choices(LETTERS, k=rng.randint(1, 12)))
    asked: dict[str, Any] = {"seed": rng.getrandbits(63), "max_tokens": rng.randint(1, 24)}
    for cls in (SamplingParams, SubmitOptions):
        for name, allowed in ranges_of(cls).items():
            if rng.random() < ASKED:
                asked[name] = _number(rng, name, allowed)
    for name, make in _OTHERS.items():
        if rng.random() < ASKED / 2:
            asked[name] = make(rng)
    if rng.random() < ASKED:
        name, make = rng.choice(list(_FORMS.items()))
        asked[name] = make(rng)
        asked.pop("ignore_eos", None)  # a grammar says itself where the text ends
    if rng.random() < 0.95:
        asked["min_tokens"] = min(asked.get("min_tokens", 0), max(asked["max_tokens"], 0))
        asked["num_prior_tokens"] = min(asked.get("num_prior_tokens", 0), len(prompt) - 1)
    if (kind := rng.random()) < NARROW:  # so that transformers and the original specification judge some, too
        known = _OF_THE_ORIGINAL if kind < NARROW / 2 else ("seed", "max_tokens", "n")
        asked = {name: value for name, value in asked.items() if name in known}
        asked |= {"noise": "torch"} if kind < NARROW / 2 else {"temperature": 0.0}
    for name in [name for name in _ONLY_ON if route not in _ONLY_ON[name]]:
        asked.pop(name, None)
    if model == "dense":
        asked.pop("include_routing_matrix", None)
    return Case(number, model, route, prompt, text, asked)


def case_beyond(rng: random.Random, number: int) -> Case:
    """Draw a small request with one number outside its declared range: it costs nothing, for it is refused."""
    declared = [
        (name, allowed) for cls in (SamplingParams, SubmitOptions) for name, allowed in ranges_of(cls).items()
    ]
    name, allowed = rng.choice(declared)
    step = 1 if allowed.is_integer else 0.5 + abs(allowed.high) * 1e-6
    huge = _HUGE if allowed.is_integer else (1e308, -1e308)
    values = [value for value in (allowed.low - step, allowed.high + step, *huge) if value not in allowed]
    asked = {"seed": rng.getrandbits(63), "max_tokens": 4, name: rng.choice(values)}
    return Case(number, rng.choice(["dense", "moe"]), rng.choice(list(ROUTES)), (5, 6, 7), "hi", asked)


def _number(rng: random.Random, name: str, allowed: Range) -> float:
    low, high = allowed.low, min(allowed.high, _LARGEST.get(name, math.inf))
    if name in _USUAL and rng.random() < 0.8:
        usual: float = rng.choice(_USUAL[name])
        return usual
    if allowed.is_integer:
        if name in ("n", "max_tokens", "min_tokens", "num_prior_tokens"):
            high = min(high, 3 if name == "n" else CONTEXT)  # what a request costs
        return rng.choice([int(low), int(high), rng.randint(int(low), int(high))])
    smallest = math.nextafter(low, math.inf) if allowed.open_low else low
    return rng.choice([smallest, high, rng.uniform(smallest, high), rng.uniform(smallest, min(high, 2.0))])


def _ids(rng: random.Random, most: int) -> list[int]:
    return [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, most))]


def _words(rng: random.Random) -> list[str]:
    return ["".join(rng.choices(LETTERS, k=rng.randint(1, 2))) for _ in range(rng.randint(1, 3))]


_OTHERS: dict[str, Any] = {
    "stop": _words,
    "stop_token_ids": lambda rng: _ids(rng, 20),
    "ignore_eos": lambda rng: rng.random() < 0.7,
    "include_stop_str_in_output": lambda rng: True,
    "skip_special_tokens": lambda rng: False,
    "allowed_token_ids": lambda rng: _ids(rng, rng.choice([1, 3, 200])),
    "bad_words": _words,
    "logit_bias": lambda rng: {str(i): rng.uniform(-120, 120) for i in _ids(rng, 5)},
    "noise": lambda rng: rng.choice(["counter", "torch"]),
    "logprobs_mode": lambda rng: rng.choice(["raw", "processed"]),
    "logprob_token_ids": lambda rng: _ids(rng, 4),
    "kept": lambda rng: True,
    "include_routing_matrix": lambda rng: True,
    "cache_salt": lambda rng: rng.choice(["a", "b"]),
    "stream_interval": lambda rng: rng.randint(1, 9),
    "echo": lambda rng: True,
}
_FORMS: dict[str, Any] = {
    "regex": lambda rng: rng.choice(["[ab]{2,6}", "[a-z ]+", "x|yy|zzz", "[0-9]{1,3}(\\.[0-9])?"]),
    "json_schema": lambda rng: rng.choice(
        [{"type": "boolean"}, {"enum": [1, "a", None]}, {"type": "object"}]
    ),
    "choice": _words,
}
_ONLY_ON = {
    "echo": ("completions",),
    "stream_interval": ("chat", "completions"),
    "prompt_logprob_start": ("generate",),
}
