"""A declaration is all that an option needs: every source reads it, and names a wrong value in its own way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from myserve.errors import RequestError
from myserve.options import Option, Source, bytes_from, check_options, option, options_of, read_options


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    count: int = option(3, "How many.", group="g", at_least=1, at_most=9)
    share: float = option(0.5, "How much.", group="g", above=0, at_most=1)
    size: int | None = option(None, "How large.", group="g", unset="as it comes", is_bytes=True)
    mode: Literal["on", "off", "auto"] = option("auto", "How.", group="g")
    wide: bool = option(False, "Whether.", group="g", other_variable="WIDE")
    names: tuple[str, ...] = option((), "Which.", group="g")
    secret: str | None = option(None, "What.", group="g", is_secret=True)
    state: int = 0

    def __post_init__(self) -> None:
        check_options(self)


OPTIONS = options_of(Knobs)


def read(**raw: object) -> Knobs:
    return Knobs(**read_options(OPTIONS, [Source.file("f", raw, OPTIONS)]))


def test_a_field_that_is_not_declared_is_no_option() -> None:
    assert list(OPTIONS) == ["count", "share", "size", "mode", "wide", "names", "secret"]


def test_its_names_follow_from_the_fields() -> None:
    assert (OPTIONS["size"].flag, OPTIONS["size"].variable, OPTIONS["size"].key) == (
        "--size",
        "MYSERVE_SIZE",
        "size",
    )


def test_texts_and_yaml_values_are_read_alike() -> None:
    texts = read(count="4", share="0.25", size="2KiB", mode="on", wide="yes", names="a, b,", secret="x")
    values = read(count=4, share=0.25, size=2048, mode=True, wide=True, names=["a", "b"], secret="x")
    assert texts == values == Knobs(
        count=4, share=0.25, size=2048, mode="on", wide=True, names=("a", "b"), secret="x"
    )  # fmt: skip


def test_the_first_source_counts_and_an_unset_one_does_not() -> None:
    sources = [
        Source.command_line({"count": None, "share": "1"}, OPTIONS),
        Source.environment({"MYSERVE_COUNT": "7", "MYSERVE_SHARE": "0.1", "MYSERVE_SIZE": " "}, OPTIONS),
        Source.file("f", {"count": 8, "size": "1MB", "wide": None}, OPTIONS),
    ]
    assert read_options(OPTIONS, sources) == {"share": 1.0, "count": 7, "size": 10**6}


def test_an_empty_variable_empties_a_list() -> None:
    assert read_options(OPTIONS, [Source.environment({"MYSERVE_NAMES": ""}, OPTIONS)]) == {"names": ()}


def test_an_older_name_of_a_variable_is_read_and_the_new_one_counts_before_it() -> None:
    def wide(**env: str) -> object:
        return read_options(OPTIONS, [Source.environment(env, OPTIONS)])["wide"]

    assert wide(WIDE="1") is True
    assert wide(WIDE="1", MYSERVE_WIDE="0") is False


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"count": 0}, "f: count must be at least 1, got 0"),
        ({"count": "10"}, "must be at most 9"),
        ({"count": "many"}, "must be an integer, got 'many'"),
        ({"count": 1.5}, "must be an integer"),
        ({"count": True}, "must be an integer"),
        ({"share": 0}, "must be greater than 0"),
        ({"share": "nan"}, "must be a finite number"),
        ({"mode": "of"}, "must be one of on, off, auto, got 'of'"),
        ({"wide": "2"}, "must be one of 1, true"),
        ({"size": "2 lots"}, "must be a number of bytes"),
        ({"names": 3}, "must be a list"),
        ({"cuont": 3}, "no option 'cuont'; did you mean count?"),
    ],
)
def test_a_wrong_value_is_named_as_its_source_names_it(raw: dict[str, object], words: str) -> None:
    with pytest.raises(RequestError, match=words.replace("?", r"\?")):
        read(**raw)


def test_a_value_from_python_is_checked_too() -> None:
    with pytest.raises(RequestError, match="count must be at least 1") as caught:
        Knobs(count=0)
    assert caught.value.param == "count"


def test_a_file_must_hold_a_mapping() -> None:
    with pytest.raises(RequestError, match="must hold one mapping"):
        Source.file("f", ["count"], OPTIONS)


def test_a_secret_is_not_shown() -> None:
    assert "hush" not in repr(Knobs(secret="hush")) and "count" in repr(Knobs())


@pytest.mark.parametrize(
    ("text", "count"), [("0", 0), ("10 kB", 10_000), ("1.5KiB", 1536), ("3tib", 3 << 40)]
)
def test_units_of_bytes(text: str, count: int) -> None:
    assert bytes_from(text) == count


def test_a_default_of_bytes_is_shown_as_it_would_be_written() -> None:
    def usual(default: int) -> str:
        plain = {"at_least": None, "above": None, "at_most": None, "other_variable": "", "other_flag": ""}
        shown = Option(
            name="x", kind=int, is_list=False, default=default, help="", group="", unset="", choices=(), is_bytes=True,
            **plain,
        )  # fmt: skip
        return shown.usual

    assert [usual(64 << 20), usual(1000), usual(1536)] == ["64MiB", "1000", "1536"]
    assert all(bytes_from(usual(count)) == count for count in (1, 1000, 1024, 3 << 30))
