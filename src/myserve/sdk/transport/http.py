"""Sends HTTP requests: a small protocol, and aiohttp behind it. No type of aiohttp shows anywhere else.

aiohttp was chosen by measurement: 0.5 ms of client CPU a request at 512 concurrent streams, httpx 11 ms.
"""

from __future__ import annotations

import asyncio
import errno
import threading
import weakref
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from myserve.sdk.concurrency.fork import reset_after_fork
from myserve.sdk.errors import AttemptFailed, Failure

if TYPE_CHECKING:
    import aiohttp  # imported at the first request otherwise: 0.2 s that `import myserve.sdk` need not take

__all__ = ["AiohttpTransport", "Reply", "Transport", "describe", "proxy_for", "unpacked"]


class Reply(Protocol):
    """An answer whose head has arrived. Header names are lower case."""

    @property
    def status(self) -> int: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body as it arrives; `AttemptFailed` when it is cut."""
        ...


class Transport(Protocol):
    """Sends one request. Failures of the connection are `AttemptFailed`; an HTTP error status is a reply."""

    def request(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None
    ) -> AbstractAsyncContextManager[Reply]: ...
    async def aclose(self) -> None: ...


class _HttpSession(NamedTuple):
    holder: AsyncGenerator[aiohttp.ClientSession]
    session: aiohttp.ClientSession


class AiohttpTransport:
    """Send requests through one aiohttp session per event loop, opened at the first request, closed with its loop.

    `stall_timeout`: seconds without a byte after which a connection counts as dead. Redirects are never followed: the
    key and the prompt go to the address that the caller named, and nowhere else. A proxy is taken from the environment
    as other Python clients do (`HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY`, `NO_PROXY`); localhost too goes through it
    unless `NO_PROXY` names it. (aiohttp's `trust_env` was rejected: it also sends passwords out of ~/.netrc.)
    """

    def __init__(self, stall_timeout: float = 300.0, connect_timeout: float = 10.0) -> None:
        self._stall_timeout = stall_timeout
        self._connect_timeout = connect_timeout
        self._sessions: dict[asyncio.AbstractEventLoop, _HttpSession] = {}
        self._proxies: dict[
            str, str | None
        ] = {}  # of each origin: reading the environment takes longer than a request
        # For a transport that is dropped while its loop lives on, and for loops that outlive the program.
        weakref.finalize(self, _close_all, self._sessions)
        reset_after_fork(self)

    def _after_fork(self) -> None:
        _parents.append(dict(self._sessions))
        self._sessions.clear()

    @asynccontextmanager
    async def request(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None
    ) -> AsyncGenerator[Reply]:
        """Send one request and give its reply; `AttemptFailed` when the connection fails. See `Transport`."""
        import aiohttp

        session = await self._session()
        # Compressed answers are not asked for. A gateway may compress all the same: what it sends is unpacked by parts,
        # for a kilobyte may hold a gigabyte, and those who read count what they get.
        sent = {"accept-encoding": "identity", **headers}
        try:
            async with session.request(
                method, url, headers=sent, data=body, allow_redirects=False, proxy=self._proxy(url)
            ) as response:
                encoding = response.headers.get("content-encoding", "identity").strip().lower()
                if encoding not in ("identity", *_PACKED):
                    message = f"the answer is compressed ({encoding[:40]}), which was not asked for"
                    raise AttemptFailed(Failure("protocol", message))
                yield _AiohttpReply(response, is_packed=encoding in _PACKED)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise AttemptFailed(Failure("transport", describe(error))) from error

    async def aclose(self) -> None:
        """Close the running loop's session. Those of other loops close with their loops."""
        held = self._sessions.get(asyncio.get_running_loop())
        if held is not None:
            await held.holder.aclose()

    def _proxy(self, url: str) -> str | None:
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc}"
        if origin not in self._proxies:
            self._proxies[origin] = proxy_for(parts.scheme, parts.netloc)
        return self._proxies[origin]

    async def _session(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        if loop not in self._sessions:
            import aiohttp

            timeout = aiohttp.ClientTimeout(
                total=None, sock_connect=self._connect_timeout, sock_read=self._stall_timeout
            )
            # No limit here: the semaphore admits, and a second limit would only hide it.
            connector = aiohttp.TCPConnector(limit=0)
            session = aiohttp.ClientSession(
                connector=connector,
                timeout=timeout,
                read_bufsize=2**18,
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(loop=loop),
            )
            holder = _hold(session, self._sessions, loop)
            self._sessions[loop] = _HttpSession(holder, session)
            await anext(holder)
        return self._sessions[loop].session


def proxy_for(scheme: str, host: str) -> str | None:
    """Return the proxy that the environment names for `scheme` and `host`, or None.

    Raises ValueError for one that does not speak HTTP: going around it in silence would be worse.
    """
    proxies = getproxies()
    proxy = proxies.get(scheme) or proxies.get("all")
    if not proxy or proxy_bypass(host):
        return None
    if "://" not in proxy:
        proxy = f"http://{proxy}"
    if urlsplit(proxy).scheme not in ("http", "https"):
        raise ValueError(
            f"the environment's proxy {proxy!r} does not speak HTTP: name another, or {host} in NO_PROXY"
        )
    return proxy


# Sessions that a forked child has from its parent. They are kept, and never closed: their sockets, and the epoll that
# watches them, are the parent's too.
_parents: list[dict[asyncio.AbstractEventLoop, _HttpSession]] = []


async def _hold(
    session: aiohttp.ClientSession,
    sessions: dict[asyncio.AbstractEventLoop, _HttpSession],
    loop: asyncio.AbstractEventLoop,
) -> AsyncGenerator[aiohttp.ClientSession]:
    """Closes a session with its loop: `asyncio.run` ends the async generators before it closes the loop.

    So a sampler that was never closed leaves nothing open, and the next `asyncio.run` has a session of its own.
    """
    try:
        yield session
    finally:
        sessions.pop(loop, None)
        await session.close()


def _close_all(sessions: dict[asyncio.AbstractEventLoop, _HttpSession]) -> None:
    for loop, held in list(sessions.items()):
        if loop.is_running():
            closing = asyncio.run_coroutine_threadsafe(held.holder.aclose(), loop)
            if threading.current_thread() is threading.main_thread() and not _is_running_here():
                closing.result(timeout=1.0)  # at the program's end: the loop's thread is about to be frozen


def _is_running_here() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


_PACKED = ("gzip", "x-gzip", "deflate")
_PIECE_BYTES = 2**18  # that are unpacked at a time


class _AiohttpReply:
    def __init__(self, response: aiohttp.ClientResponse, *, is_packed: bool = False) -> None:
        self._response = response
        self._is_packed = is_packed
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.headers.items()}

    def chunks(self) -> AsyncIterator[bytes]:
        chunks = self._response.content.iter_any()
        return unpacked(chunks) if self._is_packed else chunks


async def unpacked(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Give the bytes of a gzip or zlib stream as they come, in pieces of 256 KiB at most.

    Raises `AttemptFailed` for what is none, or ends early.
    """
    packer = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # with either head
    try:
        async for data in chunks:
            piece = b""
            while data or len(piece) == _PIECE_BYTES:  # a full piece may have more behind it
                piece = packer.decompress(data, _PIECE_BYTES)
                if piece:
                    yield piece
                data = packer.unconsumed_tail
            if packer.unused_data:
                raise AttemptFailed(Failure("protocol", "bytes came after the end of the compressed answer"))
    except zlib.error as error:
        raise AttemptFailed(Failure("protocol", f"the compressed answer is broken: {error}")) from error
    if not packer.eof:
        raise AttemptFailed(Failure("transport", "the compressed answer ended early"))


def describe(error: BaseException) -> str:
    """Return the error's own words, or its name where it has none; and what to do about too many open files."""
    text = str(error)
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        text += " (each request in flight is one: pass a concurrency_controller, or raise `ulimit -n`)"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
