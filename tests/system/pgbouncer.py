"""A real PgBouncer in transaction mode, in front of the server under test.

The program is `pgbouncer` on the PATH, or what PGEBUS_TEST_PGBOUNCER names.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import asyncpg
import pytest
from sqlalchemy import URL

from tests.system.waiting import until

# What asyncpg and SQLAlchemy need where PgBouncer knows no prepared statements: before 1.21, or told so.
UNPREPARED: Final = {"statement_cache_size": 0, "prepared_statement_cache_size": 0}
# It refuses to run as root.
_ORDINARY_USER: Final = "nobody"
_SBIN: Final = "/usr/sbin"


def find_pgbouncer() -> str:
    """Return the path of the program; without it, the test is skipped."""
    program = os.environ.get("PGEBUS_TEST_PGBOUNCER")
    if program is None:
        program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:{_SBIN}")
    if program is None:
        pytest.skip("NO PGBOUNCER: install it (apt-get install pgbouncer), or name it in PGEBUS_TEST_PGBOUNCER")
    return program


class PgBouncer:
    """One process, on a TCP port of its own, that may be killed and started again.

    Args:
        upstream: The server behind it.
        pool_size: Server connections for each database: far fewer than it has clients, in these tests.
        **settings: More of `pgbouncer.ini`.
    """

    def __init__(self, upstream: URL, *, pool_size: int = 4, **settings: str) -> None:
        self._program = find_pgbouncer()
        self._upstream = upstream
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port: int = probe.getsockname()[1]
        self._home = Path(tempfile.mkdtemp(prefix="pgebus-pooler-", dir="/tmp"))
        self._settings = {
            "pool_mode": "transaction",
            "listen_addr": "127.0.0.1",
            "listen_port": str(self._port),
            "unix_socket_dir": "",
            "auth_type": "trust",
            "auth_file": str(self._home / "users"),
            "admin_users": "postgres",
            "default_pool_size": str(pool_size),
            "max_client_conn": "500",
            "server_login_retry": "0.2",
            "logfile": str(self._home / "log"),
            **settings,
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> URL:
        """The address of the pooler, with the user and the database of the server behind it."""
        return self._upstream.set(host="127.0.0.1", port=self._port).difference_update_query(["host", "port"])

    def text_url(self) -> str:
        """Return `url` as settings take it."""
        return self.url.render_as_string(hide_password=False)

    async def __aenter__(self) -> Self:
        server = self._upstream
        host, port = server.host or server.query["host"], server.port or server.query.get("port", "5432")
        login = f"user={server.username}" + (f" password={server.password}" if server.password else "")
        lines = [f"{name} = {value}" for name, value in self._settings.items()]
        (self._home / "users").write_text(f'"{server.username}" ""\n"postgres" ""\n')
        (self._home / "pgbouncer.ini").write_text(
            "\n".join(["[databases]", f"* = host={host} port={port} {login}", "[pgbouncer]", *lines, ""])
        )
        if os.geteuid() == 0:
            for path in (self._home, *self._home.iterdir()):
                shutil.chown(path, _ORDINARY_USER)
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.kill()
        shutil.rmtree(self._home)

    async def start(self) -> None:
        """Start it, and wait until it takes connections."""
        self._process = subprocess.Popen(  # noqa: ASYNC220, S603 - a program of the system, which goes on beside us
            [self._program, "-q", str(self._home / "pgbouncer.ini")],
            user=_ORDINARY_USER if os.geteuid() == 0 else None,
            cwd=self._home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

        async def answers() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, (self._home / "log").read_text()
            with suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self._port)
                writer.close()
                await writer.wait_closed()
                return True
            return False

        await until(answers)

    async def kill(self) -> None:
        """Kill it with SIGKILL; harmless when it is dead."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            await asyncio.to_thread(self._process.wait)
            self._process = None

    async def command(self, words: str) -> None:
        """Say something on its admin console: PAUSE, RESUME, RECONNECT, KILL."""
        console = await asyncpg.connect(
            host="127.0.0.1", port=self._port, user="postgres", database="pgbouncer", timeout=5
        )
        try:
            await console.execute(words)
        finally:
            console.terminate()
