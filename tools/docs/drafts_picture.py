"""Draws docs/drafts.svg, which tokens of two answers were drafted: `python -m tools.docs.drafts_picture MODEL`.

The answers are a real model's, drawn with the defaults; what each token's drafter was is read off the engine.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from benchmarks.speculation_texts import COPYING, FREE

from myserve.core.params import SamplingParams
from myserve.engine.config import EngineConfig
from myserve.engine.engine import Engine

TARGET = Path(__file__).parents[2] / "docs" / "drafts.svg"
SHOWN = {"edit code": COPYING["edit code"], "essay": FREE["essay"]}
TOKENS, COLUMNS, LINE, COLUMN, LEFT = 90, 100, 19, 7.8, 16
STYLE = """
  svg { font-family: ui-monospace, SFMono-Regular, Menlo, monospace; font-size: 13px; }
  text { fill: #1f2328; white-space: pre; } .head { font-weight: 600; } .dim { fill: #57606a; }
  .ngram { fill: #aceebb; } .sibling { fill: #b6e3ff; } .drawn { fill: #eef2f7; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; } .dim { fill: #9da7b3; }
    .ngram { fill: #1a7f37; } .sibling { fill: #0550ae; } .drawn { fill: #21262d; }
  }
"""
Token = tuple[str, str | None]  # its text, and its drafter


def picture(answers: Sequence[tuple[str, Sequence[Token]]]) -> str:
    """Return the drawing: a box a token, green where it had been drafted."""
    parts: list[str] = []
    top = 24
    for title, tokens in answers:
        drafted = sum(drafter is not None for _, drafter in tokens)
        said = f"{drafted} of {len(tokens)} tokens came with another one's step"
        parts.append(f'<text x="{LEFT}" y="{top}" class="head">{escape(title)}</text>')
        parts.append(f'<text x="{LEFT + COLUMN * (len(title) + 2)}" y="{top}" class="dim">{said}</text>')
        top += 10
        lines = 0
        for line, column, text, drafter in _pieces(tokens):
            x, y = LEFT + COLUMN * column, top + LINE * line
            width = COLUMN * max(1, len(text)) - 1
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{LINE - 3}" rx="2" class="{drafter}"/>'
            )
            parts.append(f'<text x="{x:.1f}" y="{y + 12}">{escape(text)}</text>')
            lines = line + 1
        top += LINE * lines + 34
    width = LEFT * 2 + COLUMN * COLUMNS
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {top - 20}" role="img" '
        f'aria-label="Which tokens of two answers were drafted"><style>{STYLE}</style>{"".join(parts)}</svg>\n'
    )


def _pieces(tokens: Sequence[Token]) -> Iterator[tuple[int, int, str, str]]:
    """Yield line, column, text and class of each box; a line break ends its line."""
    line = column = 0
    for text, drafter in tokens:
        shown = text.replace("\n", "⏎").replace("\t", "    ")
        if column + len(shown) > COLUMNS:
            line, column = line + 1, 0
        yield line, column, shown, drafter or "drawn"
        column += len(shown)
        if text.endswith("\n"):
            line, column = line + 1, 0


async def _answer(engine: Engine, prompt: str) -> list[Token]:
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=TOKENS, ignore_eos=True)
    tokens: list[Token] = []
    async for delta in engine.submit(engine.tokenizer(prompt)["input_ids"], params):
        tokens += [
            (engine.token_bytes[token.token_id].decode("utf-8", "replace"), token.drafter)
            for token in (*delta.tokens, *delta.stop_tokens)
        ]
    return tokens


def main(model: str) -> None:
    engine = Engine.from_pretrained(model, EngineConfig(kv_cache_bytes=1 << 28, max_model_len=2048))
    try:
        answers = [(title, asyncio.run(_answer(engine, prompt))) for title, prompt in SHOWN.items()]
    finally:
        engine.shutdown()
    TARGET.write_text(picture(answers))


if __name__ == "__main__":
    main(sys.argv[1])
