"""A way to PostgreSQL that can be cut, turned into a black hole, or broken around a COMMIT.

Passes bytes on and understands no message, except that it looks for one that commits: a publisher's COMMIT, or a
worker's completion, which commits in the same message.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from contextlib import suppress
from types import TracebackType
from typing import Final, Literal, Self, TypeAlias

Cut: TypeAlias = Literal["before", "after"]
Streams: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]
_CHUNK: Final = 65536
_COMMITS: Final = re.compile(rb"COMMIT;?\0|\.complete\(")


class Proxy:
    """Listens on 127.0.0.1, and passes on to a unix socket.

    Args:
        socket_path: The server's.

    Attributes:
        cuts: How many COMMITs were cut off, before the server got them and after it answered.
    """

    def __init__(self, socket_path: str) -> None:
        self.cuts: dict[Cut, int] = {"before": 0, "after": 0}
        self._path = socket_path
        self._server: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._armed: list[Cut] = []

    @property
    def port(self) -> int:
        """The port it listens on."""
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def reset(self) -> int:
        """Break every connection, with RST on both sides; return how many."""
        links = tuple(self._links)
        for link in links:
            link.reset()
        return len(links)

    def freeze(self) -> int:
        """Turn every connection into a black hole, until `reset()`; return how many. New connections work."""
        for link in self._links:
            link.thawed.clear()
        return len(self._links)

    def cut_commit(self, how: Cut) -> None:
        """Break the connection that commits next: before the server gets it, or after, its answer lost."""
        self._armed.append(how)

    def disarm(self) -> None:
        """Cut no COMMIT any more."""
        self._armed.clear()

    def take(self, chunk: bytes) -> Cut | None:
        """Return what is to happen to the connection that sends *chunk*."""
        return self._armed.pop(0) if self._armed and _COMMITS.search(chunk) else None

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

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve((reader, writer)), name="proxy")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, client: Streams) -> None:
        with suppress(OSError):
            try:
                server = await asyncio.open_unix_connection(self._path)
            except OSError:  # it restarts
                _abort(client[1])
                return
            link = _Link(self, client, server)
            self._links.add(link)
            try:
                await link.run()
            finally:
                self._links.discard(link)
                for _, writer in (client, server):
                    writer.close()


class _Link:
    """One connection of a client, and its connection to the server."""

    def __init__(self, proxy: Proxy, client: Streams, server: Streams) -> None:
        self.thawed = asyncio.Event()
        self.thawed.set()
        self._proxy = proxy
        self._client, self._server = client, server
        self._silenced = False

    async def run(self) -> None:
        up, down = (asyncio.ensure_future(way) for way in (self._upward(), self._downward()))
        try:
            await asyncio.wait([up, down], return_when=asyncio.FIRST_COMPLETED)
            await self.thawed.wait()  # the other side of a black hole must not notice
        finally:
            for way in (up, down):
                way.cancel()
            await asyncio.gather(up, down, return_exceptions=True)

    def reset(self) -> None:
        _abort(self._client[1])
        _abort(self._server[1])
        self.thawed.set()

    async def _upward(self) -> None:
        while chunk := await self._client[0].read(_CHUNK):
            await self.thawed.wait()
            cut = self._proxy.take(chunk)
            if cut == "before":
                self._proxy.cuts["before"] += 1
                self.reset()
                return
            self._silenced = self._silenced or cut == "after"
            self._server[1].write(chunk)
            await self._server[1].drain()

    async def _downward(self) -> None:
        while chunk := await self._server[0].read(_CHUNK):
            await self.thawed.wait()
            if self._silenced:
                self._proxy.cuts["after"] += 1
                self.reset()
                return
            self._client[1].write(chunk)
            await self._client[1].drain()


def _abort(writer: asyncio.StreamWriter) -> None:
    connected = writer.get_extra_info("socket")
    with suppress(OSError):
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
