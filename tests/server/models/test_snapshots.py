"""An identity is a folder inside the operator's directory, whatever it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from myserve.errors import RequestError
from myserve.server.models.snapshots import Snapshots, snapshot_folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    inside = tmp_path / "weights"
    (inside / "step-7" / "deep").mkdir(parents=True)
    (tmp_path / "weights-of-others").mkdir()
    (inside / "link").symlink_to(tmp_path / "weights-of-others")
    return inside


@pytest.mark.parametrize(
    "identity", ["step-7", "step-7/deep", "./step-7", "step-7/../step-7", "not/there/yet"]
)
def test_what_is_inside_is_found(root: Path, identity: str) -> None:
    assert snapshot_folder(str(root), identity).is_relative_to(root)


@pytest.mark.parametrize(
    "identity",
    ["", ".", "..", "../weights-of-others", "link", "/etc", "step-7/../..", "a\0b", "../weights"],
)
def test_what_is_not_inside_is_refused(root: Path, identity: str) -> None:
    with pytest.raises(RequestError) as caught:
        snapshot_folder(str(root), identity)
    assert caught.value.code == "bad_snapshot" and len(str(caught.value)) < 400


def test_without_a_directory_nothing_is_taken() -> None:
    with pytest.raises(RequestError, match="--weights-dir"):
        snapshot_folder(None, "step-7")


def test_a_model_starts_without_a_snapshot() -> None:
    snapshots = Snapshots()
    assert (snapshots.identity, snapshots.newest_identity, snapshots.checksum) == (None, None, None)
    assert snapshots.loading_state() == {"stage": "idle", "target_snapshot_identity": None}
