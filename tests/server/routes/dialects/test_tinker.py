"""Tinker's API over a socket, with bodies as its client 0.38 sends them, read by Google's protobuf library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from myserve.server.routes.dialects import promises, tinker
from myserve.server.settings import Settings
from myserve.wire.dialects.paths import TINKER_TRAINING
from myserve.wire.dialects.tinker import TinkerSampling
from wire.dialects.tinker_messages import SampleResponse

IDS = [5, 6, 7, 8, 9, 10]
PROTOBUF = {"accept": "application/x-protobuf"}


class Session:
    """A sampling session, as `ServiceClient` and `SamplingClient` make and use it."""

    def __init__(self, url: str, key: str = "tml-any") -> None:
        self.http = httpx.Client(base_url=url + "/api/v1", headers={"x-api-key": key}, timeout=60)
        session = self.ask(
            "/create_session", type="create_session", tags=[], user_metadata={}, sdk_version="0"
        )
        asked = {"session_id": session["session_id"], "sampling_session_seq_id": 0, "base_model": "tiny"}
        self.id: str = self.ask("/create_sampling_session", **asked)["sampling_session_id"]
        self.seq_id = 0

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def ask(self, path: str, status: int = 200, **body: Any) -> Any:
        answer = self.http.post(path, json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    def begin(
        self, status: int = 200, ids: Sequence[int] = IDS, seq_id: int | None = None, **fields: Any
    ) -> Any:
        self.seq_id += 1
        sampling = {
            "max_tokens": 8,
            "temperature": 1.0,
            "top_k": -1,
            "top_p": 1.0,
            **fields.pop("sampling", {}),
        }
        return self.ask(
            "/asample",
            status,
            sampling_session_id=self.id,
            seq_id=self.seq_id if seq_id is None else seq_id,
            num_samples=fields.pop("num_samples", 1),
            prompt={"chunks": [{"type": "encoded_text", "tokens": list(ids)}]},
            sampling_params=sampling,
            type="sample",
            **fields,
        )

    def fetch(self, promise: dict[str, Any], status: int = 200) -> httpx.Response:
        asked = {"request_id": promise["request_id"], "allow_metadata_only": True}
        answer = self.http.post("/retrieve_future", json=asked, headers=PROTOBUF)
        assert answer.status_code == status, answer.text
        return answer

    def sample(self, **fields: Any) -> Any:
        answer = self.fetch(self.begin(**fields))
        assert answer.headers["content-type"] == "application/x-protobuf"
        return SampleResponse.FromString(answer.content)


@pytest.fixture(scope="module")
def session(server: Any) -> Iterator[Session]:
    with Session(server.url) as made:
        yield made


@pytest.fixture
def own_session(own: Any) -> Iterator[Session]:
    with Session(own.url) as made:
        yield made


def ours(server: Any, **fields: Any) -> Any:
    body = {"model": "tiny", "prompt": IDS, "max_tokens": 8, "logprobs": True, "return_token_ids": True}
    answer = httpx.post(server.url + "/v1/completions", json=body | fields, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def ints(raw: bytes) -> list[int]:
    return np.frombuffer(raw, "<i4").tolist()  # type: ignore[no-any-return]


def floats(raw: bytes) -> list[float]:
    return np.frombuffer(raw, "<f4").tolist()  # type: ignore[no-any-return]


def float32(values: Sequence[float]) -> list[float]:
    return np.asarray(values, "<f4").tolist()  # type: ignore[no-any-return]


def pairs(topk: Any, at: int) -> list[tuple[int, float]]:
    found = list(zip(ints(topk.token_ids), floats(topk.logprobs), strict=True))[
        topk.k * at : topk.k * (at + 1)
    ]
    return [(token_id, value) for token_id, value in found if value != -99999.0]


def test_samples_are_those_of_our_own_routes(server: Any, session: Session) -> None:
    asked = {"seed": 3, "temperature": 0.8, "top_p": 0.9}
    promise = session.begin(num_samples=2, topk_sample_logprobs=3, sampling=asked)
    answer = SampleResponse.FromString(session.fetch(promise).content)
    choices = ours(server, n=2, top_logprobs=3, logprobs_mode="processed", **asked)
    for sequence, choice in zip(answer.sequences, choices, strict=True):
        entries = choice["logprobs"]["content"]
        assert ints(sequence.tokens) == choice["token_ids"]
        assert floats(sequence.logprobs) == float32([entry["sampling_logprob"] for entry in entries])
        for at, entry in enumerate(entries):
            listed = [(top["token_id"], float32([top["logprob"]])[0]) for top in entry["top_logprobs"]]
            assert pairs(sequence.topk_sampled_logprobs, at) == listed
        assert sequence.stop_reason == 1
    assert session.fetch(promise).content == session.fetch(promise).content  # as often as a client loses it


def test_a_sequence_s_id_says_how_to_draw_it_again(server: Any, session: Session) -> None:
    promise = session.begin(num_samples=2)
    answer = SampleResponse.FromString(session.fetch(promise).content)
    for sequence, name in zip(answer.sequences, promise["sample_sequence_ids"], strict=True):
        seed, index = name.split(":seed:")[1].split(":")
        again = ours(server, seed=int(seed), sample_index=int(index))
        assert ints(sequence.tokens) == again[0]["token_ids"]
    (one, two) = answer.sequences
    assert ints(one.tokens) != ints(two.tokens)


def test_a_prompt_is_scored_whole_or_its_end(server: Any, session: Session) -> None:
    (choice,) = ours(server, prompt_logprobs=3, max_tokens=1)
    whole = choice["prompt_logprobs"]
    for last_n in (None, 1, 2, 5):
        asked = {} if last_n is None else {"prompt_logprobs_last_n": last_n}
        answer = session.sample(
            prompt_logprobs=True, topk_prompt_logprobs=3, sampling={"max_tokens": 1}, **asked
        )
        logprobs = floats(answer.prompt_logprobs)
        assert len(logprobs) == answer.topk_prompt_logprobs.length == len(IDS)
        for at, token_id in enumerate(IDS):
            if at < len(IDS) - (last_n or 5):
                assert np.isnan(logprobs[at]) and pairs(answer.topk_prompt_logprobs, at) == []
                continue
            entry = whole[at]
            assert [logprobs[at]] == float32([entry[str(token_id)]["logprob"]])
            best = sorted((each["rank"], int(i), each["logprob"]) for i, each in entry.items())[:3]
            listed = pairs(answer.topk_prompt_logprobs, at)
            assert listed == [(i, float32([value])[0]) for _, i, value in best]


def test_named_ids_are_scored_where_they_are_named(server: Any, session: Session) -> None:
    """Dense and sparse, with cells that name nothing; beside them the last token's own logprob alone."""
    (choice,) = ours(server, prompt_logprobs=384, max_tokens=1)
    cells = [[-1, -1], [-1, -1], [-1, 9], [11, 12], [0, -1]]
    dense = {"data": [each for line in cells for each in line], "dtype": "int64", "shape": [5, 2]}
    listed = [
        (row, col, each) for row, line in enumerate(cells) for col, each in enumerate(line) if each >= 0
    ]
    sparse = {
        "data": [each for _, _, each in listed],
        "dtype": "int64",
        "shape": [5, 2],
        "sparse_crow_indices": [0, 0, 0, 1, 3, 4],
        "sparse_col_indices": [col for _, col, _ in listed],
    }
    expected = float32([choice["prompt_logprobs"][row + 1][str(i)]["logprob"] for row, _, i in listed])
    one = {"prompt_logprobs": True, "prompt_logprobs_last_n": 1, "sampling": {"max_tokens": 1}}
    answer = session.sample(target_prompt_logprobs=dense, **one)
    target = answer.target_prompt_logprobs
    values = floats(target.dense)
    assert (list(target.shape), target.dtype, len(values)) == ([5, 2], 1, 10)
    assert [values[2 * row + col] for row, col, _ in listed] == expected
    assert [value for value, each in zip(values, dense["data"], strict=True) if each < 0] == [0.0] * 6
    assert np.isnan(floats(answer.prompt_logprobs)).tolist() == [True] * 5 + [False]
    csr = session.sample(target_prompt_logprobs=sparse).target_prompt_logprobs.sparse_csr
    assert floats(csr.values) == expected
    assert np.frombuffer(csr.crow_indices, "<i8").tolist() == sparse["sparse_crow_indices"]
    assert np.frombuffer(csr.col_indices, "<i8").tolist() == sparse["sparse_col_indices"]


