"""Dashboard, rollouts, and what all views owe everyone: axe finds nothing serious, 390 pixels are enough, pictures."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from myserve.sdk import DeploymentSampler
from myserve.sdk.records import Journal
from myserve.sdk.types import SampledCompletion
from server.pages.steps import fill, open_journal, run, until

VIEWS = ("playground", "dashboard", "rollouts")


@pytest.fixture(scope="module")
def journal(inspected: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal that the SDK wrote: two prompts of four samples of a mixture, with routing; rewards were noted."""
    path = tmp_path_factory.mktemp("journal") / "run.jsonl"
    sampler = DeploymentSampler(inspected.url, "moe", run_seed=7)

    def sample() -> None:
        with Journal(path, run_seed=7) as written:
            for at, prompt in enumerate(([5, 6, 7], [8, 9])):
                for one in sampler.sync.sample_with_prompt_tokens(
                    prompt, n=4, max_tokens=12, logprobs=True, top_logprobs=3, include_routing_matrix=True
                ):
                    written.add(f"prompt-{at}", one)
        sampler.sync.close()

    with ThreadPoolExecutor(1) as thread:  # in this one runs playwright's loop
        thread.submit(sample).result(timeout=60)
    with Journal(path, run_seed=7) as again:
        for line in path.read_text().splitlines()[1:]:
            drawn = SampledCompletion.from_json(json.loads(line)["sample"])
            first, *others = drawn.inference_logprobs or ()
            again.note(drawn, reward=0.0)
            trainers = [first, *(value + 0.001 for value in others)]
            again.note(drawn, reward=drawn.index / 4, trainer_logprobs=trainers)
    return path


def test_a_journal_is_shown_sample_by_sample(
    inspected: Any, open_page: Callable[..., Any], journal: Path
) -> None:
    page = open_page(inspected.url)
    page.select_option("#model", "moe")
    open_journal(page, journal)
    assert "8 samples of 2 prompts, run seed 7" in page.locator(".drop").inner_text()
    assert page.locator(".virtual .head").count() == 2
    assert "mean reward 0.375" in page.locator(".virtual .head").first.inner_text()
    entry = json.loads(journal.read_text().splitlines()[1])
    sample = entry["sample"]
    ids = sample["full_tokens"][sample["prompt_len"] :]
    assert page.locator(".roll-detail .tok").count() == len(ids)
    page.locator(".roll-detail .tok").nth(2).click()
    told = page.locator(".roll-detail [aria-live]").inner_text()
    assert f"id {ids[2]}" in told and f"logprob {sample['inference_logprobs'][2]:.6f}" in told
    assert "equal bits at 1 of" in page.locator(".roll-detail").inner_text()
    text = httpx.post(
        f"{inspected.url}/detokenize", json={"model": "moe", "tokens": sample["full_tokens"][:3]}
    ).json()
    assert page.locator(".prompt-shown").text_content() == text["prompt"]
    layers, each = sample["routing_shape"]
    assert f"Experts: {layers} layers" in (page.locator("canvas").get_attribute("aria-label") or "")
    page.locator(".roll-detail details").last.evaluate("details => { details.open = true; }")
    assert page.locator(".roll-detail tbody tr").count() == layers and each == 2
    assert "v0" in page.locator(".band").inner_text()
    page.get_by_role("button", name="Score again").click()
    page.get_by_role("button", name="Logprobs are identical").wait_for()
    page.locator(".virtual").focus()
    page.keyboard.press("End")
    until(page, "document.querySelector('.roll-detail h2').textContent.startsWith('Sample 3 of prompt-1')")


def test_a_logprob_that_was_changed_is_found(
    inspected: Any, open_page: Callable[..., Any], journal: Path, tmp_path: Path
) -> None:
    """The control of scoring again: one bit of one logprob."""
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    lines[1]["sample"]["inference_logprobs"][3] += 1e-6
    changed = tmp_path / "changed.jsonl"
    changed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = open_page(inspected.url)
    page.select_option("#model", "moe")
    open_journal(page, changed)
    page.get_by_role("button", name="Score again").click()
    page.get_by_role("button", name="Token 3 differs").wait_for()


