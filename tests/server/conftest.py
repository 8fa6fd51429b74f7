"""A real server on a socket, with a real tiny model behind it, and the clients that people have."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from fastapi import FastAPI

from myserve.server.app import create_app
from myserve.server.edge.graceful import GracefulServer
from myserve.server.models.models import ServedModel
from myserve.server.settings import Settings


@pytest.fixture(scope="session")
def wait_until() -> Callable[[Callable[[], bool]], None]:
    """Wait for what another thread does; a minute is never, even on a busy machine that compiles kernels."""

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, "it never happened"
            time.sleep(0.005)

    return wait


@dataclass(frozen=True)
class RunningServer:
    """Where it listens, and what it runs."""

    url: str
    app: FastAPI
    server: GracefulServer

    def model(self, name: str) -> ServedModel:
        loaded: ServedModel | None = self.app.state.models.if_loaded(name)
        assert loaded is not None
        return loaded


@contextmanager
def run_server(settings: Settings) -> Iterator[RunningServer]:
    """uvicorn in a thread, on a free port, until the block ends."""
    app = create_app(settings)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as `myserve serve` does
    server = GracefulServer(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        while set(app.state.models.readiness().values()) == {"loading"}:
            time.sleep(0.01)
        yield RunningServer(f"http://127.0.0.1:{listener.getsockname()[1]}", app, server)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="session")
def open_server() -> Callable[[Settings], AbstractContextManager[RunningServer]]:
    """For a test that needs a server of its own."""
    return run_server


@pytest.fixture(scope="session")
def server(tiny_model: Callable[[str], Path]) -> Iterator[RunningServer]:
    """One server for all tests that only ask: "tiny" is a Qwen3 with a chat template."""
    path = str(tiny_model("qwen3"))
    with run_server(Settings(models={"tiny": path, "accounts/a/deployments/d": path})) as running:
        yield running


@pytest.fixture(scope="session")
def moe_server(tiny_model: Callable[[str], Path]) -> Iterator[RunningServer]:
    """Mixtures of experts: "moe" has 8 a layer, "wide" 300; "dense" has none."""
    served = {"moe": "qwen3_moe", "wide": "wide_moe", "dense": "llama"}
    with run_server(
        Settings(models={name: str(tiny_model(arch)) for name, arch in served.items()})
    ) as running:
        yield running


AGENT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nCall with <tool_call></tool_call>:"
    "{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    '{% for call in m.tool_calls or [] %}<tool_call>\n{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}'
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# it drops the thoughts of earlier turns, as most do
THINKER_TEMPLATE = AGENT_TEMPLATE + (
    "{% if add_generation_prompt %}{% if enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}{% endif %}"
)


@pytest.fixture(scope="session")
def agent_server(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """Models whose templates have tools: "agent" answers at once, "thinker" thinks before."""
    models = {}
    for name, template in (("agent", AGENT_TEMPLATE), ("thinker", THINKER_TEMPLATE)):
        folder = tmp_path_factory.mktemp(name) / "model"
        shutil.copytree(tiny_model("qwen3"), folder)
        (folder / "chat_template.jinja").write_text(template)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
        models[name] = str(folder)
    with run_server(Settings(models=models)) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    """The unmodified client, checking every field of every answer."""
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="any", max_retries=0, _strict_response_validation=True
    ) as strict:
        yield strict


@pytest.fixture
def completion_stream_client(server: RunningServer) -> Iterator[openai.OpenAI]:
    """For streamed completions alone: their type wants a finish reason in every chunk, while OpenAI's API, like
    ours, sends null until the last, so the strict client refuses OpenAI's own streams too.
    """
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as lenient:
        yield lenient
