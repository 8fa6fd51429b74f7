"""Rounds of random requests, and what must hold of their answers."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from fastapi import FastAPI

from benchmarks.combine.answers import Answer, ask
from benchmarks.combine.cases import Case, case_beyond, random_case
from benchmarks.combine.oracle import Oracle, PlainToken, is_greedy, is_of_the_original
from benchmarks.combine.serving import served
from benchmarks.combine.tiny import make_models
from myserve.core.params import SamplingParams
from myserve.server.prompts.sampling import chat_params, completion_params, generate_params
from myserve.wire.chat import ChatCompletionRequest
from myserve.wire.completions import CompletionRequest
from myserve.wire.generate import GenerateRequest

__all__ = ["Finding", "Report", "fuzz"]


@dataclass(frozen=True)
class Finding:
    """Something that must hold and does not, with the request that shows it."""

    words: str
    body: dict[str, Any]


@dataclass
class Report:
    """What came of a run."""

    findings: list[Finding] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    judged: Counter[str] = field(default_factory=Counter)
    fields: Counter[str] = field(default_factory=Counter)
    cases: int = 0

    @property
    def summary(self) -> str:
        """One line of counts."""
        return (
            f"{self.cases} requests over {len(self.fields)} fields, statuses {dict(sorted(self.statuses.items()))}, "
            f"judged by {dict(self.judged)}: {len(self.findings)} findings"
        )


async def fuzz(
    folder: Path,
    *,
    seed: int,
    seconds: float = math.inf,
    requests: float = math.inf,
    at_once: int = 6,
    most: int = 20,
) -> Report:
    """Make tiny models in `folder`, serve and fuzz them for so long, or so many requests, or until `most` findings."""
    report, rng = Report(), random.Random(seed)
    models = await asyncio.to_thread(make_models, folder)
    with served(models) as (url, app):
        oracles = {
            name: Oracle(path, app.state.models.if_loaded(name).engine.constraints)
            for name, path in models.items()
        }
        timeout = aiohttp.ClientTimeout(total=120)
        # a connection for each request: the server closes an idle one, and the plain loop takes its time
        connector = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(base_url=url, timeout=timeout, connector=connector) as session:
            end = time.monotonic() + seconds
            while time.monotonic() < end and report.cases < requests and len(report.findings) < most:
                cases = [random_case(rng, report.cases + i) for i in range(at_once)]
                cases += [case_beyond(rng, report.cases + at_once + i) for i in range(at_once)]
                report.findings += [
                    finding async for finding in _round(session, app, cases, oracles, rng, report)
                ]
                report.cases += len(cases)
    return report


async def _round(
    session: aiohttp.ClientSession,
    app: FastAPI,
    cases: list[Case],
    oracles: dict[str, Oracle],
    rng: random.Random,
    report: Report,
) -> Any:
    streamed = [rng.random() < 0.5 for _ in cases]
    company = await asyncio.gather(
        *(ask(session, case, stream=stream) for case, stream in zip(cases, streamed, strict=True))
    )
    for case, stream, together in zip(cases, streamed, company, strict=True):
        report.statuses[together.status] += 1
        report.fields.update(list(case.asked))
        alone = await ask(session, case, stream=not stream)
        found = list(_compare(case, together, alone))
        if not found and together.status == 200:
            found = await asyncio.to_thread(
                lambda c, t: list(_judge(app, c, t, oracles[c.model], report)), case, together
            )
        for words in found:
            yield Finding(f"case {case.number} on {case.path}: {words}", case.body(stream=stream))
        engine = app.state.models.if_loaded(case.model).engine
        if not engine.is_alive:
            yield Finding(f"case {case.number}: the engine is dead", case.body(stream=stream))


def _compare(case: Case, together: Answer, alone: Answer) -> Iterator[str]:
    """Two answers to one request must be the same, and no fault of the server's."""
    for answer in (together, alone):
        if answer.is_fault:
            yield f"a fault of the server: {answer.status} {answer.error}"
            return
        if case.must_be_refused and answer.status != 400:
            yield f"a number outside its range was answered with {answer.status}"
        if answer.error is not None and not answer.error.get("message"):
            yield f"an error without words: {answer.error}"
    if together.status != alone.status:
        yield f"in company {together.status} {together.error}, alone {alone.status} {alone.error}"
    elif "seed" in case.asked and together.choices != alone.choices:
        pair = zip(together.choices, alone.choices, strict=False)
        for index, (one, other) in enumerate(pair):
            for name, value in vars(one).items():
                # a stream of the token route does not repeat the prompt
                if value != vars(other)[name] and name != "prompt_token_ids":
                    yield f"choice {index}, {name}: in company {value!r:.300}, alone {vars(other)[name]!r:.300}"


def _judge(app: FastAPI, case: Case, answer: Answer, oracle: Oracle, report: Report) -> Iterator[str]:
    """An answer must be what the plain loop draws."""
    params, prompt = _params(app, case), answer.choices[0].prompt_token_ids or list(case.prompt)
    asked = case.asked
    for index, choice in enumerate(answer.choices):
        plain = oracle.completion(
            prompt,
            params,
            sample_index=asked.get("sample_index", 0) + index,
            num_prior_tokens=asked.get("num_prior_tokens", 0),
        )
        report.judged["plain loop"] += 1
        if isinstance(plain, str):
            yield f"choice {index}: the plain loop cannot go on: {plain}"
            return
        echoed = len(prompt) if asked.get("echo") else 0
        ids, entries = choice.token_ids, choice.entries
        drawn = [token.token_id for token in plain]
        if not echoed:
            # a stop string ends the answer earlier than the loop, which knows none
            same = drawn[: len(ids)] if params.stop else drawn
            if ids != same:
                yield f"choice {index}: ids {ids}, of the plain loop {drawn}"
                return
            yield from _numbers(index, entries, plain)
        if params.max_tokens != 0 and is_greedy(params) and not oracle.likeliest(prompt, drawn):
            yield f"choice {index}: {drawn} is not transformers' argmax"
        report.judged["transformers"] += is_greedy(params)
        if index == 0 and is_of_the_original(params, case):
            report.judged["sample_generate"] += 1
            original = oracle.original(prompt, params)
            if original != drawn:
                yield f"sample_generate draws {original}, the plain loop {drawn}"


def _numbers(index: int, entries: list[Any], plain: list[PlainToken]) -> Iterator[str]:
    """Each entry's logprobs, bit for bit. (A completion's entry is a tuple without the sampling logprob.)"""
    for position, (entry, token) in enumerate(zip(entries, plain, strict=False)):
        if isinstance(entry, dict):
            said = (entry["logprob"], entry.get("sampling_logprob", token.sampling_logprob))
        else:
            said = (entry[1], token.sampling_logprob)
        if said != (token.logprob, token.sampling_logprob):
            yield f"choice {index}, token {position}: logprobs {said}, of the plain loop {token}"
            return


def _params(app: FastAPI, case: Case) -> SamplingParams:
    """The request's parameters as the server reads them."""
    model = app.state.models.if_loaded(case.model)
    body = json.dumps(case.body(stream=False))
    if case.route == "chat":
        return chat_params(ChatCompletionRequest.model_validate_json(body), model.codec)
    if case.route == "generate":
        request = GenerateRequest.model_validate_json(body)
        return generate_params(request, request.as_completion(case.model), model.codec)
    room = model.engine.max_model_len - len(case.prompt)
    return completion_params(CompletionRequest.model_validate_json(body), model.codec, room=room)
