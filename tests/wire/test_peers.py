"""No field of another server's request passes in silence: each is ours, harmless, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from myserve.errors import RequestError
from myserve.wire.chat import ChatCompletionRequest
from myserve.wire.completions import CompletionRequest
from myserve.wire.dialects.sglang_generate import NativeGenerate, NativeSampling
from myserve.wire.fields import StreamOptions
from myserve.wire.generate import GenerateSampling
from myserve.wire.parse import parse_request
from myserve.wire.peers import HARMLESS, REFUSED
from tools import peer_fields

PEERS = json.loads(peer_fields.DATA.read_text())
KINDS: dict[str, type[BaseModel]] = {
    "chat": ChatCompletionRequest,
    "completions": CompletionRequest,
    "generate": GenerateSampling,
    "native": NativeGenerate,
    "native_sampling": NativeSampling,
    "stream_options": StreamOptions,
}
CASES = [(peer, route) for peer, known in PEERS.items() for route in known["fields"]]
HARMLESS_NAMES = [name for names in HARMLESS.values() for name in names]
WHOLE: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "prompt": "hi"}


def sorted_as(kind: type[BaseModel], name: str) -> list[str]:
    aliases = {field.alias for field in kind.model_fields.values()}
    refused: Any = getattr(kind, "REFUSED", REFUSED)
    harmless = {*HARMLESS_NAMES, *getattr(kind, "HINTS", ())} - refused.keys()
    tables = {"supported": {*kind.model_fields, *aliases}, "harmless": harmless, "refused": refused}
    found = [verdict for verdict, names in tables.items() if name in names]
    # a request's own field is not looked for in the tables, which all routes share
    return found[:1] if found[:1] == ["supported"] else found


@pytest.mark.parametrize(("peer", "route"), CASES)
def test_each_field_of_a_peer_is_sorted(peer: str, route: str) -> None:
    names = PEERS[peer]["fields"][route]
    assert names
    assert {
        name: sorted_as(KINDS[route], name) for name in names if len(sorted_as(KINDS[route], name)) != 1
    } == {}


def test_a_field_that_nobody_sorted_is_found() -> None:
    """The control."""
    assert sorted_as(ChatCompletionRequest, "a_new_field") == []


def test_the_installed_client_has_no_other_fields() -> None:
    """Where this fails: `python tools/peer_fields.py openai`, and sort what is new."""
    for route, names in peer_fields.fields_of_openai().items():
        assert {name for name in names if len(sorted_as(KINDS[route], name)) != 1} == set()
        assert set(names) <= set(PEERS["openai"]["fields"][route])


def test_the_tables_do_not_overlap() -> None:
    assert len(set(HARMLESS_NAMES)) == len(HARMLESS_NAMES)
    assert not set(HARMLESS_NAMES) & REFUSED.keys()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refusal_says_what_to_send_instead(name: str) -> None:
    for kind in (ChatCompletionRequest, CompletionRequest):
        if name in kind.model_fields:
            continue
        for idle in (None, *REFUSED[name].idle):
            parse_request(kind, json.dumps(WHOLE | {name: idle}).encode())
        with pytest.raises(RequestError) as caught:
            parse_request(kind, json.dumps(WHOLE | {name: {"something": 1}}).encode())
        assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")
        assert REFUSED[name].instead in caught.value.message


@pytest.mark.parametrize("name", sorted(HARMLESS_NAMES))
def test_what_is_harmless_passes_where_unknown_fields_do_not(name: str) -> None:
    parse_request(
        ChatCompletionRequest, json.dumps(WHOLE | {name: "x", "prompt": None}).encode(), strict=True
    )


def test_every_harmless_field_is_in_the_docs() -> None:
    told = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    assert [name for name in HARMLESS_NAMES if f"`{name}`" not in told] == []


def test_names_are_read_from_sources() -> None:
    source = "class StreamOptions(B):\n    include_usage: bool = False\n    kinds: ClassVar[int] = 3"
    assert peer_fields.fields_of_class(source, ("StreamOptions",)) == ["include_usage"]
    assert peer_fields.fields_of_cpp('json_value(data,    "n_probs",  d); data.at("lora")') == [
        "lora",
        "n_probs",
    ]
    rust = "pub(crate) struct A {\n    #[serde]\n    pub best_of: Option<usize>,\n    secret: u8,\n}\n"
    assert peer_fields.fields_of_rust(rust, ("A",)) == ["best_of"]
