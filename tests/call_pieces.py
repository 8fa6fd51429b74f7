"""How tests read a completion's calls: texts joined, calls as (name, arguments)."""

from __future__ import annotations

from typing import Any

from myserve.server.parsing.tool_calls import Arguments, CallPiece, CallReader, CallStart, Text
from myserve.server.parsing.tool_styles import ToolStyle


def read_calls(style: ToolStyle, tools: Any, parts: list[str]) -> list[Any]:
    """Feed the parts one by one; return what they say in order."""
    reader = CallReader(style, tools)
    pieces: list[CallPiece] = [piece for part in parts for piece in reader.feed(part)]
    seen: list[Any] = []
    for piece in [*pieces, *reader.end()]:
        match piece:
            case CallStart(name):
                seen.append((name, ""))
            case Arguments(text):
                assert isinstance(seen[-1], tuple), "arguments without a call"
                seen[-1] = (seen[-1][0], seen[-1][1] + text)
            case Text(text) if seen and isinstance(seen[-1], str):
                seen[-1] += text
            case Text(text):
                seen.append(text)
    return seen
