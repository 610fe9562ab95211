"""A proxy between a client and PostgreSQL that can fail on purpose; it understands just enough of the protocol.

Speaks TCP on 127.0.0.1, never TLS, and changes no message: it passes one on or it does not.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

from sqlalchemy import URL

_ENCRYPT = (80877103, 80877104)  # TLS and GSSAPI: both are declined with one byte
_SYNC = b"S\0\0\0\4"

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Proxy:
    """A way to the server that can be cut.

    Args:
        upstream: The server; a unix socket or TCP.

    Attributes:
        refusing: New connections are closed at once.
        silent: New connections are accepted, and never answered.
        hidden: Types of server messages that are not passed on, for example `b"A"`, NotificationResponse.
    """

    def __init__(self, upstream: URL) -> None:
        self.refusing = False
        self.silent = False
        self.hidden: set[bytes] = set()
        self._upstream = upstream
        self._server: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._cut: _Cut | None = None
        self._healed = asyncio.Event()

    @property
    def url(self) -> URL:
        """The address of the proxy, with the user and the database of the server behind it."""
        if self._server is None:
            raise RuntimeError("The proxy is not open.")
        host, port = self._server.sockets[0].getsockname()
        return self._upstream.set(host=host, port=port).difference_update_query(["host", "port"])

    def text_url(self) -> str:
        """Return `url` as settings take it."""
        return self.url.render_as_string(hide_password=False)

    def __len__(self) -> int:
        """Return how many connections there are, the frozen ones included."""
        return len(self._links)

    def reset(self) -> None:
        """Break every connection, with RST on both sides."""
        for link in tuple(self._links):
            link.reset()

    def lead_to(self, upstream: URL) -> None:
        """Lead new connections to another server; those that are there stay where they lead."""
        self._upstream = upstream

    def freeze(self) -> None:
        """Turn every connection into a black hole for ever; neither side learns when the other one goes.

        New connections work.
        """
        for link in self._links:
            link.frozen = True

    def heal(self) -> None:
        """Break nothing any more; connections that are there are reset, so that none stays frozen."""
        self.refusing, self.silent, self._cut = False, False, None
        self._healed.set()
        self._healed = asyncio.Event()
        self.hidden.clear()
        self.reset()

    def cut_at(self, needle: bytes, how: Literal["before", "after", "freeze"]) -> asyncio.Event:
        """Break the next connection that executes a statement whose text holds *needle*; the others stay.

        Args:
            needle: Part of the statement.
            how: Reset before the server gets the statement; or after it has executed it, the answer lost, which must
                hold a row (an answer without one is passed on, and the next one awaited); or frozen before the
                server gets it.

        Returns:
            Set when it has happened.
        """
        self._cut = _Cut(needle, how)
        return self._cut.happened

    def hold_at(self, needle: bytes) -> tuple[asyncio.Event, asyncio.Event]:
        """Keep back the next statement whose text holds *needle*.

        Returns:
            What is set when that has happened; and what the test sets for the statement to go on.
        """
        self._cut = cut = _Cut(needle, "hold")
        return cut.happened, cut.released

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.reset()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def take_cut(self, sql: bytes) -> _Cut | None:
        """Return what is to happen to a connection that executes *sql*, once."""
        if self._cut is None or self._cut.needle not in sql:
            return None
        cut, self._cut = self._cut, None
        return cut

    def give_back(self, cut: _Cut) -> None:
        """Wait for another statement to cut at."""
        self._cut = cut

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve((reader, writer)), name="proxy")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, client: Streams) -> None:
        async with _closing(client):
            if self.refusing:
                return
            if self.silent:
                await self._healed.wait()
                return
            with suppress(OSError, EOFError):
                server = await connect(self._upstream)
                async with _closing(server):
                    link = _Link(self, client, server)
                    self._links.add(link)
                    try:
                        await link.run()
                    finally:
                        self._links.discard(link)


@dataclass
class _Cut:
    needle: bytes
    how: Literal["before", "after", "freeze", "hold"]
    happened: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)


class _Link:
    """One connection of a client and its connection to the server."""

    def __init__(self, proxy: Proxy, client: Streams, server: Streams) -> None:
        self.frozen = False
        self._proxy = proxy
        self._client, self._server = client, server
        self._statements: dict[bytes, bytes] = {}
        self._lost_answer: _Cut | None = None
        self._kept: list[tuple[bytes, bytes]] = []

    async def run(self) -> None:
        up, down = (asyncio.ensure_future(way) for way in (self._upward(), self._downward()))
        try:
            await asyncio.wait([up, down], return_when=asyncio.FIRST_COMPLETED)
            if self.frozen:
                await asyncio.Event().wait()  # the other side must not notice
        finally:
            for way in (up, down):
                way.cancel()
            await asyncio.gather(up, down, return_exceptions=True)

    def reset(self) -> None:
        for _, writer in (self._client, self._server):
            connected: socket.socket = writer.get_extra_info("socket")
            with suppress(OSError):
                connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def _upward(self) -> None:
        reader, writer = self._client[0], self._server[1]
        writer.write(await read_startup(self._client))
        while True:
            kind, body = await read_message(reader)
            if self.frozen:
                continue
            sql = self._executed(kind, body)
            if sql is not None and (cut := self._proxy.take_cut(sql)) is not None:
                if cut.how == "after":
                    self._lost_answer = cut
                elif cut.how == "hold":
                    cut.happened.set()
                    await cut.released.wait()
                else:
                    cut.happened.set()
                    if cut.how == "before":
                        self.reset()
                        return
                    self.frozen = True
                    continue
            writer.write(_message(kind, body))
            await writer.drain()

    async def _downward(self) -> None:
        reader, writer = self._server[0], self._client[1]
        while True:
            kind, body = await read_message(reader)
            if self._lost_answer is not None:
                self._kept += [(kind, body)]
                if kind != b"Z":
                    continue
                if b"D" in {kind for kind, _ in self._kept}:
                    self.reset()
                    self._lost_answer.happened.set()
                    return
                self._proxy.give_back(self._lost_answer)
                kept, self._kept, self._lost_answer = self._kept, [], None
                writer.write(b"".join(_message(kind, body) for kind, body in kept))
                continue
            if not (self.frozen or kind in self._proxy.hidden):
                writer.write(_message(kind, body))
                await writer.drain()

    def _executed(self, kind: bytes, body: bytes) -> bytes | None:
        """Return the text of the statement that this message executes, if it does."""
        if kind == b"P":
            name, sql, _ = body.split(b"\0", 2)
            self._statements[name] = sql
        elif kind == b"B":
            _, name, _ = body.split(b"\0", 2)
            return self._statements.get(name)
        elif kind == b"Q":
            return body
        return None


class TransactionPooler:
    """What a transaction pooler does to a session: each transaction may run on another server connection.

    Two server connections for each client, taken in turns; statements are prepared on both. What the server says
    between transactions is lost.

    Args:
        upstream: The server; it must trust its clients.
    """

    def __init__(self, upstream: URL) -> None:
        self._upstream = upstream
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def text_url(self) -> str:
        """Return the address of the pooler, as settings take it."""
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()
        url = self._upstream.set(host=host, port=port).difference_update_query(["host", "port"])
        return url.render_as_string(hide_password=False)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve((reader, writer)), name="pooler")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, client: Streams) -> None:
        async with _closing(client):
            with suppress(OSError, EOFError):
                first, second = await connect(self._upstream), await connect(self._upstream)
                async with _closing(first), _closing(second):
                    await self._pool(client, [first, second])

    async def _pool(self, client: Streams, servers: list[Streams]) -> None:
        startup = await read_startup(client)
        for server in servers:
            server[1].write(startup)
            greeting = await _until(server, b"Z")
            if server is servers[0]:
                client[1].write(greeting)
        while True:
            kinds = set[bytes]()
            request, idle = b"", False
            while not kinds & {b"S", b"Q", b"H", b"X"}:
                kind, body = await read_message(client[0])
                kinds.add(kind)
                request += _message(kind, body)
            if b"X" in kinds:
                return
            if b"H" in kinds:  # prepared, and executed in a later message
                servers[1][1].write(request + _SYNC)
                await _until(servers[1], b"Z")
                servers[0][1].write(request)
                client[1].write(await _until(servers[0], b"TnE"))
                continue
            everywhere = not kinds & {b"E", b"Q"}
            for server in servers if everywhere else servers[:1]:
                server[1].write(request)
                answer = await _until(server, b"Z")
                if server is servers[0]:
                    client[1].write(answer)
                    idle = answer.endswith(b"I")
            if not everywhere and idle:
                servers.reverse()


async def _until(server: Streams, last: bytes) -> bytes:
    """Return what the server answered, up to and with the first message of one of the types *last*."""
    answer = b""
    while True:
        kind, body = await read_message(server[0])
        if kind != b"A":
            answer += _message(kind, body)
        if kind in last:
            return answer


async def connect(upstream: URL) -> Streams:
    """Return a connection to *upstream*."""
    if upstream.host:
        return await asyncio.open_connection(upstream.host, upstream.port or 5432)
    directory, port = upstream.query["host"], upstream.query.get("port", "5432")
    return await asyncio.open_unix_connection(f"{directory}/.s.PGSQL.{port}")


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!i", len(body) + 4) + body


async def read_message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Return the type and the body of the next message."""
    kind, length = struct.unpack("!ci", await reader.readexactly(5))
    return kind, await reader.readexactly(length - 4)


async def read_startup(client: Streams) -> bytes:
    """Return the client's first message; encryption is declined."""
    reader, writer = client
    while True:
        head = await reader.readexactly(8)
        length, code = struct.unpack("!ii", head)
        if code not in _ENCRYPT:
            break
        writer.write(b"N")
    # A request to cancel a query has the same shape, and so passes like a connection.
    return head + await reader.readexactly(length - 8)


@asynccontextmanager
async def _closing(streams: Streams) -> AsyncIterator[None]:
    try:
        yield
    finally:
        streams[1].close()
        with suppress(OSError):
            await streams[1].wait_closed()
