"""One key's flood and another key's single request, on a real server: turns are the keys', and tokens are nobody's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from myserve.engine.config import EngineConfig
from myserve.server.settings import Settings

FLOOD = 60
BODY = {"model": "tiny", "prompt": [5, 6], "max_tokens": 24, "ignore_eos": True, "return_token_ids": True}


def ask(url: str, key: str, seed: int) -> list[int]:
    headers = {"authorization": f"Bearer {key}"}
    answer = httpx.post(url + "/v1/completions", json=BODY | {"seed": seed}, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    token_ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return token_ids


@pytest.mark.parametrize(("key", "is_fair"), [("sk-bob", True), ("sk-alice", False)])
def test_a_flood_of_one_key_does_not_hold_up_another(
    open_server: Callable[[Settings], AbstractContextManager[Any]],
    tiny_model: Callable[[str], Path],
    wait_until: Callable[[Callable[[], bool]], None],
    tmp_path: Path,
    key: str,
    is_fair: bool,
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-alice alice\nsk-bob bob\n")
    settings = Settings(
        models={"tiny": str(tiny_model("qwen3"))},
        engine=EngineConfig(max_num_seqs=1),
        api_keys_file=str(keys),
    )
    with open_server(settings) as server, ThreadPoolExecutor(FLOOD + 1) as pool:
        alone = ask(server.url, key, seed=0)
        flood = [pool.submit(ask, server.url, "sk-alice", seed) for seed in range(1, FLOOD + 1)]
        engine = server.model("tiny").engine
        wait_until(lambda: engine.load.num_waiting + sum(f.done() for f in flood) >= FLOOD - 1)
        single = pool.submit(ask, server.url, key, 0)
        before = 0
        for done in as_completed([*flood, single]):
            if done is single:
                break
            before += 1
        left = FLOOD - before
        assert single.result() == alone, "its turn changes nothing that is drawn"
        assert (left > FLOOD // 3) is is_fair
