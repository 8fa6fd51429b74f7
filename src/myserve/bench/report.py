"""What a person reads: a table in the terminal, a chart in SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from rich.box import SIMPLE_HEAD
from rich.table import Table

from myserve.bench.figures import Figures

# SVG by hand in forty lines, and no PNG: matplotlib would bring 60 MB and half a second of start-up for the sake
# of bars, and a browser, GitHub and every editor show SVG.
_WIDTH, _LABEL, _ROW, _BAR, _PAD = 880, 210, 34, 12, 16
_PANEL = (_WIDTH - _LABEL - 3 * _PAD) / 2
_STYLE = """text{font:12px system-ui,sans-serif;fill:#1f2937}.head{font-weight:600}.dim{fill:#6b7280}
.bar{fill:#2563eb}.range{fill:#93c5fd}.mark{fill:#1d4ed8}
@media (prefers-color-scheme:dark){svg{background:#0b1220}text{fill:#e5e7eb}.dim{fill:#9ca3af}}"""


def table(results: Mapping[str, Figures]) -> Table:
    """One row a workload."""
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)  # 80 columns are enough for it
    shown.add_column("workload", no_wrap=True)
    for name in ("TTFT", "p99", "between", "p90", "p99", "ms/step", "tok/s", "prefill", "req/s"):
        shown.add_column(name, justify="right", no_wrap=True)
    for label, f in results.items():
        values = (f.ttft_p50, f.ttft_p99, f.inter_token_p50, f.inter_token_p90, f.inter_token_p99)
        rates = (f.ms_per_step, f.tokens_per_s, f.prefill_tokens_per_s, f.requests_per_s)
        shown.add_row(label, *map(number, (*values, *rates)))
    shown.caption = "ms, p50 unless said; between: one token to the next; prefill: prompt tok/s"
    return shown


def number(value: float | None) -> str:
    """Three digits that mean something.

    >>> number(1234.5), number(98.76), number(0.1234), number(None)
    ('1234', '98.8', '0.123', '–')
    """
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 999.5 else f"{value:.3g}"


def svg(results: Mapping[str, Figures], title: str) -> str:
    """A chart: tokens a second as bars; time between tokens as ranges, p50 to p99 with a mark at p90.

    >>> from myserve.bench.figures import RequestTimes, figures
    >>> run = figures([RequestTimes(0.0, (0.5, 0.6, 0.7), 3, 10)], requests=1)
    >>> svg({"1x10:3": run}, "a & b").count("<rect"), "a &amp; b" in svg({"1x10:3": run}, "a & b")
    (3, True)
    """
    top = 4 * _PAD
    height = top + _ROW * len(results) + _PAD
    left, right = _LABEL + _PAD, _LABEL + 2 * _PAD + _PANEL
    fastest = max(f.tokens_per_s for f in results.values())
    slowest = max((f.inter_token_p99 or 0.0 for f in results.values()), default=0.0) or 1.0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        _text(_PAD, 1.4 * _PAD, title, "head"),
        _text(left, 3 * _PAD, "tokens per second", "dim"),
        _text(right, 3 * _PAD, "between tokens, ms: p50 – p90 – p99", "dim"),
    ]
    for row, (label, f) in enumerate(results.items()):
        y = top + row * _ROW
        scale = _PANEL - 110  # the rest is for the numbers behind the bars
        length = scale * f.tokens_per_s / fastest
        parts += [_text(_PAD, y + _BAR, label), _rect(left, y, length, "bar")]
        parts.append(_text(left + length + 6, y + _BAR - 1, number(f.tokens_per_s), "dim"))
        if f.inter_token_p50 is None or f.inter_token_p90 is None or f.inter_token_p99 is None:
            continue
        low, middle, high = (
            scale * value / slowest for value in (f.inter_token_p50, f.inter_token_p90, f.inter_token_p99)
        )
        parts += [_rect(right + low, y, max(2.0, high - low), "range"), _rect(right + middle, y, 2, "mark")]
        percentiles: Sequence[float] = (f.inter_token_p50, f.inter_token_p90, f.inter_token_p99)
        parts.append(_text(right + high + 6, y + _BAR - 1, " – ".join(map(number, percentiles)), "dim"))
    return "\n".join([*parts, "</svg>\n"])


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}">{escape(text)}</text>'


def _rect(x: float, y: float, width: float, style: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{_BAR}" rx="2" class="{style}"/>'
