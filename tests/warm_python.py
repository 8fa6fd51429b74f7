"""A Python that has imported PyTorch, transformers and the engine: `[*warm_python(), "-m", "myserve", "serve"]`.

Each command is a process of its own: a fork of one that has imported and computed nothing. It has the arguments,
environment, folder and streams of the command; signals reach it, and its end is the command's. A start costs eight
seconds of CPU less than Python's own, which tests of starts, imports, signals to groups and environment variables of
libraries keep (`sys.executable`).
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

__all__ = ["warm_python"]

# What the command itself runs, before any import of weight: it hands its streams over, and waits.
_CLIENT = r"""
import json, os, signal, socket, struct, sys
warm = socket.socket(socket.AF_UNIX)
warm.connect(sys.argv[1])
body = json.dumps([sys.argv[2:], dict(os.environ), os.getcwd()]).encode()
socket.send_fds(warm, [struct.pack("!I", len(body))], [0, 1, 2])
warm.sendall(body)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, _: warm.send(bytes([number])))
told = warm.recv(4)
status = struct.unpack("!i", told)[0] if told else 70
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@cache
def warm_python() -> tuple[str, ...]:
    """Return what stands in the place of `sys.executable`."""
    folder = tempfile.mkdtemp(prefix="warm-python-")
    path = f"{folder}/socket"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    template = subprocess.Popen(
        [sys.executable, __file__, str(listener.fileno())],
        pass_fds=[listener.fileno()],
        stdin=subprocess.PIPE,
    )
    listener.close()

    def end() -> None:
        assert template.stdin is not None
        template.stdin.close()
        template.wait()
        Path(path).unlink()
        Path(folder).rmdir()

    atexit.register(end)
    return (sys.executable, "-I", "-S", "-c", _CLIENT, path)


def _serve(listener: socket.socket) -> None:
    """Fork for each command, until our own input ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        readable, _, _ = select.select([listener, 0], [], [])
        if 0 in readable:
            return
        asked, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            _watch(asked)
            os._exit(0)
        asked.close()


def _watch(asked: socket.socket) -> None:
    """Run one command in a fork; hand it signals, and tell its end. Where the command is killed, so is the fork."""
    head, streams, _, _ = socket.recv_fds(asked, 4, 3)
    body = b""
    while len(body) < struct.unpack("!I", head)[0]:
        body += asked.recv(1 << 16)
    arguments, environment, folder = json.loads(body)
    pid = os.fork()
    if pid == 0:
        asked.close()
        _become(arguments, environment, folder, streams)
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(pid)
    while True:
        readable, _, _ = select.select([asked, ended], [], [])
        if ended in readable:
            asked.sendall(struct.pack("!i", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
            return
        numbers = asked.recv(16)
        for number in numbers or [signal.SIGKILL]:
            os.kill(pid, number)
        if not numbers:
            return


def _become(arguments: list[str], environment: dict[str, str], folder: str, streams: list[int]) -> None:
    """Be `python ARGUMENTS`, and end as it does: this process's own modules end with it."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    kind, what, *rest = arguments
    sys.argv = [kind, *rest]
    sys.path[0] = ""
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        main = sys.modules["__main__"] = type(sys)("__main__")
        exec(compile(what, "<string>", "exec"), main.__dict__)
    sys.exit()


if __name__ == "__main__":
    inherited = socket.socket(fileno=int(sys.argv[1]))
    import myserve.cli
    import myserve.engine.engine
    import myserve.server.app  # noqa: F401

    gc.freeze()
    _serve(inherited)