def test_ten_thousand_samples_are_a_few_rows(
    inspected: Any, open_page: Callable[..., Any], tmp_path: Path
) -> None:
    draw = random.Random(1)
    path = tmp_path / "long.jsonl"
    with path.open("w") as file:
        file.write('{"journal":1,"run_seed":18446744073709551615}\n')
        for at in range(10_000):
            ids = [draw.randrange(384) for _ in range(20)]
            sample = {
                "text": f"sample {at} <b>",
                "full_tokens": [5, *ids],
                "prompt_len": 1,
                "completion_len": 20,
            }
            sample |= {
                "finish_reason": "stop",
                "index": at % 8,
                "inference_logprobs": [-draw.random() for _ in ids],
            }
            file.write(
                json.dumps({"key": f"k{at // 8}", "index": at % 8, "reward": at % 3, "sample": sample}) + "\n"
            )
        file.write('{"key": "cut')
    page = open_page(inspected.url)
    page.select_option("#model", "tiny")
    open_journal(page, path)
    assert (
        "10,000 samples of 1,250 prompts, run seed 18446744073709551615" in page.locator(".drop").inner_text()
    )
    assert page.locator(".virtual [role=option]").count() < 60
    page.locator(".virtual").focus()
    page.keyboard.press("End")
    page.get_by_text("sample 9999 <b>").wait_for()
    assert page.locator(".virtual [role=option]").count() < 60
    page.get_by_label("Order of samples").select_option("reward")
    page.get_by_label("Find in texts").fill("sample 77")
    assert "111 samples" in page.locator(".roll-list").inner_text()


def test_what_is_no_journal_is_told(inspected: Any, open_page: Callable[..., Any], tmp_path: Path) -> None:
    page = open_page(inspected.url)
    page.get_by_role("link", name="Rollouts").click()
    for text in ("", "not json\n", '{"a": 1}\n'):
        path = tmp_path / f"{len(text)}.jsonl"
        path.write_text(text)
        page.get_by_label("A journal").set_input_files(path)
        until(page, f"document.querySelector('.drop').textContent.includes('{path.name} is')")


def test_the_dashboard_tells_what_metrics_tell(
    inspected: Any, open_page: Callable[..., Any], picture: Callable[[Any, str], None]
) -> None:
    page = open_page(f"{inspected.url}/#dashboard", width=1280, height=900)
    page.select_option("#model", "tiny")
    until(page, "document.querySelectorAll('.chart svg').length === 8")
    page.locator(".chart details").nth(1).evaluate("details => { details.open = true; }")
    for rows in (2, 3, 4):  # something drawn between two readings
        body = {
            "model": "tiny",
            "prompt": "hi",
            "max_tokens": 40,
            "seed": rows,
            "ignore_eos": True,
            "n": rows,
        }
        httpx.post(f"{inspected.url}/v1/completions", json=body, timeout=60)
        until(page, f"document.querySelectorAll('.chart')[1].querySelectorAll('tbody tr').length >= {rows}")
    rates = page.locator(".chart").nth(1).locator("tbody td").all_inner_texts()
    assert len(rates) >= 4 and any(float(rate.replace(",", "")) > 0 for rate in rates if rate != "–")
    page.locator(".chart details").nth(1).evaluate("details => { details.open = false; }")
    picture(page, "inspector-dashboard")
    exact = httpx.get(f"{inspected.url}/version").json()["exact"]["tiny"]
    assert (
        f"rows_are_independent\t{str(exact['rows_are_independent']).lower()}"
        in page.locator(".exactness").inner_text()
    )


