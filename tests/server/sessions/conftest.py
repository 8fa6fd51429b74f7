"""A server whose models call tools and think, and the openai client with a session."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import openai
import pytest

from myserve.server.settings import Settings

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ (m.content or '').split('</think>')[-1] }}"
    "{% for call in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
)
AGENT = (
    "{% if tools %}<|im_start|>system\nCall with <tool_call></tool_call>:"
    "{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    + TURNS.replace(".split('</think>')[-1]", "")
    + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKER = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"


def with_template(source: Path, folder: Path, template: str, **config: Any) -> str:
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").write_text(template)
    described = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(described))
    return str(folder)


@pytest.fixture(scope="package")
def agent_folder(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("agent") / "model"
    return with_template(tiny_model("qwen3"), folder, AGENT, max_position_embeddings=8192)


@pytest.fixture(scope="package")
def sessions_server(
    agent_folder: str,
    tiny_model: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
    open_server: Callable[[Settings], AbstractContextManager[Any]],
) -> Iterator[Any]:
    """ "agent" calls tools, "thinker" thinks, "plain" has a template without EOS."""
    thinker = with_template(tiny_model("qwen3"), tmp_path_factory.mktemp("thinker") / "model", THINKER)
    plain = with_template(
        tiny_model("qwen3"),
        tmp_path_factory.mktemp("plain") / "model",
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:",
    )
    models = {"agent": agent_folder, "thinker": thinker, "plain": plain}
    with open_server(Settings(models=models, weights_dir=str(Path(agent_folder).parent))) as running:
        yield running


@pytest.fixture
def session_client(sessions_server: Any, request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    """The unmodified client; each test's session has the test's name."""
    with openai.OpenAI(
        base_url=f"{sessions_server.url}/v1",
        api_key="any",
        max_retries=0,
        default_headers={"X-Session-ID": request.node.name},
        _strict_response_validation=True,
    ) as client:
        yield client
