"""A real Chromium, a page of the inspector in it, and a server with a random model and the embedded one behind it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from myserve.embedded import embedded_model_path
from myserve.server.settings import Settings

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = (
    "the page's tests need a Chromium and playwright: apt-get install chromium, pip install 'myserve[dev]'"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a browser where there is none, and say how to get it."""
    if CHROMIUM is None:
        for item in items:
            if "browser" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.skip(reason=MISSING))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One browser for a module: playwright's loop runs in this thread as long as it is there."""
    playwright = pytest.importorskip("playwright.sync_api", reason=MISSING)
    with playwright.sync_playwright() as running:
        # a container's root has no sandbox, and no memory for a large /dev/shm
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def inspected(
    tiny_model: Callable[[str], Path], open_server: Callable[[Settings], AbstractContextManager[Any]]
) -> Iterator[Any]:
    """Serve "tiny", a random Qwen3 that draws any bytes, "moe", a mixture, and the embedded model."""
    models = {
        "tiny": str(tiny_model("qwen3")),
        "moe": str(tiny_model("qwen3_moe")),
        "myserve-demo": str(embedded_model_path()),
    }
    with open_server(Settings(models=models)) as running:
        yield running


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open a page. At the end: nothing left its origin, nothing was refused by its policy, and no script failed."""
    contexts: list[Any] = []
    problems: list[str] = []

    def open_(
        url: str, *, width: int = 1440, height: int = 1000, scheme: str = "light", **options: Any
    ) -> Any:
        context = options.pop("context", None)
        if context is None:
            context = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme, **options
            )
            contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        origin = urlsplit(url).netloc

        def asked(request: Any) -> None:
            where = urlsplit(request.url)
            if where.scheme not in ("data", "blob") and where.netloc != origin:
                problems.append(f"a request left the origin: {request.url}")

        def told(message: Any) -> None:
            # an answer that says 401 or 400 is told by the browser as an error of its own
            if message.type == "error" and "status of 4" not in message.text:
                problems.append(message.text)

        page.on("request", asked)
        page.on("console", told)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(url)
        page.wait_for_selector("body[data-ready]")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture(scope="session")
def picture() -> Callable[[Any, str], None]:
    """Take a picture of a part of a page; of the docs, where MYSERVE_PICTURES names their folder."""
    folder = os.environ.get("MYSERVE_PICTURES")

    def take(part: Any, name: str) -> None:
        assert len(part.screenshot(**({"path": f"{folder}/{name}.png"} if folder else {}))) > 5000

    return take
