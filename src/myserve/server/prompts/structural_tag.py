"""Structural tags, as vLLM and xgrammar write them: text with forms in it, said as a tree, here turned into Lark."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from myserve.core.grammar import Grammar
from myserve.errors import RequestError

__all__ = ["TEXT", "Format", "structural_tag"]

Format = dict[str, Any]

TEXT = "/(.|\\n)*/"


def structural_tag(value: Any) -> Grammar:
    """The grammar of a structural tag, an object or the text of one. Raises RequestError for what is no such thing.

    >>> tag = {"type": "tag", "begin": "<n>", "content": {"type": "regex", "pattern": "[0-9]+"}, "end": "</n>"}
    >>> print(structural_tag({"type": "structural_tag", "format": tag}).source)
    start: f1
    f2: /[0-9]+/
    f1: "<n>" f2 "</n>"
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the structural tag is not valid JSON: {error}") from None
    form = _older(value) if isinstance(value, dict) and "structures" in value else _of(value, "format", dict)
    rules = _Rules()
    try:
        start = rules.rule(form, is_last=True)
    except RecursionError:
        raise RequestError("the structural tag is nested too deeply") from None
    return Grammar("lark", "\n".join([f"start: {start}", *rules.lines]))


def _older(value: Format) -> Format:
    """The form with `structures` and `triggers`, which says triggered tags of JSON."""
    tags = [
        {
            "type": "tag",
            "begin": _of(one, "begin", str),
            "content": {"type": "json_schema", "json_schema": _of(one, "schema", dict | bool)},
            "end": _of(one, "end", str),
        }
        for one in _of(value, "structures", list)
    ]
    return {"type": "triggered_tags", "triggers": _of(value, "triggers", list), "tags": tags}


