"""docs/configuration.md is written from the options' declarations: `python -m tools.configuration`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from myserve.options import Option
from myserve.server.settings import OPTIONS

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"

HEAD = """\
# Configuration

<!-- written by `python -m tools.configuration`; change the declarations in server/settings.py and engine/config.py -->

Every option of `myserve serve` is declared once, and can be given in three ways. The command line counts before the
environment, and the environment before the file.

| | |
|---|---|
| on the command line | `myserve serve --max-num-seqs 32` |
| in the environment | `MYSERVE_MAX_NUM_SEQS=32 myserve serve` |
| in a file | `max-num-seqs: 32` in `serve.yaml`, and `myserve serve --config serve.yaml` (or `MYSERVE_CONFIG`) |

```yaml
# serve.yaml
model: models/qwen3-0.6b
served-model-name: [qwen, qwen3-0.6b]
max-num-seqs: 32
kv-cache-bytes: 2GiB
prefix-caching: on
```

An option that does not exist, or a value out of its range, ends the start with an error that names it. A switch is
`--strict` or `--no-strict`; `1`, `true`, `yes` or `on`, and their opposites elsewhere. A list is given by repeating the
option, with commas, or as a list in YAML. Bytes are a number or have a unit: `2GiB`, `500MB`. An empty variable is as
good as none, but for a list, which it empties. The application without the command, `uvicorn myserve.main:app`, reads
the same variables; address and port, TLS and logs are uvicorn's own then.

The commands that ask a server (`chat`, `sample`, `bench`) send the key in `MYSERVE_API_KEY`.
"""


def page() -> str:
    """Return the whole page."""
    groups: dict[str, list[Option]] = {}
    for declared in OPTIONS.values():
        groups.setdefault(declared.group, []).append(declared)
    return HEAD + "".join(line for group, options in groups.items() for line in _section(group, options))


def _section(group: str, options: list[Option]) -> Iterator[str]:
    yield f"\n## {group}\n\n| option, variable | default | |\n|---|---|---|\n"
    for declared in options:
        yield f"| {_names(declared)} | {_default(declared)} | {_described(declared)} |\n"


def _names(declared: Option) -> str:
    flag = "`MODEL`" if declared.name == "model" else f"`{declared.flag}`"
    older = [name for name in (declared.other_flag, declared.other_variable) if name]
    also = f" (also {', '.join(f'`{name}`' for name in older)})" if older else ""
    return f"{flag}<br>`{declared.variable}`{also}"


def _default(declared: Option) -> str:
    return declared.usual if declared.default in (None, ()) else f"`{declared.usual}`"


def _described(declared: Option) -> str:
    said = declared.help.replace("|", "\\|")
    if declared.choices:
        return f"{said} One of {', '.join(f'`{choice}`' for choice in declared.choices)}."
    values = declared.range
    return f"{said} {values[0].upper()}{values[1:]}." if values else said


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), "utf-8")


if __name__ == "__main__":
    main()
