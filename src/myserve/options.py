"""Each option is declared once, as a dataclass field that carries its help, its range and its names.

From that declaration come the command line, the environment variables, the keys of a configuration file, the checks and
`docs/configuration.md`. Nothing here imports more than the standard library.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from myserve.errors import RequestError

__all__ = ["Option", "Source", "bytes_from", "check_options", "option", "options_of", "read_options"]

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_BYTE_UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000 ** (power + 1) for power, letter in enumerate("KMGT")},
    **{f"{letter}iB": 1024 ** (power + 1) for power, letter in enumerate("KMGT")},
}
_BYTES = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?i?B)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option: what it is called everywhere, what values it takes and what it does."""

    name: str  # the field's
    kind: type  # bool, int, float or str
    is_list: bool
    default: Any
    help: str
    group: str
    unset: str  # what happens where the default is None, or an empty list
    choices: tuple[str, ...]
    at_least: float | None
    above: float | None
    at_most: float | None
    is_bytes: bool
    other_variable: str  # an older name of the variable
    other_flag: str  # an older name of the flag

    @property
    def flag(self) -> str:
        """Return the option as it stands on the command line."""
        return "--" + self.key

    @property
    def key(self) -> str:
        """Return the option as it stands in a configuration file."""
        return self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """Return the environment variable."""
        return "MYSERVE_" + self.name.upper()

    @property
    def metavar(self) -> str:
        """Return what stands for a value in the help."""
        return "BYTES" if self.is_bytes else {bool: "", int: "INT", float: "NUMBER", str: "TEXT"}[self.kind]

    @property
    def range(self) -> str:
        """Return the values that it takes, in words; "" where any will do.

        >>> from myserve.engine.config import EngineConfig
        >>> [options_of(EngineConfig)[name].range for name in ("dtype", "kv_cache_share", "device")]
        ['auto, float32, bfloat16 or float16', 'over 0, at most 1', '']
        """
        if self.choices:
            return f"{', '.join(self.choices[:-1])} or {self.choices[-1]}"
        bounds = (("at least", self.at_least), ("over", self.above), ("at most", self.at_most))
        return ", ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)

    @property
    def usual(self) -> str:
        """Return the default, in words."""
        if self.default is None or self.default == ():
            return self.unset
        if isinstance(self.default, bool):
            return "on" if self.default else "off"
        if self.is_list:
            return ", ".join(self.default)
        return _in_units(self.default) if self.is_bytes else str(self.default)

    def parse(self, value: object) -> Any:
        """Return the value of a text, or of what a YAML file gave, checked. Raises RequestError.

        >>> from myserve.engine.config import EngineConfig
        >>> options_of(EngineConfig)["kv_cache_bytes"].parse("2GiB")
        2147483648
        """
        if self.is_list:
            parts = value.split(",") if isinstance(value, str) else value
            if not isinstance(parts, Iterable) or isinstance(parts, bytes | Mapping):
                raise RequestError(f"must be a list, got {value!r}")
            texts = tuple(str(part).strip() for part in parts)
            return tuple(text for text in texts if text)
        parsed = self._parse_one(value)
        self.check(parsed)
        return parsed

    def _parse_one(self, value: object) -> Any:
        if self.kind is bool:
            return _bool_from(value)
        # YAML 1.1 reads a bare on or off as a truth value
        if isinstance(value, bool):
            if (word := "on" if value else "off") in self.choices:
                return word
            raise RequestError(f"must be {_A_KIND[self.kind]}, got {value!r}")
        if self.is_bytes:
            return bytes_from(value)
        try:
            if self.kind is int and isinstance(value, float):
                raise ValueError
            return self.kind(value)
        except (TypeError, ValueError):
            raise RequestError(f"must be {_A_KIND[self.kind]}, got {value!r}") from None

    def check(self, value: Any) -> None:
        """Raise RequestError for a value out of range."""
        if value is None or self.is_list:
            return
        if self.choices and value not in self.choices:
            raise RequestError(f"must be one of {', '.join(self.choices)}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise RequestError(f"must be a finite number, got {value}")
        if self.at_least is not None and not value >= self.at_least:
            raise RequestError(f"must be at least {self.at_least}, got {value}")
        if self.above is not None and not value > self.above:
            raise RequestError(f"must be greater than {self.above}, got {value}")
        if self.at_most is not None and not value <= self.at_most:
            raise RequestError(f"must be at most {self.at_most}, got {value}")


_A_KIND = {int: "an integer", float: "a number", str: "a text"}


def option(
    default: Any,
    help: str,  # the field's own word for it, as in argparse and typer
    *,
    group: str,
    unset: str = "",
    choices: Iterable[str] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    is_bytes: bool = False,
    is_secret: bool = False,
    other_variable: str = "",
    other_flag: str = "",
) -> Any:
    """Declare a dataclass field that is an option.

    `unset` says what happens where the default is None. The kind is the annotation's: bool, int, float, str, a Literal
    of texts or a tuple of texts, each also with None.
    """
    declared = {
        "help": help,
        "group": group,
        "unset": unset,
        "choices": tuple(choices),
        "at_least": at_least,
        "above": above,
        "at_most": at_most,
        "is_bytes": is_bytes,
        "other_variable": other_variable,
        "other_flag": other_flag,
    }
    return dataclasses.field(default=default, repr=not is_secret, metadata={"option": declared})


def options_of(kind: type[Any]) -> Mapping[str, Option]:
    """Return a dataclass' options by the names of their fields, in their order."""
    hints = typing.get_type_hints(kind)
    return {
        field.name: _option(field, hints[field.name])
        for field in dataclasses.fields(kind)
        if "option" in field.metadata
    }


def _option(field: dataclasses.Field[Any], hint: Any) -> Option:
    declared = dict(field.metadata["option"])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = [part for part in typing.get_args(hint) if part is not type(None)]
    origin = typing.get_origin(hint)
    if origin is Literal:
        declared["choices"] = declared["choices"] or typing.get_args(hint)
        hint = str
    is_list = origin is tuple
    if is_list:
        hint = str
    assert hint in (bool, int, float, str), f"{field.name}: no option can be a {hint}"
    return Option(name=field.name, kind=hint, is_list=is_list, default=field.default, **declared)


def check_options(instance: Any) -> None:
    """Raise RequestError, naming the field, where one of a dataclass' options is out of its range.

    A path becomes a text: an option says where something lies in the words of a command line.
    """
    for name, declared in options_of(type(instance)).items():
        if isinstance(value := getattr(instance, name), os.PathLike):
            object.__setattr__(instance, name, os.fspath(value))
        try:
            declared.check(getattr(instance, name))
        except RequestError as error:
            raise RequestError(f"{name} {error}", param=name) from None


@dataclass(frozen=True, slots=True)
class Source:
    """Hold one source of values: their raw values by field name, and what a field is called there."""

    values: Mapping[str, object]
    called: Mapping[str, str]

    @classmethod
    def command_line(cls, values: Mapping[str, object], options: Mapping[str, Option]) -> Source:
        """Take what the command line gave; None is what was not given."""
        given = {name: value for name, value in values.items() if value is not None}
        return cls(given, {name: options[name].flag for name in given})

    @classmethod
    def environment(cls, env: Mapping[str, str], options: Mapping[str, Option]) -> Source:
        """Take the environment's variables. An empty one is as good as none, but for a list, which it empties."""
        values: dict[str, object] = {}
        called: dict[str, str] = {}
        for name, declared in options.items():
            for variable in filter(None, (declared.other_variable, declared.variable)):
                if (text := env.get(variable)) is not None and (text.strip() or declared.is_list):
                    values[name], called[name] = text, variable
        return cls(values, called)

    @classmethod
    def file(cls, path: str, values: object, options: Mapping[str, Option]) -> Source:
        """Take a parsed configuration file, whose keys have dashes or underscores. Raises RequestError."""
        if not isinstance(values, Mapping):
            raise RequestError(f"{path}: must hold one mapping from options to values, such as 'port: 8000'")
        by_name: dict[str, object] = {}
        for key, value in values.items():
            name = str(key).replace("-", "_")
            if name not in options:
                close = get_close_matches(name, options, n=1)
                hint = f"; did you mean {options[close[0]].key}?" if close else ""
                raise RequestError(f"{path}: there is no option {key!r}{hint}")
            if value is not None:
                by_name[name] = value
        return cls(by_name, {name: f"{path}: {options[name].key}" for name in by_name})


def read_options(options: Mapping[str, Option], sources: Iterable[Source]) -> dict[str, Any]:
    """Return the checked value of each option that a source gives; the first source that has it counts.

    Raises RequestError, which names the option as its source does.
    """
    found: dict[str, Any] = {}
    for source in sources:
        for name in source.values.keys() & options.keys() - found.keys():
            try:
                found[name] = options[name].parse(source.values[name])
            except RequestError as error:
                raise RequestError(f"{source.called[name]} {error}", param=name) from None
    return found


def bytes_from(value: object) -> int:
    """Return a number of bytes from an integer or a text with a unit. Raises RequestError.

    >>> bytes_from("64MiB"), bytes_from("1.5 GB"), bytes_from(4096)
    (67108864, 1500000000, 4096)
    """
    found = _BYTES.fullmatch(str(value).strip())
    if found is None:
        raise RequestError(f"must be a number of bytes, such as 2GiB, 500MB or 1048576, got {value!r}")
    number, unit = found[1], (found[2] or "").upper().replace("I", "i")
    size: int = _BYTE_UNITS[unit]
    return round(float(number) * size) if "." in number else int(number) * size


def _in_units(count: int) -> str:
    """Return bytes as a whole number of the largest unit, as `bytes_from` reads it."""
    whole = [unit for unit, size in _BYTE_UNITS.items() if unit.endswith("iB") and count % size == 0]
    return f"{count // _BYTE_UNITS[whole[-1]]}{whole[-1]}" if whole else str(count)


def _bool_from(value: object) -> bool:
    word = str(value).strip().lower()
    if word not in _TRUE + _FALSE:
        raise RequestError(f"must be one of {', '.join(_TRUE + _FALSE)}, got {value!r}")
    return word in _TRUE
