"""Batches by the unmodified client: the bits of the live routes, in order, over restarts, behind live requests."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from myserve.engine.config import EngineConfig
from myserve.errors import RequestError
from myserve.server.app import create_app
from myserve.server.settings import Settings

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Say a color"}]
PREDICATE = {"type": "predicate", "instructions": "It is a color."}
# of each endpoint a good body and one that is refused
BODIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    CHAT: ({"messages": USER, "max_tokens": 8, "logprobs": True}, {"messages": []}),
    COMPLETIONS: ({"prompt": ["a", "b"], "max_tokens": 6, "return_token_ids": True}, {"prompt": 5}),
    "/v1/responses": ({"input": "hi", "max_output_tokens": 8}, {"input": "hi", "max_output_tokens": 9999}),
    "/v1/messages": ({"messages": USER, "max_tokens": 8}, {"messages": USER}),
    "/v1/decisions": ({"input": "red", "questions": [PREDICATE]}, {"input": "red", "questions": []}),
    "/inference/v1/generate": (
        {"token_ids": [5, 6], "sampling_params": {"max_tokens": 6}},
        {"token_ids": []},
    ),
}
# what differs between two answers with the same bits
OWN = ("id", "created", "created_at", "completed_at", "request_id", "diagnostics", "usage", "perf_metrics")


@pytest.fixture(scope="module")
def make(tiny_model: Callable[[str], Path]) -> Callable[..., Settings]:
    """Settings of a server whose batches take one line at a time."""

    def settings(folder: Path, **others: Any) -> Settings:
        engine = EngineConfig(max_num_seqs=1, num_blocks=64)
        return Settings(
            models={"tiny": str(tiny_model("qwen3"))}, engine=engine, batch_directory=str(folder), **others
        )

    return settings


@pytest.fixture(scope="module")
def narrow(make: Any, open_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with open_server(make(tmp_path_factory.mktemp("batches"))) as running:
        yield running


@pytest.fixture(scope="module")
def narrow_client(narrow: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{narrow.url}/v1", api_key="any", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


def lines(url: str, *bodies: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"custom_id": f"line {at}", "method": "POST", "url": url, "body": {"model": "tiny", **body}}
        for at, body in enumerate(bodies)
    ]


def upload(client: openai.OpenAI, written: list[dict[str, Any]]) -> Any:
    text = "\n\n".join(map(json.dumps, written))
    return client.files.create(file=("in.jsonl", text.encode()), purpose="batch")


def begin(client: openai.OpenAI, written: list[dict[str, Any]], window: str = "24h", **others: Any) -> Any:
    return client.batches.create(
        input_file_id=upload(client, written).id,
        endpoint=others.pop("endpoint", None) or written[0]["url"],
        completion_window=window,  # type: ignore[arg-type]
        **others,
    )


def ended(client: openai.OpenAI, batch_id: str) -> Any:
    deadline = time.monotonic() + 60
    while (batch := client.batches.retrieve(batch_id)).status not in (
        "completed",
        "failed",
        "expired",
        "cancelled",
    ):
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)
    return batch


def read(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def without_own(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_own(item) for name, item in value.items() if name not in OWN}
    return [without_own(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("url", BODIES)
def test_lines_have_the_bits_of_the_live_route(server: Any, client: openai.OpenAI, url: str) -> None:
    """`server` has no folder: its files are temporary, and it says so."""
    good, bad = BODIES[url]
    seeded = [good | {"seed": seed} for seed in (1, 2)]
    if "sampling_params" in good:
        seeded = [good | {"sampling_params": good["sampling_params"] | {"seed": seed}} for seed in (1, 2)]
    if url == "/v1/decisions":
        seeded = [good, good | {"input": "blue"}]
    written = lines(url, seeded[0], bad, seeded[1])
    batch = ended(client, begin(client, written).id)
    assert batch.status == "completed", batch
    assert batch.request_counts.to_dict() == {"total": 3, "completed": 2, "failed": 1}
    assert "temporary" in batch.model_extra["warnings"][0]
    out, errors = read(client, batch.output_file_id), read(client, batch.error_file_id)
    assert [line["custom_id"] for line in out] == ["line 0", "line 2"]
    for line, body in zip(out, seeded, strict=True):
        live = httpx.post(server.url + url, json={"model": "tiny", **body}, timeout=60)
        assert live.status_code == line["response"]["status_code"] == 200
        assert without_own(line["response"]["body"]) == without_own(live.json())
        assert line["error"] is None
    assert without_own(out[0]["response"]["body"]) != without_own(out[1]["response"]["body"])
    used = [line["response"]["body"].get("usage") for line in out]
    assert batch.usage is not None
    assert batch.usage.total_tokens == sum(map(tokens_of, used)), "each protocol's own words, summed"
    assert batch.usage.input_tokens_details.cached_tokens <= batch.usage.input_tokens
    assert batch.usage.input_tokens > 0
    (failed,) = errors
    live = httpx.post(server.url + url, json={"model": "tiny", **bad})
    assert failed["custom_id"] == "line 1"
    assert (failed["response"]["status_code"], failed["response"]["body"]) == (400, live.json())


def tokens_of(used: dict[str, Any] | None) -> int:
    names = ("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens", "cache_read_input_tokens")
    return sum((used or {}).get(name, 0) for name in names)


LONG = {"prompt": "x", "ignore_eos": True, "max_tokens": 400}


def alone_text(url: str, seed: int) -> str:
    answer = httpx.post(url + COMPLETIONS, json={"model": "tiny", **LONG, "seed": seed}, timeout=60)
    text: str = answer.json()["choices"][0]["text"]
    return text


def test_a_live_request_takes_the_place_of_a_line_which_goes_on_with_the_same_bits(
    narrow: Any, narrow_client: openai.OpenAI
) -> None:
    engine = narrow.model("tiny").engine
    preempted = engine.load.num_preemptions
    batch = begin(narrow_client, lines(COMPLETIONS, *[LONG | {"seed": seed} for seed in range(3)]))
    while not engine.load.num_running:
        time.sleep(0.001)
    live = narrow_client.completions.create(model="tiny", prompt="y", max_tokens=3, seed=1)
    # all that ran before it would have taken hundreds of steps; one that waits for its turn waits for a line
    assert narrow_client.batches.retrieve(batch.id).request_counts.completed < 3
    assert live.usage is not None and live.usage.completion_tokens >= 1
    assert engine.load.num_preemptions == preempted + 1
    done = ended(narrow_client, batch.id)
    alone = alone_text(narrow.url, seed=0)
    (first, *_) = read(narrow_client, done.output_file_id)
    assert first["response"]["body"]["choices"][0]["text"] == alone


def test_a_cancelled_batch_keeps_what_is_answered(narrow_client: openai.OpenAI) -> None:
    short = {"prompt": "x", "max_tokens": 1}
    batch = begin(narrow_client, lines(COMPLETIONS, short, *[LONG] * 50), metadata={"run": "7"})
    while narrow_client.batches.retrieve(batch.id).request_counts.completed < 1:
        time.sleep(0.01)
    with pytest.raises(openai.BadRequestError, match="is read by a batch"):
        narrow_client.files.delete(batch.input_file_id)
    assert narrow_client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    batch = ended(narrow_client, batch.id)
    assert (batch.status, batch.metadata) == ("cancelled", {"run": "7"})
    out, errors = read(narrow_client, batch.output_file_id), read(narrow_client, batch.error_file_id)
    assert out[0]["custom_id"] == "line 0"
    assert len(out) + len(errors) == 51 == batch.request_counts.total
    assert errors[-1]["error"]["code"] == "batch_cancelled" and errors[-1]["response"] is None
    assert [line["custom_id"] for line in errors] == [f"line {at}" for at in range(len(out), 51)]
    assert narrow_client.batches.cancel(batch.id).status == "cancelled"
    assert narrow_client.files.delete(batch.input_file_id).deleted


def test_what_is_not_answered_in_the_window_is_an_error(narrow_client: openai.OpenAI) -> None:
    batch = ended(narrow_client, begin(narrow_client, lines(COMPLETIONS, *[LONG] * 200), "1s").id)
    assert batch.status == "expired" and batch.expired_at >= batch.expires_at
    errors = read(narrow_client, batch.error_file_id)
    assert errors[-1]["error"]["code"] == "batch_expired"
    assert batch.request_counts.completed + len(errors) == 200


def test_a_server_goes_on_with_the_folder_of_one_that_ended(
    make: Any, open_server: Any, tmp_path: Path
) -> None:
    with open_server(make(tmp_path)) as first:
        client = openai.OpenAI(base_url=f"{first.url}/v1", api_key="any", max_retries=0)
        batch = begin(client, lines(COMPLETIONS, *[LONG | {"seed": seed} for seed in range(4)]))
        while client.batches.retrieve(batch.id).request_counts.completed < 1:
            time.sleep(0.01)
        with pytest.raises(RequestError, match="used by another server"):
            create_app(make(tmp_path))
        first.model("tiny").in_flight.cut_all()  # as a shutdown does, whose time is over
        first.app.state.models.close_door()
    (journal,) = (tmp_path / "batches").glob("*.answers")
    kept = [json.loads(line.split(b" ", 2)[2]) for line in journal.read_bytes().splitlines()]
    assert 1 <= len(kept) < 4
    with journal.open("ab") as torn:
        torn.write(b'3 1 {"id": "torn')
    with open_server(make(tmp_path)) as second:
        client = openai.OpenAI(base_url=f"{second.url}/v1", api_key="any", max_retries=0)
        assert [one.id for one in client.batches.list(limit=1)] == [batch.id]
        done = ended(client, batch.id)
        out = read(client, done.output_file_id)
        assert [line["custom_id"] for line in out] == [f"line {at}" for at in range(4)]
        # what was answered is not asked again
        assert out[: len(kept)] == kept
        alone = alone_text(second.url, seed=3)
        assert out[3]["response"]["body"]["choices"][0]["text"] == alone
    assert list((tmp_path / "batches").glob("*.answers")) == []


def test_faults_are_told_by_line_and_nothing_is_drawn(client: openai.OpenAI) -> None:
    good = lines(CHAT, {"messages": USER})[0]
    wrong = [
        good,
        good,
        good | {"custom_id": "b", "url": COMPLETIONS},
        good | {"custom_id": "c", "method": "GET"},
        good | {"custom_id": 5},
        {"custom_id": "d", "method": "POST", "url": CHAT},
        good | {"custom_id": "e", "body": good["body"] | {"stream": True}},
    ]
    batch = ended(client, begin(client, wrong).id)
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    # there is an empty line behind each
    assert [(fault.line, fault.code) for fault in batch.errors.data] == [
        (3, "duplicate_custom_id"),
        (5, "mismatched_url"),
        (7, "invalid_method"),
        (9, "invalid_value"),
        (11, "missing_required_parameter"),
        (13, "unsupported_parameter"),
    ]
    assert ended(client, begin(client, [], endpoint=CHAT).id).errors.data[0].code == "empty_file"


def test_what_cannot_be_begun_is_refused(client: openai.OpenAI, server: Any) -> None:
    file = upload(client, lines(CHAT, {"messages": USER}))
    asked: dict[str, Any] = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    for wrong, param in (
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"completion_window": "soon"}, "completion_window"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.batches.create(**asked | wrong)
        assert refused.value.param == param
    with pytest.raises(openai.NotFoundError):
        client.batches.create(**asked | {"input_file_id": "file-other"})
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=b"x", purpose="vision")
    assert refused.value.param == "purpose"
    files = server.url + "/v1/files"
    for sent, status in (
        ({"json": {}}, 400),
        ({"files": {"other": b"x"}, "data": {"purpose": "batch"}}, 400),
        ({"content": b"--", "headers": {"content-type": "multipart/form-data"}}, 400),
        ({"files": {"file": b"x"}, "data": {"purpose": "batch", "expires_after[seconds]": "5"}}, 400),
    ):
        answer = httpx.post(files, **sent)  # type: ignore[arg-type]
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")
    for path in ("/v1/files?limit=0", "/v1/files?after=x", "/v1/files?order=up", "/v1/batches?limit=101"):
        assert httpx.get(server.url + path).status_code == 400


def test_files_are_bounded_listed_and_their_owners_alone(tmp_path: Path, open_server: Any) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-alice alice\nsk-bob bob\n")
    settings = Settings(
        models={"tiny": "echo"},
        force_echo=True,
        api_keys_file=str(keys),
        batch_directory=str(tmp_path / "batches"),
        batch_bytes=1200,
    )
    with open_server(settings) as echo:
        alice, bob = (
            openai.OpenAI(base_url=f"{echo.url}/v1", api_key=f"sk-{name}", max_retries=0)
            for name in ("alice", "bob")
        )
        first = alice.files.create(
            file=("a.jsonl", json.dumps(lines(COMPLETIONS, {"prompt": "x"})[0]).encode()),
            purpose="batch",
            expires_after={"anchor": "created_at", "seconds": 3600},
        )
        assert first.expires_at == first.created_at + 3600
        second = alice.files.create(file=("b.jsonl", b"y" * 200), purpose="batch")
        assert [file.id for file in alice.files.list(limit=1)] == [second.id, first.id]
        assert list(bob.files.list()) == [] == list(bob.batches.list())
        for ask in (bob.files.retrieve, bob.files.delete, bob.files.content):
            with pytest.raises(openai.NotFoundError):
                ask(first.id)
        with pytest.raises(openai.APIStatusError) as full:
            alice.files.create(file=("c.jsonl", b"z" * 5000), purpose="batch")
        assert (full.value.status_code, full.value.code) == (413, "storage_full")
        made = {
            "input_file_id": first.id,
            "endpoint": COMPLETIONS,
            "completion_window": "24h",
        }
        with pytest.raises(openai.NotFoundError):
            bob.batches.create(**made)  # type: ignore[arg-type]
        batch = ended(alice, alice.batches.create(**made).id)  # type: ignore[arg-type]
        assert batch.status == "completed"
        for ask in (bob.batches.retrieve, bob.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                ask(batch.id)
        with pytest.raises(openai.NotFoundError):
            bob.files.content(batch.output_file_id)
        # answers take room too: where there is none, the batch says so and loses nothing
        alice.files.delete(batch.output_file_id)
        alice.files.create(file=("d.jsonl", b"z" * 700), purpose="batch")
        failed = ended(alice, alice.batches.create(**made).id)  # type: ignore[arg-type]
        assert (failed.status, failed.errors.data[0].code) == ("failed", "storage_full")
        assert read(alice, failed.error_file_id)[0]["error"]["code"] == "batch_failed"
        assert (tmp_path / "batches" / "files").stat().st_mode & 0o077 == 0


def test_a_folder_that_cannot_be_used_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot be used"):
        create_app(Settings(models={"m": "m"}, batch_directory=str(tmp_path / "file" / "below")))
