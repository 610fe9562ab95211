"""A primary and its standby: two servers of the PostgreSQL under test, streaming."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from pydantic import SecretStr

from pgebus import DatabaseSettings
from pgebus.embedded import EmbeddedPostgres
from tests.embedded import embedded

_ORDINARY_USER = "nobody"


class Standby(EmbeddedPostgres):
    """A copy of *primary*, made while that is down, which then streams from it.

    Args:
        primary: It must have been started, and shut down.
    """

    def __init__(self, primary: EmbeddedPostgres) -> None:
        super().__init__(programs=primary._programs)
        self._primary = primary

    def start(self) -> Self:
        home = self._home = Path(tempfile.mkdtemp(prefix="pgebus-", dir="/tmp"))
        self._prepare(home)
        data = home / "data"
        shutil.copytree(Path(self._primary.host) / "data", data)
        with (data / "postgresql.conf").open("a") as conf:
            conf.write(
                f"unix_socket_directories = '{home}'\nsynchronous_standby_names = ''\nprimary_conninfo = "
                f"'host={self._primary.host} port={self.port} user={self.user} application_name=standby'\n"
            )
        (data / "standby.signal").touch()
        if os.geteuid() == 0:
            for path in (data, *data.rglob("*")):
                shutil.chown(path, _ORDINARY_USER)
        data.chmod(0o700)
        return self

    def promote(self) -> None:
        """Make it a primary; return when it is one."""
        self._pg_ctl("promote")


@contextmanager
def primary_and_standby() -> Iterator[tuple[EmbeddedPostgres, Standby]]:
    """Start both; the primary does not wait for its standby yet."""
    with embedded() as primary:
        primary.shut_down()
        with Standby(primary) as standby:
            primary.start_again()
            standby.start_again()
            yield primary, standby


def reaching(*servers: EmbeddedPostgres, name: str, attributes: str = "read-write") -> DatabaseSettings:
    """Return settings with several hosts: the first of these servers that may be written."""
    hosts = ",".join(server.host for server in servers)
    ports = ",".join(str(server.port) for server in servers)
    url = f"postgresql://postgres@/{name}?host={hosts}&port={ports}&target_session_attrs={attributes}"
    return DatabaseSettings(url=SecretStr(url), connect_timeout_seconds=5.0)
