"""Each command does what /help says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from myserve.cli.chat.session import ChatSession, ChatSessionError
from myserve.cli.chat.slash_commands import COMMANDS, Desk, run_command


@pytest.fixture
def desk() -> Desk:
    talk = ChatSession("m", system="Be brief.")
    for question in ("one", "two"):
        talk.ask(question)
        talk.answered(question.upper())
    return Desk(talk)


def test_a_question_is_taken_back_or_answered_again(desk: Desk) -> None:
    assert run_command(desk, "/undo").words == "taken back: two"
    again = run_command(desk, "/retry")
    assert again.draws and desk.talk.messages == [{"role": "user", "content": "one"}]
    desk.talk.answered("ONE")
    run_command(desk, "/seed 5")
    assert run_command(desk, "/retry").draws and desk.talk.options == {"seed": 6}
    assert run_command(desk, "/retry 9").draws and desk.talk.options == {"seed": 9}
    run_command(desk, "/reset")
    assert not run_command(desk, "/retry").draws and desk.talk.messages == []
    assert "nothing" in run_command(desk, "/undo").words


def test_options_are_set_shown_and_left_to_the_server(desk: Desk) -> None:
    desk.seeds.append(77)
    assert run_command(desk, "/seed").words == "seed off; the last answer had 77"
    for line in ("/temperature 0.5", "/top_k 3", "/max_tokens 9", "/system Be rude.", "/model other"):
        run_command(desk, line)
    assert desk.talk.body()["temperature"] == 0.5 and desk.talk.body()["top_k"] == 3
    assert desk.talk.body()["messages"][0] == {"role": "system", "content": "Be rude."}
    assert "max_tokens 9" in run_command(desk, "/show").words
    run_command(desk, "/temperature off")
    run_command(desk, "/system off")
    assert "temperature" not in desk.talk.body() and desk.talk.body()["messages"][0]["role"] == "user"
    run_command(desk, "/probs")
    assert desk.talk.body()["top_logprobs"] == 5
    assert run_command(desk, "/alternatives").shows_alternatives
    with pytest.raises(ChatSessionError, match="on or off"):
        run_command(desk, "/probs maybe")


def test_a_conversation_is_saved_and_loaded(desk: Desk, tmp_path: Path) -> None:
    with pytest.raises(ChatSessionError, match="needs a file"):
        run_command(desk, "/save")
    run_command(desk, f"/save {tmp_path / 'talk.json'}")
    other = Desk(ChatSession("x"))
    assert "4 messages" in run_command(other, f"/load {tmp_path / 'talk.json'}").words
    assert other.talk.messages == desk.talk.messages and other.path == desk.path


def test_help_has_every_command_and_others_are_refused(desk: Desk) -> None:
    words = run_command(desk, "/help").words
    assert all(f"/{name}" in words for name in COMMANDS)
    assert run_command(desk, "/quit").ends
    with pytest.raises(ChatSessionError, match="/help lists them"):
        run_command(desk, "/hlep")
