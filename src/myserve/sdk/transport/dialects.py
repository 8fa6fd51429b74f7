"""What a server can do, and the words in which it is asked. Everything that differs between servers is here.

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

DialectName = Literal["myserve", "vllm", "fireworks"]


@dataclass(frozen=True, slots=True)
class Dialect:
    """How to talk to one kind of server."""

    name: DialectName
    path: str
    batches_n: bool  # several samples of a prompt in one request
    resumes: bool  # takes `sample_index` and `num_prior_tokens`

    def body(
        self, request: SampleRequest, first_index: int, n: int, prior_ids: Sequence[int] = ()
    ) -> dict[str, Any]:
        """The JSON of one request for samples `first_index .. first_index + n - 1`.

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
            "seed": self._seed(request.seed, first_index),
            "stream": True,
        }
        if request.stop:
            body["stop"] = list(request.stop)
        if request.echo:
            body["echo"] = True
        if request.include_routing_matrix:
            body["include_routing_matrix"] = True
        if request.logprobs:
            body |= self._logprobs(request.top_logprobs)
        return body | self._asking_for_ids(first_index, len(prior_ids)) | dict(request.extra)

    def _seed(self, seed: int, first_index: int) -> int:
        if self.name == "myserve":
            return seed
        if self.name == "vllm":
            return (seed + first_index) & MAX_SEED
        return index_seed(seed, first_index)

    def _logprobs(self, top_logprobs: int | None) -> dict[str, Any]:
        if self.name == "vllm":  # its completions know OpenAI's older form alone: a count
            return {"logprobs": top_logprobs or 0, "return_tokens_as_token_ids": True}
        return (
            {"logprobs": True} if top_logprobs is None else {"logprobs": True, "top_logprobs": top_logprobs}
        )

    def _asking_for_ids(self, first_index: int, num_prior: int) -> dict[str, Any]:
        if self.name == "vllm":
            return {"return_token_ids": True}
        fields: dict[str, Any] = {"raw_output": True, "perf_metrics_in_response": True}
        if self.name == "myserve":
            fields["return_token_ids"] = True  # with every delta: what a resumed stream goes on from
            if first_index:
                fields["sample_index"] = first_index
            if num_prior:
                fields["num_prior_tokens"] = num_prior
        return fields


MYSERVE = Dialect("myserve", "/inference/v1/completions", batches_n=True, resumes=True)
VLLM = Dialect("vllm", "/v1/completions", batches_n=True, resumes=False)
FIREWORKS = Dialect("fireworks", "/inference/v1/completions", batches_n=False, resumes=False)
_OURS_TAKE = frozenset({"sample_index", "num_prior_tokens"})
DIALECTS = {dialect.name: dialect for dialect in (MYSERVE, VLLM, FIREWORKS)}


def detect(version: object) -> Dialect:
    """The dialect of a server whose `GET /version` gave this JSON (None: it has no such route).

    >>> detect({"name": "myserve", "extensions": ["sample_index", "num_prior_tokens"]}).name
    'myserve'
    >>> detect({"version": "0.32"}).name, detect(None).name
    ('vllm', 'fireworks')
    """
    if not isinstance(version, dict):
        return FIREWORKS
    if "extensions" in version or "name" in version:
        able = _OURS_TAKE.issubset(version.get("extensions") or ())
        return MYSERVE if able else FIREWORKS
    return VLLM if isinstance(version.get("version"), str) else FIREWORKS
