"""`myserve parity`: how far the engine's logprobs are from a trainer's, over the whole vocabulary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from myserve.cli.console import fail, out
from myserve.errors import MyserveError
from myserve.sdk.display.plotting import COLOURS, check_chart_path, drawn

if TYPE_CHECKING:
    from myserve.trainer.parity import ParityRow

__all__ = ["parity"]


def parity(
    model: Annotated[str, typer.Argument(help="A folder, a hub id, or embedded.")],
    texts: Annotated[list[Path], typer.Argument(help="Files of text; each is one text.")],
    forward: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16 or exact_forward; None: all three.")
    ] = None,
    most_tokens: Annotated[int, typer.Option(min=2, help="A longer text is cut into pieces of this.")] = 512,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    chart: Annotated[
        Path | None, typer.Option(help="Write a picture here (.svg, .png or .pdf); needs myserve[plot].")
    ] = None,
) -> None:
    """Compare the engine with a trainer's forward pass: plain float32, plain bfloat16, and exact_forward."""
    try:
        if chart is not None:
            check_chart_path(chart)
        read = [path.read_text("utf-8") for path in texts]
        from myserve.embedded import embedded_model_path
        from myserve.trainer.parity import TrainerForward, measure_parity  # imports torch

        known: tuple[TrainerForward, ...] = get_args(TrainerForward)
        if unknown := set(forward or ()) - set(known):
            fail(f"--forward is one of {', '.join(known)}, not {', '.join(sorted(unknown))}")
        forwards = [name for name in known if not forward or name in forward]
        folder = str(embedded_model_path()) if model == "embedded" else model
        rows = measure_parity(folder, read, forwards=forwards, most_tokens=most_tokens)
    except ModuleNotFoundError as error:
        fail(f"comparing needs torch and friends: pip install 'myserve[server]'  (missing: {error.name})")
    except (MyserveError, OSError, ValueError) as error:
        fail(str(error))
    out.print(_table(rows))
    if json_file is not None:
        record = {"model": model, "texts": list(map(str, texts)), "rows": [row.as_dict() for row in rows]}
        json_file.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    if chart is not None:
        _chart(rows, model, chart)


def _table(rows: Sequence[ParityRow]) -> Table:
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("trainer's forward", no_wrap=True)
    for name in ("bits", "max", "p99", "p99.9", "text", "KL", "KL max", "flips"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        figures = [row.max_difference, *map(row.quantile, (0.99, 0.999)), row.max_text_difference]
        figures += [row.kl_mean, row.kl_max]
        bits = "equal" if row.equal_bits else "differ"
        shown.add_row(row.forward, bits, *(_number(value) for value in figures), str(row.top1_flips))
    count = f"{rows[0].positions:,} positions x {rows[0].vocabulary:,} tokens"
    shown.caption = f"nats, over {count}; text: the largest at the texts' own"
    return shown


def _number(value: float) -> str:
    """Return two digits, in few characters.

    >>> _number(0.0983), _number(0.000123), _number(0.0)
    ('0.098', '1e-04', '0')
    """
    return f"{value:.2g}" if value == 0 or value >= 0.001 else f"{value:.0e}"


def _chart(rows: Sequence[ParityRow], model: str, path: Path) -> None:
    """Draw the differences' quantiles, and the KL of each position, sorted; what is 0 everywhere is said in words."""
    levels = [1 - 10 ** (-i / 8) for i in range(1, 41)]
    with drawn(path, columns=2, width=9.0) as axes:
        left, right = axes
        for row, colour in zip(rows, COLOURS, strict=False):
            label = row.forward if row.max_difference else f"{row.forward}: 0"
            style: dict[str, Any] = {"color": colour, "label": label}
            left.plot([1 - q for q in levels], [row.quantile(q) or nan for q in levels], **style)
            right.plot([value or nan for value in sorted(row.kl)], **style)
        left.set(title=f"{model}: engine against trainer", xlabel="share of (position, token) pairs above")
        left.set(ylabel="|logprob difference|, nats", xscale="log", yscale="log")
        right.set(title="KL(engine || trainer)", xlabel="positions, sorted", ylabel="nats", yscale="log")
        left.legend()
