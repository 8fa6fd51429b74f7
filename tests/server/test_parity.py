"""Over HTTP the tokens are transformers' own, and the same alone as in company."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from myserve.server.app import create_app
from myserve.server.settings import Settings
from runs import thorough

PROMPTS = ("Hello", "Zß🦄你", "Count to three:")
MIXES: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3},
    {},
    {"temperature": 0.7, "top_k": 50},
    {"top_p": 0.9},
    {"temperature": 1.5, "min_p": 0.05, "repetition_penalty": 0.9},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.8, "typical_p": 0.95},
)


@pytest.fixture(scope="module", params=[thorough("llama"), "qwen3", thorough("gpt2")])
def model_and_app(
    request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]
) -> Iterator[tuple[Path, Any]]:
    path = tiny_model(request.param)
    app = create_app(Settings(models={"tiny": str(path)}))
    yield path, app
    app.state.models.close()


def complete_all(app: Any, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first choice of each body, all asked at the same time."""

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))

    choices = [response.json()["choices"][0] for response in asyncio.run(ask())]
    for choice in choices:
        del choice["index"]
    return choices


def generated(model: Any, tokenizer: Any, body: dict[str, Any], mix: dict[str, Any]) -> list[int]:
    """What `transformers.generate` makes of it after `set_seed`."""
    prompt = tokenizer(body["prompt"], return_tensors="pt")
    draws = mix.get("temperature") != 0
    settings = {"top_k": 0} | mix if draws else {k: v for k, v in mix.items() if k != "temperature"}
    set_seed(body["seed"])
    ids: torch.Tensor = model.generate(
        **prompt, max_new_tokens=body["max_tokens"], do_sample=draws, **settings
    )
    completion: list[int] = ids[0, prompt["input_ids"].shape[1] :].tolist()
    return completion


def test_tokens_are_those_of_generate(model_and_app: tuple[Path, Any]) -> None:
    """Greedy as it is; drawn ones with `noise: "torch"`, whole sequences, from requests that run side by side."""
    path, app = model_and_app
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    cases = [(prompt, mix) for prompt in PROMPTS for mix in MIXES]
    bodies = [
        {"model": "tiny", "prompt": prompt, "max_tokens": 64, "noise": "torch", "return_token_ids": True}
        | mix
        for prompt, mix in cases
    ]
    bodies = [body | {"seed": seed} for seed, body in enumerate(bodies)]
    ours = [choice["token_ids"] for choice in complete_all(app, bodies)]
    theirs = [generated(model, tokenizer, body, mix) for body, (_, mix) in zip(bodies, cases, strict=True)]
    assert ours == theirs
    # the control: the other noise draws other tokens, so equality was not for lack of choice
    other = [
        choice["token_ids"] for choice in complete_all(app, [body | {"noise": "counter"} for body in bodies])
    ]
    assert other != theirs


@pytest.mark.parametrize("model_and_app", ["qwen3"], indirect=True)
def test_company_changes_nothing(model_and_app: tuple[Path, Any]) -> None:
    """32 requests, 32 sets of parameters: text, ids, logprobs and alternatives, bit for bit."""
    _, app = model_and_app
    bodies = [
        {
            "model": "tiny",
            "prompt": f"{PROMPTS[i % 3]} {'again ' * (i % 5)}",
            "seed": i,
            "max_tokens": 8 + i,
            "temperature": i / 10,
            "top_p": 1 - i / 64,
            "top_k": i,
            "frequency_penalty": (i % 5 - 2) / 2,
            "noise": ("counter", "torch")[i % 2],
            "logprobs": True,
            "top_logprobs": i % 4,
            "return_token_ids": True,
        }
        for i in range(32)
    ]
    together = complete_all(app, bodies)
    alone = [complete_all(app, [body])[0] for body in bodies]
    assert together == alone