def test_what_stops_a_sample_is_among_its_tokens(session: Session) -> None:
    drawn = ints(session.sample(sampling={"seed": 3}).sequences[0].tokens)
    at = next(i for i, each in enumerate(drawn) if i and each not in drawn[:i])
    (stopped,) = session.sample(sampling={"seed": 3, "stop": [drawn[at]]}).sequences
    assert (ints(stopped.tokens), stopped.stop_reason) == (drawn[: at + 1], 0)
    assert TinkerSampling(stop=()).ignores_eos and not TinkerSampling(stop=None).ignores_eos
    assert TinkerSampling(stop="x").stop_strings == ("x",)


def test_what_is_asked_wrongly_is_said_in_detail(session: Session) -> None:
    target = {"data": [1], "dtype": "int64", "shape": [5, 1]}
    for fields, named in [
        ({"sampling": {"temperature": -1.0}}, "temperature"),
        ({"sampling": {"stop": ["a"] * 17}}, "stop"),
        ({"num_samples": 0}, "num_samples"),
        ({"ids": []}, "prompt"),
        ({"ids": [10**6]}, "1000000"),
        ({"prompt_alt_tokens_k": 2}, "prompt_alt_tokens_k"),
        ({"prompt_logprobs_last_n": 1}, "prompt_logprobs"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 6}, "[1, 5]"),
        ({"topk_sample_logprobs": 1000}, "topk_sample_logprobs"),
        ({"target_prompt_logprobs": target}, "target_prompt_logprobs"),
        ({"target_prompt_logprobs": target | {"data": [10**6] * 5}}, "target_prompt_logprobs names"),
        ({"target_prompt_logprobs": target | {"data": [-1] * 5}}, "at least one id"),
        ({"target_prompt_logprobs": target | {"shape": [4, 1]}}, "[5, K]"),
    ]:
        body = session.begin(400, **fields)
        assert named in body["detail"] and body["error"]["message"] == body["detail"], fields
    image = {"chunks": [{"type": "image", "data": "", "format": "png"}]}
    asked = {"sampling_session_id": session.id, "seq_id": 10**6, "sampling_params": {}}
    assert "image" in session.ask("/asample", 400, prompt=image, **asked)["detail"]
    prompt = {"chunks": [{"type": "encoded_text", "tokens": IDS}]}
    elsewhere = asked | {"sampling_session_id": "no:such:one"}
    assert "sampling session" in session.ask("/asample", 400, prompt=prompt, **elsewhere)["detail"]
    unserved = {"session_id": "s", "sampling_session_seq_id": 0, "base_model": "other"}
    assert "served" in session.ask("/create_sampling_session", 404, **unserved)["detail"]
    path = unserved | {"base_model": None, "model_path": "tinker://tiny"}
    assert session.ask("/create_sampling_session", **path)["sampling_session_id"].startswith("s:sample:0:")


