"""`--max-logprobs`: the operator's bound holds on every route."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx

from myserve.server.settings import Settings


def test_the_operator_decides_how_many_alternatives(
    open_server: Callable[[Settings], AbstractContextManager[Any]], tiny_model: Callable[[str], Path]
) -> None:
    settings = Settings(models={"tiny": str(tiny_model("qwen3"))}, max_logprobs=50)
    with open_server(settings) as server:

        def ask(path: str, **body: Any) -> httpx.Response:
            return httpx.post(server.url + path, json={"model": "tiny"} | body, timeout=60)

        for count, status in ((50, 200), (51, 400)):
            short: dict[str, Any] = {"prompt": [5], "max_tokens": 1}
            answers = [
                ask("/v1/completions", **short, logprobs=count),
                ask("/v1/completions", **short, logprobs=True, top_logprobs=count),
                ask("/generate", input_ids=[5], return_logprob=True, top_logprobs_num=count),
                ask("/generate", input_ids=[[5], [6]], return_logprob=True, top_logprobs_num=[0, count]),
                ask(
                    "/inference/v1/generate",
                    token_ids=[5],
                    sampling_params={"logprobs": count, "max_tokens": 1},
                ),
            ]
            assert [answer.status_code for answer in answers] == [status] * 5
        listed = answers[0].json()["error"]["message"]
        assert "must be in [0, 50], got 51" in listed
