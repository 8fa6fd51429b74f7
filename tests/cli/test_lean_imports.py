"""What a serving process leaves out of its imports stays out through a start, and is real once it is asked for."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from myserve.cli import lean_imports
from myserve.cli.lean_imports import _OF_NUMBERS, _of_numbers

HEAVY = ("sympy.core", "torch._dynamo.convert_frame", "torch.distributed.tensor", "scipy.optimize._optimize")
LOAD = """
import sys
from myserve.cli import lean_imports
if {lean}:
    lean_imports.begin()
from myserve.embedded import embedded_model_path
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine
engine = Engine.from_pretrained(str(embedded_model_path()), EngineConfig(kv_cache_bytes=1 << 26))
print(*[name for name in {heavy!r} if name in sys.modules])
engine.shutdown()
"""
USES = """
import torch
from transformers.loss.loss_for_object_detection import linear_sum_assignment
from torch.fx.experimental.symbolic_shapes import ShapeEnv
import sympy
print(linear_sum_assignment([[1, 2], [3, 0]])[1].tolist())
print(torch.compile(lambda x: x + 1, backend="eager", fullgraph=True)(torch.ones(2)).tolist())
print(sympy.Symbol("x") + 1, isinstance(sympy.Symbol("x"), sympy.Basic), ShapeEnv().num_deferred_runtime_asserts)
"""


def run(code: str, cache: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_start_imports_nothing_that_it_does_not_use(tmp_path: Path) -> None:
    assert run(LOAD.format(lean=True, heavy=HEAVY), tmp_path) == [""]


@pytest.mark.thorough
def test_control_a_plain_start_imports_them(tmp_path: Path) -> None:
    # SciPy where it is installed
    assert run(LOAD.format(lean=False, heavy=HEAVY), tmp_path)[0].split()[:3] == list(HEAVY[:3])


def test_what_was_left_out_is_real_when_it_is_used(tmp_path: Path) -> None:
    begin = "from myserve.cli import lean_imports; lean_imports.begin()\n"
    assert run(begin + USES, tmp_path) == ["[0, 1]", "[2.0, 2.0]", "x + 1 True 0"]


NAMES = """
from myserve.cli import lean_imports
{begin}
import transformers, transformers.models
print(sorted(map(repr, transformers._class_to_module.items())) if hasattr(transformers, "_class_to_module") else 0)
print(len(dir(transformers)), len(dir(transformers.models)))
"""


def test_the_names_of_models_are_kept_and_read_again(tmp_path: Path) -> None:
    plain = run(NAMES.format(begin=""), tmp_path)
    assert not (tmp_path / "myserve").exists()
    lean = NAMES.format(begin="lean_imports.begin()")
    assert run(lean, tmp_path) == plain  # written
    kept = sorted((tmp_path / "myserve").iterdir())
    assert [file.name.split("-")[1] for file in kept] == ["None", "models"]
    assert run(lean, tmp_path) == plain  # read
    for file in kept:
        file.write_bytes(file.read_bytes()[:1000])
    assert run(lean, tmp_path) == plain  # cut short: made anew
    assert all(file.stat().st_size > 1000 for file in kept)


@pytest.mark.thorough
def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "myserve").touch()
    lean = NAMES.format(begin="lean_imports.begin()")
    assert run(lean, tmp_path) == run(NAMES.format(begin=""), tmp_path)


NUMBERS = (True, False, 0, 1, 3)


@pytest.mark.filterwarnings("ignore:guard_size_oblivious will be removed:FutureWarning")
@pytest.mark.parametrize("name", _OF_NUMBERS)
def test_of_numbers_the_answers_are_those_of_pytorch(name: str) -> None:
    from torch.fx.experimental import symbolic_shapes

    own = getattr(symbolic_shapes, name)
    asked: list[tuple[object, ...]] = [(value,) for value in NUMBERS]
    if name.startswith("sym_"):
        asked = [
            *itertools.product(NUMBERS, NUMBERS),
            *itertools.product([(1, 2), [1, 2], (1, 3), ()], repeat=2),
        ]
        asked = [pair for pair in asked if name == "sym_eq" or not isinstance(pair[0], (tuple, list))]
    for values in asked:
        try:
            expected = own(*values)
        except AssertionError:  # an int where a bool belongs: nothing is promised
            continue
        assert _of_numbers(name)(*values) == expected, values


@pytest.mark.parametrize("versions", [{"torch": "9."}, {"transformers": "9."}, {"no-such-package": "1."}])
def test_other_versions_are_imported_whole(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    """What it changes was read in two versions: with others it stands aside."""
    assert lean_imports._are_known()
    monkeypatch.setattr(lean_imports, "KNOWN", lean_imports.KNOWN | versions)
    assert not lean_imports._are_known()
