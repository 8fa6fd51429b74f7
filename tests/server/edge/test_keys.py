"""A key is good when it is a line of the file as it is now; nearly a key is none."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from myserve.errors import RequestError
from myserve.server.edge.keys import KeyFile


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("# who may ask\nsk-alice alice\nsk-bob  # bob's\n")
    return file


@pytest.mark.parametrize("key", ["", "sk-alic", "sk-alicee", "alice", "SK-ALICE", "sk-älice", "#"])
def test_nearly_a_key_is_none(keys: Path, key: str) -> None:
    assert KeyFile(keys).owner(key) is None


def test_owners_are_named_or_numbered(keys: Path) -> None:
    assert [KeyFile(keys).owner(key) for key in ("sk-alice", "sk-bob")] == ["alice", "key 2"]


def test_a_change_counts_from_the_next_question_and_a_bad_one_not_at_all(
    keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = KeyFile(keys)
    keys.write_text("sk-new carol\n")
    assert (file.owner("sk-new"), file.owner("sk-alice")) == ("carol", None)
    for bad in ("# none\n", ""):
        keys.write_text(bad)
        assert file.owner("sk-new") == "carol"
    keys.write_bytes(b"\xff\xfe sk")
    assert file.owner("sk-new") == "carol"
    keys.unlink()
    assert file.owner("sk-new") == "carol"
    assert all(record.levelno == logging.ERROR for record in caplog.records) and "sk-" not in caplog.text


def test_a_file_that_is_not_there_or_empty_is_an_error(tmp_path: Path) -> None:
    for text, words in ((None, "cannot be read"), ("\n#\n", "has no keys")):
        if text is not None:
            (tmp_path / "keys").write_text(text)
        with pytest.raises(RequestError, match=words):
            KeyFile(tmp_path / "keys")
