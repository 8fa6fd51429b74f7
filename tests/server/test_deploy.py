"""What operators copy, and what they read, names only what exists: metrics, options, files, alerts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
import yaml
from prometheus_client.parser import text_string_to_metric_families

from myserve.cli import app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PAGE = (ROOT / "docs" / "operations.md").read_text()
METRIC = re.compile(r"\b(?:(?:vllm|myserve):|http_request|process_)[a-z0-9_]+")
ALERTS = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text())


def exposed(server: Any) -> tuple[set[str], set[str]]:
    """Names of the samples, and of the families as they are declared."""
    body = {"model": "tiny", "prompt": [5], "max_tokens": 2}
    assert httpx.post(server.url + "/v1/completions", json=body).status_code == 200
    text = httpx.get(server.url + "/metrics").text
    samples = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    return samples, set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))


def test_alerts_and_dashboard_ask_for_what_is_there(server: Any) -> None:
    samples, _ = exposed(server)
    asked = [rule["expr"] for rule in ALERTS]
    asked += [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    asked += [variable["query"] for variable in DASHBOARD["templating"]["list"]]
    names = {name for expression in asked for name in METRIC.findall(expression)}
    assert len(names) > 20
    assert names <= samples
    assert not {"vllm:num_requests_swapped"} <= samples  # a name that is not there would be seen


def test_the_page_lists_every_metric_and_no_other(server: Any) -> None:
    _, families = exposed(server)
    assert set(METRIC.findall(PAGE)) == families


def test_the_page_says_what_to_do_about_every_alert() -> None:
    advice = PAGE[PAGE.index("## What to do") :]
    assert set(re.findall(r"`(Myserve\w+)`", advice)) == {rule["alert"] for rule in ALERTS}


@pytest.mark.parametrize("file", ["docs/operations.md", "deploy/myserve.service", "Containerfile"])
def test_every_option_exists(file: str) -> None:
    command: Any = typer.main.get_command(app)
    serve = {option for param in command.get_command(None, "serve").params for option in param.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (ROOT / file).read_text()))
    theirs = {"--help", "--build-arg", "--no-cache-dir", "--extra-index-url", "--constraint", "--create-home"}
    theirs |= {"--start-period", "--interval"}
    assert named - theirs <= serve
    assert "--exit-on-engine-death" in named


def test_compose_mounts_files_that_are_there() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yml").read_text())["services"]
    assert services["myserve"]["build"]["dockerfile"] == "Containerfile"
    mounts = [mount.split(":")[0] for service in services.values() for mount in service.get("volumes", [])]
    files = [mount for mount in mounts if mount.startswith("./")]
    assert len(files) == 5
    assert all((DEPLOY / file).is_file() for file in files)
    scrape = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    assert scrape["scrape_configs"][0]["job_name"] == "myserve" and scrape["rule_files"] == ["alerts.yml"]
