"""Draws docs/request.svg, the way of a request through server and engine: `python -m tools.docs.request_picture`."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

TARGET = Path(__file__).parents[2] / "docs" / "request.svg"
WIDTH, HEIGHT = 920, 400
BOX = (116, 62)  # width and height of a step
LANES = [  # name, what it is, left of the name, top, height
    ("event loops", "server/, one or several", 96, 44, 128),
    ("engine thread", "engine/, core/: one step after another", 250, 222, 154),
]
IN_Y, STEP_Y = 84, 266  # tops of the boxes in each lane
STEPS = [  # left, top, title, two lines below it
    (96, IN_Y, "edge", "request id, key", "body → fields"),
    (232, IN_Y, "prompt", "chat template", "→ token ids"),
    (368, IN_Y, "submit", "checks, seed,", "n choices"),
    (576, IN_Y, "stream", "ids → text,", "stop strings"),
    (712, IN_Y, "answer", "chunks, logprobs", "SSE or JSON"),
    (96, STEP_Y, "schedule", "who runs, on", "which blocks"),
    (250, STEP_Y, "forward", "packed rows,", "paged KV cache"),
    (404, STEP_Y, "sample", "stages, draw,", "logprobs"),
    (558, STEP_Y, "update", "append, finish,", "free blocks"),
    (712, STEP_Y, "dispatch", "one message", "a loop and step"),
]
STYLE = """
  svg { font-family: ui-sans-serif, system-ui, sans-serif; font-size: 12.5px; }
  .lane { fill: #eef2f7; } .box { fill: #ffffff; stroke: #57606a; } .exact { stroke: #0969da; stroke-width: 2.2; }
  text { fill: #1f2328; } .title { font-weight: 600; font-size: 14px; } .dim { fill: #57606a; }
  .arrow { stroke: #57606a; stroke-width: 1.6; fill: none; } .cross { stroke: #bc4c00; stroke-width: 2.2; }
  .head { fill: #57606a; } .crosshead { fill: #bc4c00; } .crosstext { fill: #bc4c00; }
  @media (prefers-color-scheme: dark) {
    .lane { fill: #1c2430; } .box { fill: #0d1117; stroke: #8b949e; } .exact { stroke: #58a6ff; }
    text { fill: #e6edf3; } .dim { fill: #9da7b3; } .arrow { stroke: #8b949e; } .head { fill: #8b949e; }
    .cross { stroke: #f0883e; } .crosshead { fill: #f0883e; } .crosstext { fill: #f0883e; }
  }
"""
MARKERS = "".join(
    f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    f'<path class="{name}" d="M0 0 8 4 0 8z"/></marker>'
    for name in ("head", "crosshead")
)
EXACT = {"forward", "sample"}  # where the numbers are made


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    """Return one line of text."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def arrow(path: str, kind: str = "arrow", head: str = "head") -> str:
    """Return an arrow along an SVG path."""
    return f'<path class="{kind}" d="{path}" fill="none" marker-end="url(#{head})"/>'


def box(left: int, top: int, title: str, *lines: str) -> str:
    """Return one step: a box with a title and what it does."""
    kind = "box exact" if title in EXACT else "box"
    middle = left + BOX[0] / 2
    shape = f'<rect class="{kind}" x="{left}" y="{top}" width="{BOX[0]}" height="{BOX[1]}" rx="8"/>'
    below = [text(middle, top + 38 + 15 * i, line, "dim") for i, line in enumerate(lines)]
    return "\n".join([shape, text(middle, top + 20, title, "title"), *below])


def arrows() -> list[str]:
    """Return the arrows between the steps: along a lane, and the two that cross from thread to thread."""
    middle, floor = IN_Y + BOX[1] / 2, STEP_Y + BOX[1]
    along = [f"M{a + BOX[0]} {middle:g}H{b - 3}" for a, b in ((96, 232), (232, 368), (576, 712))]
    step = STEP_Y + BOX[1] / 2
    along += [f"M{a + BOX[0]} {step:g}H{a + 151}" for a in (96, 250, 404, 558)]
    along += [f"M30 {middle:g}H92", f"M{712 + BOX[0]} {middle:g}H{WIDTH - 26}"]
    back = f"M{712 + 40} {floor}v16q0 8-8 8H{96 + 66}q-8 0-8-8v-12"
    crossing = [
        f"M{368 + 58} {IN_Y + BOX[1]}v36q0 8-8 8H{96 + 66}q-8 0-8 8v{STEP_Y - IN_Y - BOX[1] - 55}",
        f"M{712 + 58} {STEP_Y}v-{STEP_Y - IN_Y - BOX[1] - 52}q0-8-8-8H{576 + 66}q-8 0-8-8v-31",
    ]
    return [
        *(arrow(path) for path in along),
        arrow(back),
        *(arrow(path, "arrow cross", "crosshead") for path in crossing),
    ]


def picture() -> str:
    """Return the whole picture as SVG text, for light and dark pages.

    >>> picture().startswith("<svg") and "prefers-color-scheme: dark" in picture()
    True
    """
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="The way of a request: event loops on top, the engine thread below">',
        f"<style>{STYLE}</style><defs>{MARKERS}</defs>",
    ]
    for name, what, left, top, height in LANES:
        parts.append(f'<rect class="lane" x="62" y="{top}" width="{WIDTH - 124}" height="{height}" rx="12"/>')
        parts.append(text(left, top + 22, name, "title", "start"))
        parts.append(text(left + 9 * len(name), top + 22, what, "dim", "start"))
    parts += [box(*step) for step in STEPS]
    parts += arrows()
    parts += [
        text(28, IN_Y + 16, "request", "dim"),
        text(WIDTH - 26, IN_Y + 16, "answer", "dim"),
        text(290, 182, "one inbox", "crosstext"),
        text(704, 182, "call_soon_threadsafe", "crosstext"),
        text(460, STEP_Y + BOX[1] + 38, "next step", "dim"),
        text(
            WIDTH / 2,
            22,
            "Blue boxes make the numbers: batch-invariant, whatever else is in the batch",
            "dim",
        ),
        "</svg>\n",
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(picture())
