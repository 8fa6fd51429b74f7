"""`myserve chat`: talk to a server, in a terminal or in a pipe; sessions are files, and probabilities colours."""

from __future__ import annotations

import asyncio
import math
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from myserve.cli.chat.session import ChatSession, ChatSessionError
from myserve.cli.chat.slash_commands import Desk, Outcome, run_command
from myserve.cli.client import ServerClient, ServerError
from myserve.cli.console import DEFAULT_URL, ProbabilityPrinter, colour_of, err, fail, legend, out

__all__ = ["chat"]

QUOTES = '"""'  # around a message of several lines


def chat(
    prompt: Annotated[
        str | None,
        typer.Argument(help="One question; none: a conversation, or all of stdin where it is a pipe."),
    ] = None,
    url: Annotated[str, typer.Option(help="The server's root.")] = DEFAULT_URL,
    model: Annotated[str | None, typer.Option(help="None: the first that the server lists.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    session: Annotated[
        Path | None, typer.Option(help="A file: the conversation goes on from it, and is kept in it.")
    ] = None,
    probs: Annotated[
        bool, typer.Option("--probs", help="Colour each token by its probability; keep its alternatives.")
    ] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Of each answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: greedy.")] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
) -> None:
    """Chat with a model; answers stream. In a terminal /help lists the commands.

    In a pipe stdin is one question and stdout its answer alone; the exit status is 0 where there is one.
    """
    asked = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
    }
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
        if not prompt:
            fail("stdin is empty: there is nothing to ask")
    client = ServerClient(url, os.environ.get("MYSERVE_API_KEY", ""))
    with asyncio.Runner() as runner:
        try:
            desk = Desk(ChatSession(""), session)
            if session is not None and session.exists():
                desk.talk.load(session)
            talk = desk.talk
            talk.model = model or talk.model or runner.run(client.first_model())
            talk.system = talk.system if system is None else system
            talk.options |= {name: value for name, value in asked.items() if value is not None}
            talk.probs = probs
            if prompt is None:
                ChatDialogue(client, desk, runner).run()
            else:
                talk.ask(prompt)
                runner.run(ShownAnswer(client, talk, is_alone=True).draw())
                _keep(desk)
        except (ServerError, ChatSessionError) as error:
            fail(str(error))
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        finally:
            runner.run(client.aclose())


def _keep(desk: Desk) -> None:
    if desk.path is not None:
        desk.talk.save(desk.path)


@dataclass(slots=True)
class ChatDialogue:
    """A conversation in a terminal. Lines are read outside the event loop, so that Ctrl-C reaches them."""

    client: ServerClient
    desk: Desk
    runner: asyncio.Runner
    entries: list[Mapping[str, Any]] = field(default_factory=list)  # of the last answer's tokens

    def run(self) -> None:
        with suppress(ImportError):
            import_module("readline")  # input() has history and editing then
        talk = self.desk.talk
        err.print(f"[dim]{talk.model} at {self.client.url} · /help lists commands · Ctrl-D ends[/]")
        if talk.messages:
            err.print(f"[dim]{len(talk.messages)} messages from {self.desk.path}[/]")
        if talk.probs:
            err.print(legend())
        while (text := _read_message()) is not None:
            if not text:
                continue
            outcome = self._outcome(text)
            if outcome.words:
                err.print(Text(outcome.words, style="dim"), soft_wrap=True)
            if outcome.shows_alternatives:
                for entry in self.entries:
                    err.print(alternatives(entry))
            if outcome.draws:
                self._answer()
            if outcome.ends:
                return

    def _outcome(self, text: str) -> Outcome:
        if not text.startswith("/"):
            self.desk.talk.ask(text)
            return Outcome(draws=True)
        try:
            return run_command(self.desk, text)
        except ChatSessionError as error:
            return Outcome(str(error))

    def _answer(self) -> None:
        """Draw the answer to the last question. Where there is none, the question is taken back."""
        answer = ShownAnswer(self.client, self.desk.talk)
        try:
            try:
                self.runner.run(answer.draw())
            except KeyboardInterrupt:
                answer.end("stopped")
                if not answer.text:
                    self.desk.talk.undo()
            self.entries = answer.entries
            if answer.seed is not None:
                self.desk.seeds.append(answer.seed)
            _keep(self.desk)
        except ServerError as error:
            self.desk.talk.undo()
            err.print(
                Text(f"{error}\nyour message was taken back; say it again when this is mended", style="red")
            )
        except ChatSessionError as error:
            err.print(Text(str(error), style="red"))


