"""A conversation asks what it was told to, and its file gives it back whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from myserve.cli.chat.session import ChatSession, ChatSessionError


def test_a_file_gives_all_of_it_back_and_is_its_owner_s_alone(tmp_path: Path) -> None:
    talk = ChatSession("m", system="Be brief.")
    talk.set("seed", "7")
    talk.set("temperature", "0")
    talk.ask("naïve 你好")
    talk.answered("Hi")
    talk.save(tmp_path / "talk.json")
    again = ChatSession("other")
    again.load(tmp_path / "talk.json")
    assert again == talk
    assert again.body()["seed"] == 7 and "logprobs" not in again.body()
    assert (tmp_path / "talk.json").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "change",
    [
        {"format": "x"},
        {"messages": [{"role": "system", "content": "x"}]},
        {"options": {"n": 5}},
        {"model": None},
    ],
)
def test_what_is_no_session_changes_nothing(tmp_path: Path, change: dict[str, object]) -> None:
    ChatSession("m").save(tmp_path / "talk.json")
    written = json.loads((tmp_path / "talk.json").read_text())
    (tmp_path / "talk.json").write_text(json.dumps(written | change))
    talk = ChatSession("mine", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(ChatSessionError, match="no session of a chat"):
        talk.load(tmp_path / "talk.json")
    assert (talk.model, len(talk.messages)) == ("mine", 1)
    with pytest.raises(ChatSessionError, match="cannot be read"):
        talk.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("name", "text"), [("seed", "1.5"), ("temperature", "hot"), ("top_p", "nan"), ("top_k", "")]
)
def test_an_option_that_cannot_be_is_refused(name: str, text: str) -> None:
    talk = ChatSession("m")
    with pytest.raises(ChatSessionError, match=name):
        talk.set(name, text)
    talk.set(name, "1")
    talk.set(name, "off")
    assert talk.options == {}
