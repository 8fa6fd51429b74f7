"""The commands of a chat, as /help lists them: each changes the conversation, or says something about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from myserve.cli.chat.session import OPTIONS, ChatSession, ChatSessionError

__all__ = ["Command", "Desk", "Outcome", "run_command"]


class Outcome(NamedTuple):
    """The words to show, and whether an answer is to be drawn now or the chat is over."""

    words: str = ""
    draws: bool = False
    ends: bool = False
    shows_alternatives: bool = False


@dataclass(slots=True)
class Desk:
    """The conversation, and where it is kept."""

    talk: ChatSession
    path: Path | None = None
    seeds: list[int] = field(default_factory=list)  # of the answers so far, as the server told them


class Command(NamedTuple):
    """A command: the argument that it takes, what it does, and how."""

    argument: str
    help: str
    run: Callable[[Desk, str], Outcome]


def run_command(desk: Desk, line: str) -> Outcome:
    """Run one line that begins with a slash. Raises ChatSessionError for what cannot be done.

    >>> desk = Desk(ChatSession("m"))
    >>> run_command(desk, "/seed 7").words, desk.talk.options
    ('seed 7', {'seed': 7})
    >>> run_command(desk, "/sed 7")
    Traceback (most recent call last):
    ...
    myserve.cli.chat.session.ChatSessionError: there is no command /sed; /help lists them
    """
    name, _, argument = line.removeprefix("/").partition(" ")
    command = COMMANDS.get(_OTHER_NAMES.get(name, name))
    if command is None:
        raise ChatSessionError(f"there is no command /{name}; /help lists them")
    return command.run(desk, argument.strip())


def _help(_: Desk, __: str) -> Outcome:
    shown = [(f"/{name} {command.argument}".strip(), command.help) for name, command in COMMANDS.items()]
    shown += [('"""', "begins and ends a message of several lines; so does a \\ at a line's end")]
    shown += [("Ctrl-C", "ends an answer, which stays as far as it came"), ("Ctrl-D", "ends the chat")]
    return Outcome("\n".join(f"{name:<19} {words}" for name, words in shown))


def _reset(desk: Desk, _: str) -> Outcome:
    desk.talk.messages.clear()
    return Outcome("a new conversation")


def _undo(desk: Desk, _: str) -> Outcome:
    question = desk.talk.undo()
    return Outcome("there is nothing to take back" if question is None else f"taken back: {_short(question)}")


def _retry(desk: Desk, argument: str) -> Outcome:
    question = desk.talk.undo()
    if question is None:
        return Outcome("there is nothing to answer again")
    desk.talk.ask(question)
    if argument:
        desk.talk.set("seed", argument)
    elif "seed" in desk.talk.options:
        # the same seed would give the same answer
        desk.talk.options["seed"] += 1
        return Outcome(f"seed {desk.talk.options['seed']}", draws=True)
    return Outcome(draws=True)


def _system(desk: Desk, argument: str) -> Outcome:
    if argument:
        desk.talk.system = "" if argument == "off" else argument
    return Outcome(f"system: {desk.talk.system or 'none'}")


def _model(desk: Desk, argument: str) -> Outcome:
    desk.talk.model = argument or desk.talk.model
    return Outcome(f"model: {desk.talk.model}")


def _probs(desk: Desk, argument: str) -> Outcome:
    if argument not in ("", "on", "off"):
        raise ChatSessionError(f"probs is on or off, got {argument!r}")
    desk.talk.probs = argument == "on" if argument else not desk.talk.probs
    return Outcome(f"probabilities are {'on' if desk.talk.probs else 'off'}")


def _alternatives(desk: Desk, _: str) -> Outcome:
    if not desk.talk.probs:
        raise ChatSessionError("alternatives are there with /probs on, for the answers after it")
    return Outcome(shows_alternatives=True)


def _show(desk: Desk, _: str) -> Outcome:
    talk = desk.talk
    said = [f"{message['role']}: {message['content']}" for message in talk.messages]
    asked = [f"{name} {value}" for name, value in talk.options.items()]
    return Outcome("\n".join([f"model {talk.model}", f"system: {talk.system or 'none'}", *asked, *said]))


def _save(desk: Desk, argument: str) -> Outcome:
    path = Path(argument) if argument else desk.path
    if path is None:
        raise ChatSessionError("/save needs a file")
    desk.talk.save(path)
    desk.path = path
    return Outcome(f"saved to {path}, now and after each answer")


def _load(desk: Desk, argument: str) -> Outcome:
    if not argument:
        raise ChatSessionError("/load needs a file")
    desk.talk.load(Path(argument))
    desk.path = Path(argument)
    return Outcome(f"{len(desk.talk.messages)} messages from {argument}, saved there after each answer")


def _option(name: str) -> Callable[[Desk, str], Outcome]:
    def run(desk: Desk, argument: str) -> Outcome:
        if argument:
            desk.talk.set(name, argument)
        elif name == "seed" and "seed" not in desk.talk.options and desk.seeds:
            return Outcome(f"seed off; the last answer had {desk.seeds[-1]}")
        return Outcome(f"{name} {desk.talk.options.get(name, 'off')}")

    return run


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."


COMMANDS: dict[str, Command] = {
    "help": Command("", "this list", _help),
    "reset": Command("", "forget all messages", _reset),
    "undo": Command("", "take the last question and its answer back", _undo),
    "retry": Command("[SEED]", "draw the last answer again, with the next seed or this one", _retry),
    "system": Command("[TEXT|off]", "the system message", _system),
    "model": Command("[NAME]", "the model", _model),
    "seed": Command("[N|off]", "the same seed gives the same answers", _option("seed")),
    "temperature": Command("[X|off]", "0: greedy", _option("temperature")),
    **{
        name: Command("[X|off]", "of the draw", _option(name))
        for name in OPTIONS
        if name not in ("seed", "temperature", "max_tokens")
    },
    "max_tokens": Command("[N|off]", "of each answer", _option("max_tokens")),
    "probs": Command("[on|off]", "colour tokens by their probability", _probs),
    "alternatives": Command("", "the last answer's tokens, and what else was likely", _alternatives),
    "show": Command("", "the conversation and its options", _show),
    "save": Command("[FILE]", "keep the conversation in a file, from now on", _save),
    "load": Command("FILE", "go on with a conversation from a file", _load),
    "exit": Command("", "end", lambda _, __: Outcome(ends=True)),
}
_OTHER_NAMES = {
    "new": "reset",
    "clear": "reset",
    "quit": "exit",
    "bye": "exit",
    "?": "help",
    "history": "show",
}