def test_training_is_refused_and_says_so(session: Session) -> None:
    for path in TINKER_TRAINING:
        body = session.ask(path.removeprefix("/api/v1"), 400, model_id="x")
        assert "samples and does not train" in body["detail"]


def test_the_client_s_other_questions(session: Session) -> None:
    assert session.ask("/client/config", sdk_version="0.38.0") == {"sample_cancel_enabled": True}
    assert session.ask("/telemetry", events=[])["status"] == "accepted"
    assert session.ask("/session_heartbeat", session_id="s")["type"] == "session_heartbeat"
    assert session.ask("/join_sampling_session", sampling_session_id=session.id)["client_counter"] > 0
    sampler = session.http.get(f"/samplers/{session.id}").json()
    assert sampler == {"sampler_id": session.id, "base_model": "tiny", "model_path": None}
    assert session.http.get("/healthz").json() == {"status": "ok"}
    models = session.http.get("/get_server_capabilities").json()["supported_models"]
    assert models[0]["model_name"] == "tiny" and models[0]["sampleable"] and not models[0]["trainable"]
    assert session.http.post("/sessions/s/finish", json={}).status_code == 200


def pause(server: Any, mode: str = "keep", key: str = "any") -> None:
    headers = {"authorization": f"Bearer {key}"}
    httpx.post(server.url + "/pause", params={"mode": mode}, headers=headers).raise_for_status()


