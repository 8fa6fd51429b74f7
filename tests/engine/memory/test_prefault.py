"""Memory asked for ahead: what is handed out is zeros that nobody else writes, and what is not is given back."""

from __future__ import annotations

import gc
import importlib
import mmap
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from myserve.embedded import embedded_model_path
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
from myserve.engine.memory import huge_pages, prefault
from myserve.engine.memory.prefault import HUGE_PAGE, Reserve
from myserve.errors import UnsupportedModelError
from myserve.server.settings import Settings

serve = importlib.import_module("myserve.cli.serve")  # the package has a command of this name

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nothing is reserved elsewhere")


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def filled(size: int) -> Reserve:
    made = Reserve(size)
    for _ in made.fill():
        pass
    return made


def checkpoint(folder: Path, size: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model-00001-of-00002.safetensors").write_bytes(bytes(size // 2))
    (folder / "model-00002-of-00002.safetensors").write_bytes(bytes(size - size // 2))
    (folder / "consolidated.safetensors").write_bytes(bytes(size))  # the same weights once more: not read
    return str(folder)


@pytest.mark.own_process
def test_what_is_filled_is_there_and_goes_back_piece_by_piece() -> None:
    before = resident()
    made = filled(16 * HUGE_PAGE)
    assert resident() - before > 15 * HUGE_PAGE
    first, second = made.take(4 * HUGE_PAGE - 100), made.take(2 * HUGE_PAGE)
    assert made.give_back() == 10 * HUGE_PAGE
    assert 5 * HUGE_PAGE < resident() - before < 8 * HUGE_PAGE
    del first
    gc.collect()
    assert HUGE_PAGE < resident() - before < 4 * HUGE_PAGE, "the second stays"
    second.raw = b"x" * len(second)
    del second
    assert resident() - before < 2 * HUGE_PAGE


def test_there_is_no_more_than_there_is() -> None:
    made = Reserve(2 * HUGE_PAGE)
    assert made.take(3 * HUGE_PAGE) is None
    one = made.take(HUGE_PAGE + 1)
    assert one is not None and made.take(HUGE_PAGE) is None
    assert made.take(HUGE_PAGE - mmap.PAGESIZE) is not None and made.give_back() == 0
    assert made.take(1) is None


@pytest.mark.parametrize("attempt", range(5))
def test_filling_never_writes_to_what_is_taken(attempt: int) -> None:
    """The control of the waiting in `take`: without it, some attempt finds zeros again."""
    made = Reserve(128 * HUGE_PAGE)
    filling = threading.Thread(target=lambda: [None for _ in made.fill()])
    filling.start()
    pieces = []
    while (piece := made.take(3 * mmap.PAGESIZE)) is not None:
        assert piece.raw == bytes(len(piece))
        piece.raw = b"x" * len(piece)
        pieces.append(piece)
    filling.join()
    assert all(piece.raw == b"x" * len(piece) for piece in pieces)


def test_what_is_given_back_is_filled_no_further() -> None:
    made = Reserve(64 * HUGE_PAGE)
    steps = made.fill()
    next(steps)
    assert made.give_back() == 64 * HUGE_PAGE
    assert list(steps) == []  # and no fault


def test_a_tensor_comes_from_what_was_begun(tmp_path: Path) -> None:
    reserve = prefault.begin(checkpoint(tmp_path, 4 * HUGE_PAGE))
    assert reserve is not None
    one, two, beyond = (huge_pages.zeros((HUGE_PAGE, 2), torch.uint8, reserve) for _ in range(3))
    assert two.data_ptr() == one.data_ptr() + 2 * HUGE_PAGE
    assert not bool(one.any()) and not bool(beyond.any())
    two[:], part = 7, two[-1]
    reserve.give_back()
    del one, two
    assert part.tolist() == [7, 7]


def test_a_hub_id_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--name"
    checkpoint(repository / "snapshots" / "abc", 100)
    assert prefault.checkpoint_files("org/name") == [], "no ref says which snapshot"
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert len(prefault.checkpoint_files("org/name")) == 2


def test_nothing_is_asked_for_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = checkpoint(tmp_path, 4 * HUGE_PAGE)
    monkeypatch.setattr(prefault, "free_host_memory", lambda: 5 * HUGE_PAGE - 1)
    assert prefault.begin(model) is None
    monkeypatch.setattr(prefault, "free_host_memory", lambda: 5 * HUGE_PAGE)
    reserve = prefault.begin(model)
    assert reserve is not None and reserve.take(1) is not None
    reserve.give_back()


def test_a_model_that_does_not_load_leaves_nothing_reserved(tmp_path: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    reserve = prefault.begin(checkpoint(tmp_path, 4 * HUGE_PAGE))
    assert reserve is not None
    with pytest.raises(UnsupportedModelError):
        Engine.from_pretrained(str(tmp_path), reserve=reserve)
    assert reserve.take(1) is None


def test_a_models_weights_are_packed_into_the_reserve_and_the_rest_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    take = Reserve.take
    monkeypatch.setattr(Reserve, "take", lambda self, size: (taken.append(size), take(self, size))[1])
    monkeypatch.setattr(huge_pages, "HUGE_PAGE", 1 << 12)  # the embedded model's weights count as large
    model = str(embedded_model_path())
    reserve = prefault.begin(model)
    assert reserve is not None
    engine = Engine.from_pretrained(model, EngineConfig(num_blocks=8), reserve)
    assert taken and reserve.take(1) is None
    engine.shutdown()


@pytest.mark.parametrize(
    ("settings", "asks"),
    [
        ({}, True),
        ({"engine": EngineConfig(device="cpu")}, True),
        ({"engine": EngineConfig(device="cuda")}, False),
        ({"engine": EngineConfig(dtype="float32")}, False),
        ({"engine": EngineConfig(exact="off")}, False),
        ({"force_echo": True}, False),
        ({"preload": ()}, False),
    ],
)
def test_a_server_asks_for_what_it_will_pack(
    settings: dict[str, object], asks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(prefault, "begin", lambda model, part: asked.append(model))
    monkeypatch.setattr(serve, "has_gpu", lambda: False)
    serve._ask_for_memory(Settings(models={"m": "folder"}, **settings))
    assert asked == (["folder"] if asks else [])


def test_a_gpu_takes_the_weights_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(prefault, "begin", lambda model, part: asked.append(model))
    monkeypatch.setattr(serve, "has_gpu", lambda: True)
    serve._ask_for_memory(Settings(models={"m": "folder"}))
    assert not asked
    serve._ask_for_memory(Settings(models={"m": "folder"}, engine=EngineConfig(device="cpu")))
    assert asked


def test_it_needs_no_torch() -> None:
    code = "import sys, myserve.engine.memory.prefault; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