class _Rules:
    """Lark's rules as they are made. `is_last`: nothing comes behind, so that free text may go on to the end."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._count = 0

    def rule(self, form: Any, *, is_last: bool) -> str:
        """The name of a rule for `form`."""
        makers = {
            "const_string": self._constant,
            "json_schema": self._json,
            "regex": self._regex,
            "any_text": self._any_text,
            "sequence": self._sequence,
            "or": self._or,
            "optional": self._repeated,
            "star": self._repeated,
            "plus": self._repeated,
            "tag": self._tag,
            "triggered_tags": self._triggered,
            "tags_with_separator": self._separated,
        }
        kind = _of(form, "type", str)
        if kind not in makers:
            raise RequestError(
                f"a format of type {kind!r:.80} is not supported; these are: {', '.join(makers)}"
            )
        if form.get("excludes"):
            raise RequestError("'excludes' of a structural tag is not supported by this server")
        name = self._name()
        self.lines.append(f"{name}: {makers[kind](form, is_last)}")
        return name

    def _constant(self, form: Format, is_last: bool) -> str:
        return _quoted(_of(form, "value", str))

    def _json(self, form: Format, is_last: bool) -> str:
        return f"%json {json.dumps(_of(form, 'json_schema', dict | bool), ensure_ascii=False)}"

    def _regex(self, form: Format, is_last: bool) -> str:
        return _regex(_of(form, "pattern", str))

    def _any_text(self, form: Format, is_last: bool) -> str:
        if not is_last:  # it would go on over what comes behind it
            raise RequestError("any_text may stand in a tag that has an end, or at the end of all")
        return TEXT

    def _sequence(self, form: Format, is_last: bool) -> str:
        *others, last = _several(form, "elements")
        names = [self.rule(one, is_last=False) for one in others] + [self.rule(last, is_last=is_last)]
        return " ".join(names)

    def _or(self, form: Format, is_last: bool) -> str:
        return " | ".join(self.rule(one, is_last=is_last) for one in _several(form, "elements"))

    def _repeated(self, form: Format, is_last: bool) -> str:
        mark = {"optional": "?", "star": "*", "plus": "+"}[form["type"]]
        return self.rule(form.get("content"), is_last=is_last and mark == "?") + mark

    def _tag(self, form: Format, is_last: bool) -> str:
        return self._rest_of_tag(form, _of(form, "begin", str), is_last=is_last)

    def _rest_of_tag(self, form: Any, begin: str, *, is_last: bool) -> str:
        """A tag of whose beginning `begin` is still to come."""
        content, end = _of(form, "content", dict), form.get("end", "")
        ends = [end] if isinstance(end, str) else end
        if not (isinstance(ends, list) and ends and all(isinstance(one, str) for one in ends)):
            raise RequestError("the 'end' of a tag must be a string, or a list of them")
        opening = [_quoted(begin)] if begin else []
        if content.get("type") == "any_text" and not content.get("excludes") and all(ends):
            body = self._name()
            self.lines.append(f"{body}[lazy]: {TEXT} ({' | '.join(map(_quoted, ends))})")
            return " ".join([*opening, body])
        has_end = any(ends)
        body = self.rule(content, is_last=is_last and not has_end)
        closing = (
            [f"({' | '.join(map(_quoted, ends))})" if len(ends) > 1 else _quoted(end)] if has_end else []
        )
        return " ".join([*opening, body, *closing])

    def _triggered(self, form: Format, is_last: bool) -> str:
        """Free text, in which whatever begins like a tag goes on as one."""
        if not is_last:
            raise RequestError("triggered_tags may stand at the end of all, for free text follows them")
        triggers, tags = _several(form, "triggers"), _several(form, "tags")
        if not all(isinstance(trigger, str) and trigger for trigger in triggers):
            raise RequestError("triggers must be strings, and not empty")
        calls = [
            self._call(trigger, [tag for tag in tags if _trigger_of(tag, triggers) == trigger])
            for trigger in triggers
            if any(_trigger_of(tag, triggers) == trigger for tag in tags)
        ]
        call = self._name()
        self.lines.append(f"{call}: {' | '.join(calls)}")
        if form.get("stop_after_first"):
            return call if form.get("at_least_one") else f"{call} | {TEXT}"
        return f"{call}{'+' if form.get('at_least_one') else '*'} {TEXT}"

    def _call(self, trigger: str, tags: Sequence[Any]) -> str:
        """Text up to the trigger, which a lazy lexeme never reads over, and one of its tags."""
        opened, call = self._name(), self._name()
        rests = [self._rest_of_tag(tag, tag["begin"][len(trigger) :], is_last=False) for tag in tags]
        self.lines.append(f"{opened}[lazy]: {TEXT} {_quoted(trigger)}")
        self.lines.append(f"{call}: {opened} ({' | '.join(rests)})")
        return call

    def _separated(self, form: Format, is_last: bool) -> str:
        tags = [self.rule(one | {"type": "tag"}, is_last=False) for one in _several(form, "tags")]
        tag = self._name()
        self.lines.append(f"{tag}: {' | '.join(tags)}")
        several = (
            tag if form.get("stop_after_first") else f"{tag} ({_quoted(_of(form, 'separator', str))} {tag})*"
        )
        return several if form.get("at_least_one") else f"({several})?"

    def _name(self) -> str:
        self._count += 1
        return f"f{self._count}"


def _trigger_of(tag: Any, triggers: Sequence[str]) -> str:
    begin = _of(tag, "begin", str)
    for trigger in triggers:
        if begin.startswith(trigger):
            return trigger
    raise RequestError(f"the tag that begins with {begin!r:.80} begins with none of the triggers")


def _several(form: Format, name: str) -> list[Any]:
    found: list[Any] = _of(form, name, list)
    if not found:
        raise RequestError(f"{name!r} of a structural tag must not be empty")
    if name == "tags" and not all(isinstance(one, dict) for one in found):
        raise RequestError("'tags' of a structural tag must be objects")
    return found


def _of(form: Any, name: str, kind: Any) -> Any:
    """A field that must be there."""
    if not isinstance(form, dict):
        raise RequestError(f"in a structural tag an object is wanted where {form!r:.80} is")
    if not isinstance(value := form.get(name), kind):
        raise RequestError(f"a structural tag's {name!r} is missing or of another type, got {value!r:.80}")
    return value


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # Lark's strings are JSON's


def _regex(pattern: str) -> str:
    r"""Between Lark's slashes.

    >>> print(_regex("a/b\n"))
    /a\/b\n/
    """
    return (
        "/"
        + re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", pattern, flags=re.DOTALL).replace("\n", r"\n")
        + "/"
    )