def test_five_thousand_tokens_are_laid_out_by_parts(inspected: Any, open_page: Callable[..., Any]) -> None:
    page = open_page(inspected.url)
    blocks = page.evaluate(
        """async () => {
          const { Strip } = await import('/inspector/playground/strip.js');
          const strip = new Strip({ label: 'long', choose: () => {} });
          document.querySelector('.samples').append(strip.node);
          for (let at = 0; at < 5000; at += 50) strip.append(Array.from({ length: 50 }, (_, i) =>
            ({ token: ' a', bytes: i === 49 ? [10] : [32, 97], token_id: 1, logprob: -0.5, top_logprobs: [] })));
          strip.draw();
          const blocks = [...strip.node.querySelectorAll('.strip-block')];
          strip.setScale('rank');
          return [strip.cells.length, blocks.length, getComputedStyle(blocks[9]).contentVisibility];
        }"""
    )
    assert blocks == [5000, 25, "auto"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(
    inspected: Any, open_page: Callable[..., Any], journal: Path, scheme: str
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = open_page(inspected.url, scheme=scheme, bypass_csp=True)  # axe's own script is put into the page
    page.select_option("#model", "moe")
    run(page)
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    page.locator(".tok").first.click()
    page.wait_for_selector(".falls")
    # the rest is the same in the dark
    options = {"runOnly": ["color-contrast"]} if scheme == "dark" else None
    found = {"playground": axe.run(page, options=options)}
    page.get_by_role("link", name="Dashboard").click()
    page.wait_for_selector(".chart svg")
    found["dashboard"] = axe.run(page, options=options)
    open_journal(page, journal)
    found["rollouts"] = axe.run(page, options=options)
    serious = {
        view: [(one["id"], [node["html"][:200] for node in one["nodes"][:3]]) for one in result.response["violations"]
               if one["impact"] in ("serious", "critical")]
        for view, result in found.items()
    }  # fmt: skip
    assert serious == {view: [] for view in VIEWS}


def test_a_phone_s_width_is_enough(inspected: Any, open_page: Callable[..., Any], journal: Path) -> None:
    page = open_page(inspected.url, width=390, height=844, scheme="dark")
    page.select_option("#model", "moe")
    run(page)
    page.locator(".tok").first.click()
    page.wait_for_selector(".falls")

    def wide() -> int:
        width: int = page.evaluate("document.documentElement.scrollWidth")
        return width

    assert wide() == 390
    page.get_by_role("link", name="Dashboard").click()
    page.wait_for_selector(".chart svg")
    assert wide() == 390
    open_journal(page, journal)
    assert wide() == 390


def test_the_theme_is_switched_and_kept(inspected: Any, open_page: Callable[..., Any]) -> None:
    page = open_page(inspected.url, scheme="light")

    def ground() -> str:
        colour: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return colour

    light = ground()
    page.emulate_media(color_scheme="dark")
    dark = ground()
    assert light != dark
    page.get_by_role("button", name="Theme").click()
    assert ground() == light, "light, whatever the system has"
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert ground() == light


def test_pictures_of_the_docs(
    inspected: Any, open_page: Callable[..., Any], journal: Path, picture: Callable[[Any, str], None]
) -> None:
    page = open_page(inspected.url, width=1440, height=900)
    page.select_option("#model", "myserve-demo")
    page.get_by_label("Message 1", exact=True).fill("Tell me a story.")
    asked = {
        "temperature": 1.6,
        "top_k": 12,
        "top_p": 0.92,
        "min_p": 0.08,
        "seed": 7,
        "n": 3,
        "max_tokens": 90,
    }
    fill(page, **asked, presence_penalty=0.5)
    page.evaluate(
        "document.querySelectorAll('details.group').forEach((group, at) => { group.open = at === 0; })"
    )
    run(page)
    page.evaluate("document.querySelector('.side').scrollTop = 0")
    picture(page, "inspector-playground")
    page.set_viewport_size({"width": 1640, "height": 900})  # all columns
    page.locator(".tok").nth(5).click()
    page.wait_for_selector(".falls")
    picture(page.locator(".waterfall"), "inspector-waterfall")
    page.set_viewport_size({"width": 1280, "height": 900})
    page.locator(".alternative").first.click()
    until(page, "document.querySelectorAll('.sample').length === 4")
    until(page, "document.querySelector('.samples').getAttribute('aria-busy') === 'false'")
    page.select_option("#model", "moe")
    open_journal(page, journal)
    picture(page, "inspector-rollouts")
