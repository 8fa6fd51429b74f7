"""API keys lie in a file that is read again when it changes; they are compared in constant time and never shown."""

from __future__ import annotations

import hashlib
import hmac
import logging
from pathlib import Path

from myserve.errors import RequestError

__all__ = ["KeyFile"]

log = logging.getLogger("myserve.server")

# of a file: modification time, size, inode
Version = tuple[int, int, int]


class KeyFile:
    """A file with a key a line, each with its owner's name for the log if wanted. `#` begins a comment.

    To rotate: add the new key, let the clients change, remove the old one. Each change counts from the next request
    on; a file that cannot be read, or has no key, changes nothing and is an error in the log.

    >>> path = getfixture("tmp_path") / "keys"
    >>> _ = path.write_text("sk-1 alice\\nsk-2  # spare\\n")
    >>> keys = KeyFile(path)
    >>> keys.owner("sk-1"), keys.owner("sk-2"), keys.owner("sk-3")
    ('alice', 'key 2', None)
    """

    def __init__(self, path: str | Path) -> None:
        """Read the file. Raises RequestError for one without keys: a server meant to be locked must not be open."""
        self._path = Path(path)
        self._version = self._version_now()
        self._owners = self._read()

    def owner(self, key: str) -> str | None:
        """Return the key's owner; None for an unknown key. Takes as long for a wrong key as for a right one."""
        self._read_again_if_changed()
        asked = _digest(key)
        found = None
        for digest, owner in self._owners:
            if hmac.compare_digest(digest, asked):
                found = owner
        return found

    def _read_again_if_changed(self) -> None:
        try:
            version = self._version_now()
            if version != self._version:
                self._version = version
                self._owners = self._read()
                log.info("%s: %d keys", self._path, len(self._owners))
        except RequestError as error:
            log.error("%s; the keys read before stay good", error)

    def _version_now(self) -> Version:
        try:
            stat = self._path.stat()
        except OSError as error:
            raise RequestError(f"the keys in {self._path} cannot be read: {error.strerror}") from error
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> list[tuple[bytes, str]]:
        try:
            lines = self._path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"the keys in {self._path} cannot be read: {type(error).__name__}") from error
        words = [line.partition("#")[0].split(maxsplit=1) for line in lines]
        owners = [
            (_digest(key), name[0].strip() if name else f"key {number}")
            for number, (key, *name) in enumerate(filter(None, words), start=1)
        ]
        if not owners:
            raise RequestError(f"{self._path} has no keys; write one a line")
        return owners


def _digest(key: str) -> bytes:
    """Return a digest, whose length tells nothing of the key's."""
    return hashlib.sha256(key.encode()).digest()
