"""TRL's client to a server of vLLM's kind: generate, chat, and the teacher's logprobs of whole sequences.

Its module is loaded by itself: the package around it wants torch, and vLLM to talk to vLLM's workers, neither of which
is touched by what speaks HTTP.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SPEC = importlib.util.find_spec("trl")
if SPEC is None or SPEC.origin is None:
    pytest.skip("trl is not installed: tests/clients/conftest.py says how", allow_module_level=True)
PACKAGE = Path(SPEC.origin).parent


def module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(members)
    return made


@pytest.fixture
def client(served: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    nn = module("torch.nn", Module=object)
    around = {
        "torch": module("torch", nn=nn, Tensor=object, device=object),
        "torch.nn": nn,
        "transformers": module("transformers", __path__=[]),
        "transformers.utils": module("transformers.utils", get_json_schema=None),
        "trl": module("trl", __path__=[str(PACKAGE)]),
        "trl.import_utils": module(
            "trl.import_utils", is_requests_available=lambda: True, is_vllm_available=lambda **_: False
        ),
        "trl.generation": module("trl.generation", __path__=[str(PACKAGE / "generation")]),
    }
    for name, made in around.items():
        monkeypatch.setitem(sys.modules, name, made)
    monkeypatch.delitem(sys.modules, "trl.generation.vllm_client", raising=False)
    theirs: Any = importlib.import_module("trl.generation.vllm_client")
    monkeypatch.setattr(theirs, "is_vllm_available", lambda **_: True)
    yield theirs.VLLMClient(base_url=served.base_url.removesuffix("/v1"))
    sys.modules.pop("trl.generation.vllm_client", None)


def test_generate_has_each_tokens_logprobs(client: Any) -> None:
    made = client.generate(
        ["Hello, AI!", "Tell me a joke"],
        n=2,
        max_tokens=8,
        logprobs=3,
        generation_kwargs={"seed": 1},
    )
    assert len(made["prompt_ids"]) == 2 and len(made["completion_ids"]) == 4
    for ids, logprobs, token_ids in zip(
        made["completion_ids"], made["logprobs"], made["logprob_token_ids"], strict=True
    ):
        assert len(ids) == len(logprobs) == len(token_ids)
        assert all(token_id in at and len(at) in (3, 4) for token_id, at in zip(ids, token_ids, strict=True))
        assert all(values == sorted(values, reverse=True) for values in logprobs)


@pytest.mark.parametrize("logprobs", [0, None])
def test_chat(client: Any, logprobs: int | None) -> None:
    conversations = [[{"role": "user", "content": "Hello"}], [{"role": "user", "content": "Say a color"}]]
    tool = {"type": "function", "function": {"name": "clock"}}
    made = client.chat(
        conversations, max_tokens=6, logprobs=logprobs, tools=[tool], generation_kwargs={"seed": 1}
    )
    assert [len(ids) > 0 for ids in made["completion_ids"]] == [True, True]
    if logprobs is None:
        assert made["logprobs"] is None
    else:
        assert [len(row) for row in made["logprobs"]] == [len(ids) for ids in made["completion_ids"]]


def test_the_logprobs_of_a_sequence_are_those_that_it_was_drawn_with(client: Any) -> None:
    made = client.generate(["Hello, AI!"], max_tokens=8, logprobs=0, generation_kwargs={"seed": 1})
    (prompt,), (completion,) = made["prompt_ids"], made["completion_ids"]
    scored = client.get_sequence_logprobs([prompt + completion], [len(prompt)], top_logprobs=5)
    assert scored["actual_logprobs"] == [[row[:1] for row in made["logprobs"][0]]]
    assert scored["actual_token_ids"] == [[[token_id] for token_id in completion]]
    # by rank, whatever the sampled token's rank is
    assert all(values == sorted(values, reverse=True) for values in scored["logprobs"][0])
