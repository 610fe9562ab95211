"""A proxy that numbers the messages of a conversation, and cuts the connection at one of them.

Every message of both sides is parsed as far as its type; none is changed. Where the server is to have executed a
message whose reply is lost, the proxy adds a Flush, so that it sees the reply itself.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Literal, Self, TypeAlias

from sqlalchemy import URL

from tests.system.proxy import Streams, connect, read_message, read_startup

Origin: TypeAlias = Literal["client", "server"]
When: TypeAlias = Literal["before", "after"]
How: TypeAlias = Literal["RST", "FIN", "black hole", "SIGKILL"]

_CLIENT: Final = {
    b"": "startup", b"p": "password", b"Q": "Query", b"P": "Parse", b"B": "Bind", b"D": "Describe", b"E": "Execute",
    b"C": "Close", b"S": "Sync", b"H": "Flush", b"X": "Terminate",
}  # fmt: skip
_SERVER: Final = {
    b"R": "Authentication", b"K": "BackendKeyData", b"S": "ParameterStatus", b"Z": "ReadyForQuery",
    b"1": "ParseComplete", b"2": "BindComplete", b"3": "CloseComplete", b"t": "ParameterDescription",
    b"T": "RowDescription", b"D": "DataRow", b"C": "CommandComplete", b"E": "ErrorResponse", b"N": "NoticeResponse",
    b"n": "NoData", b"A": "NotificationResponse", b"I": "EmptyQueryResponse", b"s": "PortalSuspended",
}  # fmt: skip
# What ends the server's reply to a message: when that has come, it was executed.
_REPLY_ENDS: Final = {
    b"": b"RE", b"p": b"RE", b"Q": b"Z", b"P": b"1E", b"B": b"2E", b"D": b"TnE", b"E": b"CEIs", b"C": b"3E",
    b"S": b"Z", b"H": b"TnE",
}  # fmt: skip
# One message ends a transaction and begins the next, for a delivery that the worker has reserved.
ENDS_AND_BEGINS: Final = "Query that ends and begins"
_TERMINATE: Final = b"X"
_NEEDS_FLUSH: Final = b"PBDEC"
_FLUSH: Final = b"H\0\0\0\4"
_CANCEL_REQUEST: Final = 80877102


@dataclass(frozen=True)
class Cut:
    """Where a connection is cut, and how.

    Attributes:
        role: Which connections are counted together.
        origin: Whose messages are counted.
        number: At which of them, from 1.
        when: Before it is passed on; or after that, and for a message of the client: when the server has executed it,
            and the reply does not arrive.
        how: With RST or FIN on both sides; or bytes are accepted and nothing is answered; or by SIGKILL of the client.
    """

    role: str
    origin: Origin
    number: int
    when: When
    how: How


@dataclass
class Armed:
    """A cut that waits for its message.

    Attributes:
        happened: Set when it was made.
        message: The name of the message that it was made at.
        deserted: Set when the client has given up the connection that was cut.
        trace: The names of all messages that were counted.
    """

    cut: Cut
    only_new: bool
    happened: asyncio.Event = field(default_factory=asyncio.Event)
    message: str = ""
    deserted: asyncio.Event = field(default_factory=asyncio.Event)
    trace: dict[Origin, list[str]] = field(default_factory=lambda: {"client": [], "server": []})
    taken: bool = False


class CuttingProxy:
    """A way to the server on which one message can be chosen.

    A connection has the role that its application name says, and a second one, which the first statement that tells
    something gives it.

    Args:
        upstream: The server.
        roles: Statements, and the role of a connection that executes them.
        kill: Kills the client.
    """

    def __init__(self, upstream: URL, roles: Mapping[str, str], kill: Callable[[], None] = lambda: None) -> None:
        self.kill = kill
        self.roles = {sql.encode(): role for sql, role in roles.items()}
        self._upstream = upstream
        self._server: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._armed: Armed | None = None

    def text_url(self) -> str:
        """Return the address of the proxy, as settings take it."""
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()
        url = self._upstream.set(host=host, port=port).difference_update_query(["host", "port"])
        return url.render_as_string(hide_password=False)

    def arm(self, cut: Cut, *, only_new: bool = False) -> Armed:
        """Cut at the message that *cut* says, counted from now; of connections that are made from now on, if so."""
        armed = self._armed = Armed(cut, only_new)
        for link in self._links:
            link.old = True
        return armed

    def heal(self) -> None:
        """Cut nothing any more; connections that were frozen are broken."""
        self._armed = None
        for link in tuple(self._links):
            if link.frozen:
                link.reset()

    def reset(self, role: str) -> None:
        """Break all connections of *role*."""
        for link in tuple(self._links):
            if role in link.roles:
                link.reset()

    def count(self, link: _Link, origin: Origin, kind: bytes, raw: bytes = b"") -> Armed | None:
        """Count a message; return what is to happen at it."""
        armed = self._armed
        if armed is None or armed.cut.role not in link.roles or (armed.only_new and link.old):
            return None
        name = (_CLIENT if origin == "client" else _SERVER).get(kind, repr(kind))
        if kind == b"Q" and b".complete(" in raw and b"BEGIN" in raw:
            name = ENDS_AND_BEGINS
        armed.trace[origin].append(name)
        if armed.taken or origin != armed.cut.origin or len(armed.trace[origin]) != armed.cut.number:
            return None
        armed.taken = True
        armed.message = name
        return armed

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for link in tuple(self._links):
            link.reset()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve((reader, writer)), name="cutting proxy")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, client: Streams) -> None:
        try:
            with suppress(OSError, EOFError):
                server = await connect(self._upstream)
                link = _Link(self, client, server)
                self._links.add(link)
                try:
                    await link.run()
                finally:
                    self._links.discard(link)
                    server[1].close()
        finally:
            client[1].close()


class _Link:
    """One connection of a client and its connection to the server."""

    def __init__(self, proxy: CuttingProxy, client: Streams, server: Streams) -> None:
        self.roles: set[str] = set()
        self.old = False
        self.frozen = False
        self._proxy = proxy
        self._client, self._server = client, server
        self._armed: Armed | None = None  # cut when the server has answered
        self._awaited = b""
        self._frozen_by: Armed | None = None

    async def run(self) -> None:
        up, down = (asyncio.ensure_future(way) for way in (self._upward(), self._downward()))
        try:
            await asyncio.wait([up, down], return_when=asyncio.FIRST_COMPLETED)
            if self._awaited == _TERMINATE and not down.done():
                await asyncio.wait([down])  # the server ends by itself
            if self._armed is not None:  # the end of the connection was the reply
                self._cut(self._armed)
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
        self.frozen = False

    def _cut(self, armed: Armed) -> None:
        self._armed = None
        match armed.cut.how:
            case "RST":
                self.reset()
            case "FIN":
                for _, writer in (self._client, self._server):
                    writer.close()
            case "black hole":
                self.frozen, self._frozen_by = True, armed
            case "SIGKILL":
                self._proxy.kill()
                self.reset()
        armed.happened.set()

    async def _upward(self) -> None:
        armed: Armed | None = None
        try:
            kind, raw = b"", await self._startup()
            while True:
                if not self.frozen:
                    armed = self._proxy.count(self, "client", kind, raw) if self.roles else None
                    if armed is not None and armed.cut.when == "before":
                        self._cut(armed)
                        if not self.frozen:
                            return
                    else:
                        await self._pass_up(kind, raw, armed)
                kind, body = await read_message(self._client[0])
                raw = kind + struct.pack("!i", len(body) + 4) + body
                if kind == b"P" and len(self.roles) == 1:
                    role = self._proxy.roles.get(body.split(b"\0", 2)[1])
                    self.roles |= {role} if role else set()
        finally:
            if self._frozen_by is not None:
                self._frozen_by.deserted.set()

    async def _pass_up(self, kind: bytes, raw: bytes, armed: Armed | None) -> None:
        if armed is not None:
            self._armed = armed
            self._awaited = _REPLY_ENDS.get(kind, _TERMINATE)
            raw += _FLUSH if kind and kind in _NEEDS_FLUSH else b""
        writer = self._server[1]
        writer.write(raw)
        await writer.drain()

    async def _startup(self) -> bytes:
        raw = await read_startup(self._client)
        if int.from_bytes(raw[4:8]) != _CANCEL_REQUEST:
            words = raw[8:].split(b"\0")
            given = dict(zip(words[::2], words[1::2], strict=False))
            self.roles.add(given.get(b"application_name", b"").decode())
        return raw

    async def _downward(self) -> None:
        reader, writer = self._server[0], self._client[1]
        while True:
            kind, body = await read_message(reader)
            if self.frozen:
                continue
            if self._armed is not None:
                if self._awaited != _TERMINATE and kind in self._awaited:
                    self._cut(self._armed)
                    if not self.frozen:
                        return
                continue
            armed = self._proxy.count(self, "server", kind) if self.roles else None
            if armed is None or armed.cut.when == "after":
                writer.write(kind + struct.pack("!i", len(body) + 4) + body)
                await writer.drain()
            if armed is not None:
                self._cut(armed)
                if not self.frozen:
                    return