def _read_message() -> str | None:
    """Read a message: a line, or several between quotes or with a backslash at their ends. None: the chat is over."""
    lines: list[str] = []
    is_quoted = False
    while True:
        try:
            line = input("... " if lines else "> ")
        except EOFError:
            out.print()
            return "\n".join(lines).strip() if lines else None
        except KeyboardInterrupt:
            out.print()
            lines, is_quoted = [], False
            continue
        if not lines and line.lstrip().startswith(QUOTES):
            is_quoted, line = True, line.lstrip().removeprefix(QUOTES)
        if is_quoted:
            if line.rstrip().endswith(QUOTES):
                return "\n".join([*lines, line.rstrip().removesuffix(QUOTES)]).strip()
            lines.append(line)
        elif line.endswith("\\"):
            lines.append(line.removesuffix("\\"))
        else:
            return "\n".join([*lines, line]).strip()


@dataclass(slots=True)
class ShownAnswer:
    """One answer as it comes. `is_alone`: stdout gets the answer's text and nothing else."""

    client: ServerClient
    talk: ChatSession
    is_alone: bool = False
    text: str = ""
    entries: list[Mapping[str, Any]] = field(default_factory=list)
    seed: int | None = None
    is_over: bool = False
    _printer: ProbabilityPrinter = field(default_factory=ProbabilityPrinter)
    _is_thinking: bool = False

    async def draw(self) -> None:
        """Stream the answer to the terminal and add it to the conversation. Raises ServerError."""
        reason = None
        try:
            async for choice in self.client.stream_chat(self.talk.body()):
                self._show(choice)
                reason = choice.get("finish_reason") or reason
                self.seed = choice.get("seed", self.seed)
        finally:
            # nobody runs the event loop until the next answer, so that a connection would be closed unseen
            await self.client.aclose()
        self.end({"length": "it ended at its limit", "abort": "the server ended it"}.get(reason or "", ""))

    def end(self, why: str = "") -> None:
        """Add what came to the conversation. Idempotent."""
        if self.is_over:
            return
        self.is_over = True
        out.print(self._printer.rest())
        self.talk.answered(self.text)
        if not self.is_alone:
            said = [why] if why else []
            said += [] if self.seed is None else [f"seed {self.seed}"]
            err.print(Text(" · ".join(said), style="dim"))

    def _show(self, choice: Mapping[str, Any]) -> None:
        delta = choice.get("delta") or {}
        thought = delta.get("reasoning_content") or ""
        if thought and not self.is_alone:
            # a thought is no answer: it stays out of the conversation, and of stdout in a pipe
            err.print(Text(thought, style="dim italic"), end="", soft_wrap=True)
            self._is_thinking = True
        piece = delta.get("content") or ""
        if piece and self._is_thinking:
            err.print("\n")
            self._is_thinking = False
        self.text += piece
        entries = (choice.get("logprobs") or {}).get("content")
        self.entries += entries or ()
        if not out.is_terminal:
            # as it is: a terminal's printer takes control characters out
            sys.stdout.write(piece)
            sys.stdout.flush()
        elif entries is None:
            out.print(Text(piece), end="", soft_wrap=True)
        else:
            out.print(self._printer.all(entries), end="", soft_wrap=True)


def alternatives(entry: Mapping[str, Any]) -> Text:
    """Return a line: a token, its probability, and those that were likely beside it.

    >>> others = [{"token": " a", "logprob": -0.1}, {"token": " b", "logprob": -2.5}]
    >>> alternatives({"token": " b", "logprob": -2.5, "top_logprobs": others}).plain
    "' b'              8.2%   ' a' 90.5%"
    """
    line = Text(f"{_quoted(entry):<16}", style="bold").append(f"{_share(entry):6.1%}", _colour(entry))
    for other in entry.get("top_logprobs") or ():
        if other.get("token") != entry.get("token"):
            line.append(f"   {_quoted(other)} ", "dim").append(f"{_share(other):.1%}", _colour(other))
    return line


def _quoted(entry: Mapping[str, Any]) -> str:
    return repr(str(entry.get("token", "")))


def _share(entry: Mapping[str, Any]) -> float:
    return math.exp(min(0.0, entry.get("logprob") or 0.0))


def _colour(entry: Mapping[str, Any]) -> str:
    return colour_of(_share(entry))
