"""`myserve chat`: the command, what a slash begins, and the conversation that is kept."""

from __future__ import annotations

from myserve.cli.chat.command import chat

__all__ = ["chat"]
