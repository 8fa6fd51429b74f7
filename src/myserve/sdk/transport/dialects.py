"""Turns a request into the JSON that one kind of server takes. All that differs between servers is here.

myserve   n samples in one request, a sample's noise keyed by (seed, index), cut streams resumed.
vllm      n samples in one request; sample i draws with seed + i, so a part of a group starts at seed + first.
fireworks one request a sample, each with its own seed; the first goes ahead, so that the others find its
          prefix in the cache. Also what is spoken to a server that does not say what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from myserve.sdk.request import SampleRequest
from myserve.sdk.seeds import MAX_SEED, index_seed

__all__ = ["DIALECTS", "FIREWORKS", "MYSERVE", "VLLM", "Dialect", "DialectName", "detect"]

DialectName = Literal["myserve", "vllm", "fireworks"]
# OpenAI's own limit of n, and our server's. A larger group is sent in parts, and its draws are the same.
_MAX_N = 128


@dataclass(frozen=True, slots=True)
class Dialect:
    """Describe one kind of server, and write requests for it."""

    name: DialectName
    path: str
    max_n: int  # samples of a prompt in one request
    resumes: bool  # takes `sample_index` and `num_prior_tokens`
    key_headers: tuple[str, ...] = ("authorization",)

    def headers(self, api_key: str) -> dict[str, str]:
        """Return the headers that carry the key: in two forms where the original specification's client sends both.

        >>> MYSERVE.headers("k"), sorted(FIREWORKS.headers("k")), VLLM.headers("")
        ({'authorization': 'Bearer k'}, ['authorization', 'x-api-key'], {})
        """
        forms = {"authorization": f"Bearer {api_key}", "x-api-key": api_key}
        return {name: forms[name] for name in self.key_headers} if api_key else {}

    def body(
        self, request: SampleRequest, first_index: int, n: int, prior_ids: Sequence[int] = ()
    ) -> dict[str, Any]:
        """Return the JSON of one request for samples `first_index .. first_index + n - 1`.

        `prior_ids` are completion tokens that the (single) sample already has.

        >>> request = SampleRequest(prompt_token_ids=(1, 2), model="m", seed=7, max_tokens=8)
        >>> body = MYSERVE.body(request, first_index=3, n=1, prior_ids=[5, 6])
        >>> body["prompt"], body["sample_index"], body["num_prior_tokens"], body["max_tokens"]
        ([1, 2, 5, 6], 3, 2, 6)
        """
        assert not prior_ids or (self.resumes and n == 1)
        body: dict[str, Any] = {
            "model": request.model,
            "prompt": [*request.prompt_token_ids, *prior_ids],
            "n": n,
            "max_tokens": request.max_tokens - len(prior_ids),
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "seed": self.seed_of(request.seed, first_index),
            "stream": True,
        }
        if request.stop:
            body["stop"] = list(request.stop)
        if request.sends_echo:
            body["echo"] = True
        if request.include_routing_matrix:
            body["include_routing_matrix"] = True
        if request.logprobs:
            body |= self._logprobs(request.top_logprobs)
        return body | self._asking_for_ids(first_index, len(prior_ids)) | dict(request.extra)

    def seed_of(self, seed: int, index: int) -> int:
        """Return the seed that the server is to draw sample `index` with."""
        if self.name == "myserve":
            return seed
        if self.name == "vllm":
            return (seed + index) & MAX_SEED
        return index_seed(seed, index)

    def _logprobs(self, top_logprobs: int | None) -> dict[str, Any]:
        # vLLM's completions know OpenAI's older form alone: a count
        if self.name == "vllm":
            return {"logprobs": top_logprobs or 0, "return_tokens_as_token_ids": True}
        return (
            {"logprobs": True} if top_logprobs is None else {"logprobs": True, "top_logprobs": top_logprobs}
        )

    def _asking_for_ids(self, first_index: int, num_prior: int) -> dict[str, Any]:
        if self.name == "vllm":
            return {"return_token_ids": True}
        fields: dict[str, Any] = {"raw_output": True, "perf_metrics_in_response": True}
        if self.name == "myserve":
            # with every delta: what a resumed stream goes on from
            fields["return_token_ids"] = True
            if first_index:
                fields["sample_index"] = first_index
            if num_prior:
                fields["num_prior_tokens"] = num_prior
        return fields


MYSERVE = Dialect("myserve", "/inference/v1/completions", max_n=_MAX_N, resumes=True)
VLLM = Dialect("vllm", "/v1/completions", max_n=_MAX_N, resumes=False)
FIREWORKS = Dialect(
    "fireworks",
    "/inference/v1/completions",
    max_n=1,
    resumes=False,
    key_headers=("authorization", "x-api-key"),
)
_OURS_TAKE = frozenset({"sample_index", "num_prior_tokens"})
DIALECTS = {dialect.name: dialect for dialect in (MYSERVE, VLLM, FIREWORKS)}


def detect(version: object) -> Dialect:
    """Return the dialect of a server whose `GET /version` gave this JSON (None: it has no such route).

    >>> detect({"name": "myserve", "extensions": ["sample_index", "num_prior_tokens"]}).name
    'myserve'
    >>> detect({"version": "0.32"}).name, detect(None).name
    ('vllm', 'fireworks')
    """
    if not isinstance(version, dict):
        return FIREWORKS
    if "extensions" in version or "name" in version:
        extensions = version.get("extensions")
        takes = isinstance(extensions, list) and all(name in extensions for name in _OURS_TAKE)
        return MYSERVE if takes else FIREWORKS
    return VLLM if isinstance(version.get("version"), str) else FIREWORKS