def resume(server: Any) -> None:
    httpx.post(server.url + "/resume").raise_for_status()


Wait = Callable[[Callable[[], bool]], None]


def test_promises_wait_break_and_are_forgotten(
    own: Any, own_session: Session, monkeypatch: pytest.MonkeyPatch, wait_until: Wait
) -> None:
    monkeypatch.setattr(tinker, "HOLD_SECONDS", 0.02)
    session, in_flight = own_session, own.model("tiny").in_flight
    held = own.app.state.promises
    pause(own)
    first = session.begin(sampling={"seed": 3})
    name = first["request_id"]
    assert session.fetch(first).json() == {"type": "try_again", "request_id": name, "queue_state": "active"}
    # sent again, it is the same promise; another request may not have its number
    assert session.begin(sampling={"seed": 3}, seq_id=session.seq_id) == first and len(in_flight) == 1
    assert "seq_id" in session.begin(400, sampling={"seed": 4}, seq_id=1)["detail"]
    resume(own)
    wait_until(lambda: session.fetch(first).headers["content-type"] == "application/x-protobuf")
    # given up by the client
    pause(own)
    second = session.begin()
    session.ask("/cancel_future", request_id=second["request_id"])
    wait_until(lambda: len(in_flight) == 0)
    assert "no promise" in session.fetch(second, 410).json()["detail"]
    # ended by a control plane: the client draws it again
    third = session.begin()
    pause(own, "abort")
    assert "aborted" in session.fetch(third, 410).json()["detail"] and len(held) == 1
    # asked for by nobody
    monkeypatch.setattr(promises, "UNASKED_SECONDS", 0.05)
    session.begin()
    wait_until(lambda: len(in_flight) == 0 and len(held) == 1)
    resume(own)


def test_results_are_bounded_and_fetched_ones_go_first(
    own: Any, own_session: Session, monkeypatch: pytest.MonkeyPatch, wait_until: Wait
) -> None:
    session = own_session
    monkeypatch.setattr(promises, "MOST_BYTES", 1)
    first = session.begin()
    wait_until(lambda: own.app.state.promises._num_bytes > 0)
    assert "fetch" in session.begin(429)["detail"]
    session.fetch(first)
    second = session.begin()
    session.fetch(first, 410)
    assert session.fetch(second).content


def test_a_promise_is_its_owner_s_alone(open_server: Any, weights_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("tml-a alice\ntml-b bob\n")
    (tmp_path / "admins").write_text("tml-c carol\n")
    settings = Settings(
        models={"tiny": str(weights_dir / "0")},
        api_keys_file=str(tmp_path / "keys"),
        admin_keys_file=str(tmp_path / "admins"),
        request_timeout=0.5,
    )
    with (
        open_server(settings) as server,
        Session(server.url, "tml-a") as alice,
        Session(server.url, "tml-b") as bob,
    ):
        promise = alice.begin()
        assert bob.fetch(promise, 410) and alice.fetch(promise).content
        assert httpx.get(server.url + "/api/v1/healthz").status_code == 200
        assert httpx.post(server.url + "/api/v1/create_session", json={}).status_code == 401
        # what fails after it was promised fails as an answer: an engine that pauses is never done
        server.model("tiny").in_flight._timeout = 0.05
        pause(server, key="tml-c")
        failed = alice.fetch(alice.begin(sampling={"max_tokens": 450})).json()
        assert failed["category"] == "server" and "not done after" in failed["error"]
