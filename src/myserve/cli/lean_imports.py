"""A serving process leaves out of transformers' import what it never uses: half of that import's time.

transformers imports torch's compiler (`torch._dynamo`, and sympy with it) for two decorators and one class, torch's
distributed tensors for what it shards, SciPy for losses of object detection, and reads the source of each of its
models, twice, to know their names. Here the compiler and SciPy become real when something is asked of them, sharding
is left out, and the names are kept in a file. Measured in seconds of CPU (torch's own 1.0 aside): 2.0, and 0.4 with
all of this. For `myserve serve` on a CPU alone: a trainer's process may shard and compile, and imports all as ever.
"""

from __future__ import annotations

import contextlib
import hashlib
import marshal
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, version
from operator import and_, or_
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

__all__ = ["begin"]


# What is left out was found by reading these versions, and is tested with them; others are imported whole.
KNOWN = {"torch": "2.13.", "transformers": "5.23."}


def begin() -> None:
    """Make the imports that come lean, where torch and transformers are known and not imported yet. Idempotent."""
    is_first = not any(isinstance(finder, _LeanFinder) for finder in sys.meta_path)
    if is_first and not KNOWN.keys() & sys.modules.keys() and _are_known():
        sys.meta_path.insert(0, _LeanFinder())


def _are_known() -> bool:
    with contextlib.suppress(PackageNotFoundError):
        return all(version(package).startswith(prefix) for package, prefix in KNOWN.items())
    return False


def _not_marked(fn: Any = None, *_: object, **__: object) -> Any:
    """Return the function as it is: a decorator of `torch.compiler` that marks it for a compiler not imported yet."""
    return fn if fn is not None else _not_marked


def _real(module_name: str) -> Any:
    module = sys.modules[module_name]
    if isinstance(module, _DeferredModule):
        module.become_real()
    return module


def _linear_sum_assignment(*args: Any, **kwargs: Any) -> Any:
    """Call SciPy's, which is imported now."""
    return _real("scipy.optimize").linear_sum_assignment(*args, **kwargs)


def _same(value: Any, *_: Any) -> Any:
    return value


# Functions about sizes that may be symbols, for sizes that are numbers: those that PyTorch's meta kernels call.
_OF_NUMBERS: Mapping[str, Callable[..., Any]] = {
    "expect_true": _same,
    "guard_int": _same,
    "guard_or_false": _same,
    "guard_or_true": _same,
    "guard_size_oblivious": _same,
    "guarding_hint_or_throw": _same,
    "has_guarding_hint": lambda value: True,
    "is_nested_int": lambda value: False,
    "statically_known_true": _same,
    "sym_and": lambda *values: reduce(and_, values),
    "sym_eq": lambda a, b: list(a) == list(b) if isinstance(a, (tuple, list)) else a == b,
    "sym_or": lambda *values: reduce(or_, values),
}


def _is_number(value: Any) -> bool:
    """Return whether this is a number of Python's, or a shape of such."""
    return type(value) in (bool, int) or (isinstance(value, (tuple, list)) and all(map(_is_number, value)))


def _of_numbers(name: str) -> Callable[..., Any]:
    """Return the function of that name, which asks PyTorch's own where a value is no number of Python's."""

    def answer(*values: Any, **named: Any) -> Any:
        if not named and all(map(_is_number, values)):
            return _OF_NUMBERS[name](*values)
        return getattr(_real("torch.fx.experimental.symbolic_shapes"), name)(*values, **named)

    return answer


# What stands in for a module until more is asked of it: its attributes, and the submodules that do without it.
_DEFERRED: Mapping[str, tuple[Mapping[str, Any], frozenset[str]]] = {
    "torch._dynamo": (
        {"disable": _not_marked, "allow_in_graph": _not_marked, "assume_constant_result": _not_marked},
        frozenset({"torch._dynamo._trace_wrapped_higher_order_op"}),
    ),
    "torch.fx.experimental.symbolic_shapes": (
        {name: _of_numbers(name) for name in _OF_NUMBERS},
        frozenset(),
    ),
    # torch asks whether a number is a symbol: none is, before the module is real
    "sympy": ({"Basic": type("Basic", (), {})}, frozenset()),
    "scipy.optimize": ({"linear_sum_assignment": _linear_sum_assignment}, frozenset()),
}


