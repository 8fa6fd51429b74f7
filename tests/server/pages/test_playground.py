"""The playground in a real browser: what it shows is what the API says, by mouse, by keys, from a link, on a phone."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from myserve.core.params import SamplingParams
from myserve.core.ranges import ranges_of
from server.pages.steps import fill, run, until

PROMPT = "Zß🦄 One, two, three"
HOSTILE = "<img src=x onerror=alert(1)><script>window.hacked = 1</script>"


def ask_raw(page: Any, prompt: str = PROMPT, model: str = "tiny", **fields: Any) -> None:
    page.select_option("#model", model)
    page.get_by_role("button", name="Raw text").click()
    page.get_by_label("Prompt", exact=True).fill(prompt)
    fill(page, **fields)


def strips(page: Any) -> list[list[str]]:
    """Return the labels of every token, a list for each sample."""
    found: list[list[str]] = page.evaluate(
        "[...document.querySelectorAll('.sample .strip')].map(strip => [...strip.querySelectorAll('.tok')].map("
        "cell => cell.getAttribute('aria-label')))"
    )
    return found


def tokens_of(server: Any, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": "tiny", "prompt": PROMPT, "return_token_ids": True, "logprobs": True} | fields
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    choices: list[dict[str, Any]] = answer["choices"]
    return choices


def test_the_page_and_its_files_have_the_policy(inspected: Any) -> None:
    for path in ("/", "/inspector/main.js", "/inspector/base.css", "/inspector/playground/view.js"):
        answer = httpx.get(inspected.url + path)
        policy = answer.headers["content-security-policy"]
        assert answer.status_code == 200 and "default-src 'none'" in policy and "unsafe" not in policy
        again = httpx.get(inspected.url + path, headers={"if-none-match": answer.headers["etag"]})
        assert again.status_code == 304 and not again.content
    for path in ("nothing.js", "../__init__.py", "..%2f__init__.py", "%2e%2e/__init__.py", ""):
        assert httpx.get(f"{inspected.url}/inspector/{path}").status_code == 404


def test_no_module_reads_html_or_is_long() -> None:
    import myserve.server.pages as pages

    files = sorted(Path(str(pages.__file__)).parent.glob("static/**/*.*"))
    assert len(files) > 20
    for file in files:
        text = file.read_text()
        assert text.count("\n") < 400, file
        forbidden = (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "eval(",
            "document.write",
            "http://",
            "//cdn",
        )
        text = text.replace("http://www.w3.org", "")  # SVG's name
        assert [word for word in forbidden if word in text] == [], file


def test_every_token_is_shown_with_its_numbers(inspected: Any, open_page: Callable[..., Any]) -> None:
    page = open_page(inspected.url)
    ask_raw(page, seed=11, max_tokens=40, n=2, temperature=1.4, ignore_eos=True)
    run(page)
    asked = {"seed": 11, "max_tokens": 40, "n": 2, "temperature": 1.4, "ignore_eos": True}
    choices = tokens_of(inspected, **asked, token_stats=True)
    ids = page.evaluate(
        "[...document.querySelectorAll('.sample .strip')].map(strip => strip.querySelectorAll('.tok').length)"
    )
    assert ids == [40, 40]
    kinds = page.evaluate("[...document.querySelectorAll('.tok')].map(cell => cell.dataset.kind)")
    assert "bytes" in kinds and "text" in kinds, "a random model splits characters"
    for scale in ("sampling", "entropy", "rank"):
        page.get_by_label("Colour tokens by").first.select_option(scale)
        steps = page.evaluate("[...document.querySelectorAll('.tok')].map(cell => Number(cell.dataset.step))")
        assert min(steps) >= 0, scale
    ranks = [entry["rank"] for choice in choices for entry in choice["logprobs"]["content"]]
    assert steps == [sum(rank >= edge for edge in (2, 3, 5, 10, 30, 100, 1000)) for rank in ranks]
    cell = page.locator(".tok").nth(7)
    cell.hover()
    tip = page.locator("#tip").inner_text()
    entry = choices[0]["logprobs"]["content"][7]
    assert f"id {entry['token_id']}" in tip and f"logprob {entry['logprob']:.3f}" in tip
    parts = next(
        at
        for at, pair in enumerate(zip(choices[0]["token_ids"], choices[1]["token_ids"], strict=True))
        if pair[0] != pair[1]
    )
    assert f"parts from sample 0 at token {parts}:" in page.locator(".sample-parts").nth(1).inner_text()


def test_when_the_page_says_that_it_is_done_all_tokens_are_there(
    inspected: Any, open_page: Callable[..., Any]
) -> None:
    """In a tab without frames, as a hidden one is: tokens that wait for the next frame would not come."""
    page = open_page(inspected.url)
    ask_raw(page, max_tokens=12, n=2, seed=3, ignore_eos=True)
    page.evaluate("window.requestAnimationFrame = () => 0")
    run(page)
    assert [len(strip) for strip in strips(page)] == [12, 12]


def test_a_link_draws_the_same_samples(inspected: Any, open_page: Callable[..., Any]) -> None:
    page = open_page(inspected.url)
    ask_raw(page, max_tokens=12, n=2, temperature=1.2)
    run(page)
    drawn, link = strips(page), page.url
    assert drawn[0] and "#playground/" in link
    other = open_page(link)
    run(other)
    assert strips(other) == drawn
    run(page)
    assert strips(page) != drawn, "the control: without the link's seed a run draws anew"


def test_keys_alone_go_all_the_way(inspected: Any, open_page: Callable[..., Any]) -> None:
    page = open_page(inspected.url)
    page.select_option("#model", "tiny")
    page.get_by_label("Message 1", exact=True).focus()
    page.keyboard.press("Control+a")
    page.keyboard.type("Say a color")
    fill(page, max_tokens=6, seed=3)
    page.get_by_label("Message 1", exact=True).focus()
    page.keyboard.press("Control+Enter")
    until(page, "document.querySelector('.samples')?.getAttribute('aria-busy') === 'false'")
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('tok')"):
            break
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.index") == "1"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert page.locator("#tip").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#tip").is_visible()
    page.keyboard.press("Enter")
    page.wait_for_selector(".falls")
    for _ in range(8):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('alternative')"):
            break
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('.sample').length === 2")
    assert page.get_by_role("navigation", name="Branches").is_visible()


def test_the_waterfall_is_the_route_s(inspected: Any, open_page: Callable[..., Any]) -> None:
    fields = {
        "seed": 5,
        "max_tokens": 8,
        "top_k": 30,
        "top_p": 0.9,
        "temperature": 1.3,
        "frequency_penalty": 1.0,
    }
    page = open_page(inspected.url)
    ask_raw(page, **fields)
    run(page)
    page.locator(".tok").nth(4).click()
    page.wait_for_selector(".falls")
    (choice,) = tokens_of(inspected, **fields)
    request = {"model": "tiny", "prompt": PROMPT} | fields
    asked = {"completion": request, "completion_token_ids": choice["token_ids"], "position": 4, "top": 12}
    answer = httpx.post(f"{inspected.url}/v1/waterfall", json=asked).json()
    heads = page.evaluate(
        "[...document.querySelectorAll('.falls .stage-name')].map(head => head.firstChild.data)"
    )
    assert heads == ["Model", "Penalties", "Temperature", "Top-k", "Top-p", "The race"]
    shown = page.evaluate(
        "[...document.querySelectorAll('.falls tbody tr')].map(row => Number(row.dataset.token))"
    )
    assert shown == [token["token_id"] for token in answer["tokens"]]
    assert page.locator(".falls tr.drawn").get_attribute("data-token") == str(choice["token_ids"][4])
    removed = page.locator(".falls .gone.here").count()
    assert removed == sum(token["removed_by"] is not None for token in answer["tokens"]) > 0


def test_a_fork_goes_on_under_the_same_seed(inspected: Any, open_page: Callable[..., Any]) -> None:
    fields = {"seed": 21, "max_tokens": 10, "temperature": 1.1, "repetition_penalty": 1.2, "ignore_eos": True}
    page = open_page(inspected.url)
    ask_raw(page, **fields)
    run(page)
    page.locator(".tok").nth(3).click()
    page.locator(".alternative").first.click()
    until(page, "document.querySelector('.samples').getAttribute('aria-busy') === 'false'")
    until(page, "document.querySelectorAll('.sample')[1]?.querySelectorAll('.tok').length === 10")
    (choice,) = tokens_of(inspected, **fields, top_logprobs=5)
    ids, entry = choice["token_ids"], choice["logprobs"]["content"][3]
    other = next(one["token_id"] for one in entry["top_logprobs"] if one["token_id"] != ids[3])
    prompt = choice["prompt_token_ids"]
    (expected,) = tokens_of(
        inspected, **fields | {"prompt": [*prompt, *ids[:3], other], "num_prior_tokens": 4, "max_tokens": 6}
    )
    shown = page.evaluate(
        "[...document.querySelectorAll('.sample')[1].querySelectorAll('.tok')].map(cell => cell.textContent)"
    )
    assert len(shown) == 10 and len(expected["token_ids"]) == 6
    page.locator(".sample").nth(1).locator(".tok").nth(9).click()
    panel = page.locator(".token-panel .facts dd").first
    assert panel.inner_text() == str(expected["token_ids"][5])
    page.get_by_label("Temperature", exact=True).fill("0")
    page.get_by_role("button", name="Draw", exact=True).click()
    until(page, "document.querySelectorAll('.sample')[2]?.querySelectorAll('.tok').length === 10")
    (greedy,) = tokens_of(inspected, **fields | {"temperature": 0})
    page.locator(".sample").nth(2).locator(".tok").nth(9).click()
    until(
        page, f"document.querySelector('.token-panel .facts dd').textContent === '{greedy['token_ids'][9]}'"
    )


def test_text_that_holds_html_is_shown_and_never_run(inspected: Any, open_page: Callable[..., Any]) -> None:
    page = open_page(inspected.url)
    page.select_option("#model", "tiny")
    fill(page, max_tokens=200)
    page.get_by_label("Message 1", exact=True).fill(HOSTILE)
    page.get_by_label("form of the text").select_option("choice")
    page.get_by_label("What the form says").fill(HOSTILE)
    run(page)
    text = page.evaluate("document.querySelector('.strip').textContent")
    assert text.replace("·", " ").startswith(HOSTILE)
    page.locator(".tok").nth(2).click()
    page.wait_for_selector(".falls")
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.querySelectorAll('main script, main img').length") == 0


def test_a_stream_is_stopped_and_a_refusal_is_told(inspected: Any, open_page: Callable[..., Any]) -> None:
    page = open_page(inspected.url)
    ask_raw(page, max_tokens=470, ignore_eos=True, seed=1)
    page.get_by_role("button", name="Run").click()
    page.wait_for_selector(".tok")
    page.get_by_role("button", name="Stop").click()
    until(page, "document.querySelector('.samples').getAttribute('aria-busy') === 'false'")
    assert 0 < len(strips(page)[0]) <= 470
    fill(page, max_tokens=100000)
    run(page)
    assert "maximum context length" in page.get_by_role("alert").last.inner_text()
    fill(page, seed="no seed")
    page.get_by_role("button", name="Run").click()
    assert "seed: an integer of 64 bits" in page.get_by_role("alert").last.inner_text()


def test_every_parameter_has_a_control_with_its_range(inspected: Any, open_page: Callable[..., Any]) -> None:
    page = open_page(inspected.url)
    controls = page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('[data-parameter]')].map("
        "field => [field.dataset.parameter, [field.min, field.max]]))"
    )
    for name, allowed in ranges_of(SamplingParams).items():
        if name == "prompt_logprob_start":  # of the route of token ids alone
            continue
        assert name in controls, name
        if name not in ("seed", "top_logprobs"):  # a text, for it has 64 bits; the operator's limit
            assert list(map(float, controls[name])) == [allowed.low, allowed.high], name


def test_the_code_draws_what_the_page_drew(
    inspected: Any, open_page: Callable[..., Any], tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page(inspected.url)
    page.select_option("#model", "tiny")
    fill(page, max_tokens=12, seed=2**64 - 9, top_k=50, temperature=1.1, stop="qq\nzz", ignore_eos=True)
    page.get_by_label("Message 1", exact=True).fill('It\'s "quoted" \\ and\nZß🦄')
    run(page)
    page.get_by_text("As code").click()
    codes = {name: page.locator(f'[data-code="{name}"]').inner_text() for name in ("curl", "openai", "sdk")}
    page.locator(".sample h3").first.wait_for()
    text = page.evaluate(
        "import('/inspector/lib/tokens.js').then(() => [...document.querySelectorAll('.tok')].length)"
    )
    assert text == 12
    monkeypatch.setenv("MYSERVE_TOKENIZER", str(tiny_model("qwen3")))
    printed: dict[str, list[Any]] = {"openai": [], "sdk": []}
    with ThreadPoolExecutor(1) as thread:  # in this one runs playwright's loop
        for name, lines in printed.items():
            scope = {"print": lambda *values, lines=lines: lines.append(values[0])}
            thread.submit(exec, codes[name], scope).result(timeout=100)
    if shutil.which("curl"):
        answer = subprocess.run(["bash", "-c", codes["curl"]], capture_output=True, check=True).stdout
        assert json.loads(answer)["choices"][0]["message"]["content"] == printed["openai"][0]
    assert printed["sdk"] == [repr(printed["openai"][0])]
    labels = strips(page)[0]
    (choice,) = httpx.post(
        f"{inspected.url}/v1/chat/completions",
        json={
            "model": "tiny", "messages": [{"role": "user", "content": 'It\'s "quoted" \\ and\nZß🦄'}], "max_tokens": 12,
            "seed": 2**64 - 9, "top_k": 50, "temperature": 1.1, "stop": ["qq", "zz"], "ignore_eos": True,
        },
    ).json()["choices"]  # fmt: skip
    assert choice["message"]["content"] == printed["openai"][0] and len(labels) == 12


def test_a_key_stays_in_the_tab(
    browser: Any, open_page: Callable[..., Any], open_server: Any, tmp_path: Path
) -> None:
    from myserve.server.settings import Settings

    (tmp_path / "keys").write_text("sk-good me\n")
    settings = Settings(models={"echo": "x"}, force_echo=True, api_keys_file=str(tmp_path / "keys"))
    with open_server(settings) as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(server.url)
        page.get_by_label("Key", exact=True).fill("sk-wrong")
        page.get_by_role("button", name="Use this key").click()
        until(page, "document.getElementById('key-dialog').open")
        page.get_by_label("Key", exact=True).fill("sk-good")
        page.get_by_role("button", name="Use this key").click()
        page.wait_for_selector("body[data-ready]")
        assert page.locator("#model").input_value() == "echo"
        fill(page, max_tokens=3)
        assert "sk-good" not in page.url
        kept = page.evaluate("[Object.values(sessionStorage), Object.values(localStorage), document.cookie]")
        assert kept[0] == ["sk-good"] and "sk-good" not in kept[1] and kept[2] == ""
        other = context.new_page()
        other.goto(server.url)
        until(other, "document.getElementById('key-dialog').open")
        context.close()
