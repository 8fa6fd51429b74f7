"""A server for clients by their own packages: one of ours with tools, or the one that MYSERVE_TEST_URL names.

The packages want other versions than ours and are not installed with us, so each test is skipped where its own is
missing. `make clients` makes an environment for them, .venv-clients, and runs them all against a server of this one.
Against a server that runs elsewhere, whose model's chat template has tools in the style of Hermes:

    MYSERVE_TEST_URL=http://localhost:8000 MYSERVE_TEST_MODEL=NAME .venv-clients/bin/python -m pytest \
        --confcutdir tests/clients -c /dev/null tests/clients
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

TEMPLATE = (
    "{% if tools %}<|im_start|>system\nCall with <tool_call></tool_call>:"
    "{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Served:
    """Where a model is served, in OpenAI's form, and what it is called."""

    base_url: str
    model: str


@pytest.fixture(scope="session")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    if url := os.environ.get("MYSERVE_TEST_URL"):
        yield Served(url.rstrip("/") + "/v1", os.environ["MYSERVE_TEST_MODEL"])
        return
    from myserve.server.settings import Settings
    from tests.server.conftest import run_server

    folder = tmp_path_factory.mktemp("clients") / "model"
    shutil.copytree(request.getfixturevalue("tiny_model")("qwen3"), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    # a token is about a character here, and pydantic-ai explains a schema at length
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    with run_server(Settings(models={"tiny": str(folder)})) as running:
        yield Served(running.url + "/v1", "tiny")