class _LeanFinder(MetaPathFinder):
    """Finds modules where Python does, and gives some of them loaders of ours."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        parent = fullname.rpartition(".")[0]
        if fullname in _DEFERRED:
            return _with_loader(fullname, path, _DeferringLoader)
        if fullname in _CHANGES:
            change = _CHANGES[fullname]
            return _with_loader(fullname, path, lambda real: _ChangingLoader(real, change))
        if parent in _DEFERRED and fullname not in _DEFERRED[parent][1]:
            module = sys.modules.get(parent)
            if isinstance(module, _DeferredModule):
                module.become_real()
        return None


def _with_loader(
    fullname: str, path: Sequence[str] | None, wrap: Callable[[Loader], Loader]
) -> ModuleSpec | None:
    spec = PathFinder.find_spec(fullname, path)
    if spec is not None and spec.loader is not None:
        spec.loader = wrap(spec.loader)
    return spec


class _DeferredModule(ModuleType):
    """A module whose code runs when an attribute is asked for that it does not have yet."""

    _lock = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        # the import system looks for some, and inspection for others: neither is a use
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.become_real()
        return ModuleType.__getattribute__(self, name)

    def become_real(self) -> None:
        """Run the module's own code, once; another thread that needs it waits until it has run."""
        with self._lock:
            if type(self) is not _DeferredModule or "_is_running" in vars(self):
                return
            loader = self.__spec__.loader if self.__spec__ is not None else None
            assert isinstance(loader, _DeferringLoader)
            vars(self)["_is_running"] = True
            for name in _DEFERRED[self.__name__][0]:
                vars(self).pop(name, None)
            try:
                loader.real.exec_module(self)
            finally:
                del vars(self)["_is_running"]
            self.__class__ = ModuleType  # type: ignore[assignment]  # as importlib's own lazy modules do


class _DeferringLoader(Loader):
    """Makes a `_DeferredModule`."""

    def __init__(self, real: Loader) -> None:
        self.real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _DeferredModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(_DEFERRED[module.__name__][0])


class _ChangingLoader(Loader):
    """Loads a module as it is, then changes it."""

    def __init__(self, real: Loader, change: Callable[[Any], None]) -> None:
        self._real, self._change = real, change

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        self._change(module)


def _keep_names_of_models(import_utils: Any) -> None:
    """Read the names of all models from a file where an earlier start has written them; shard nothing."""
    read = import_utils.define_import_structure

    def define_import_structure(module_path: str | Path, prefix: str | None = None) -> Any:
        folder = Path(module_path)
        folder = folder if folder.is_dir() else folder.parent
        if folder.name != "models":  # one model's: a few files
            return read(module_path, prefix=prefix)
        return _kept(f"{prefix}-{_fingerprint(folder)}", lambda: read(module_path, prefix=prefix))

    import_utils.define_import_structure = define_import_structure
    # as a torch that is built without it: no request is served by several processes
    import_utils.is_torch_distributed_available = lambda: False


def _compile_patterns_late(conversion_mapping: Any) -> None:
    """Compile the thousand regular expressions for the weights of all models' old checkpoints when they are used."""
    build = conversion_mapping._build_checkpoint_conversion_mapping

    def build_late() -> Any:
        core = sys.modules["transformers.core_model_loading"]
        vars(core)["re"] = SimpleNamespace(**vars(re) | {"compile": _LatePattern})
        try:
            return build()
        finally:
            vars(core)["re"] = re

    conversion_mapping._build_checkpoint_conversion_mapping = build_late


class _LatePattern:
    """A pattern that is compiled when one of its methods is first asked for."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(re.compile(self._pattern), name)  # `re` keeps those in use


_CHANGES: Mapping[str, Callable[[Any], None]] = {
    "transformers.utils.import_utils": _keep_names_of_models,
    "transformers.conversion_mapping": _compile_patterns_late,
}


def _fingerprint(folder: Path) -> str:
    """Return a digest of the names, sizes and times of all Python files two levels deep."""
    digest = hashlib.sha256(f"{sys.implementation.cache_tag} {folder}".encode())
    for each in sorted(os.scandir(folder), key=lambda entry: entry.name):
        inside = os.scandir(each) if each.is_dir() else [each]
        for file in sorted(inside, key=lambda entry: entry.name):
            if file.name.endswith(".py"):
                facts = file.stat()
                digest.update(f"{file.path} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def _kept(key: str, make: Callable[[], Any]) -> Any:
    """Return what `make` does, read from the file of `key` where an earlier start has written it."""
    file = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "myserve" / f"models-{key}"
    with contextlib.suppress(OSError, EOFError, ValueError, TypeError):
        # marshal and not pickle: reading it runs no code
        return marshal.loads(file.read_bytes())
    value = make()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        for old in file.parent.glob(f"models-{key.partition('-')[0]}-*"):
            old.unlink()
        beside = file.with_name(f".{file.name}-{os.getpid()}")
        beside.write_bytes(marshal.dumps(value))
        beside.replace(file)
    return value
