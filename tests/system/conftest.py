"""Child processes that never outlive their test, and the `pgebus` command."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Protocol

import pytest

from pgebus import DatabaseSettings
from pgebus._runtime import maintenance
from pgebus.cli.app import run
from tests.conftest import Server
from tests.system.bus import Sql
from tests.system.processes import Child, Inquest, watched
from tests.system.test_cli_check import environment, url_of
from tests.system.worker_process import TABLES, Orders, Pipe


class Spawn(Protocol):
    """Starts a child on the test's database, with the fields of its `Orders`."""

    def __call__(self, target: Callable[[Pipe, Orders], None], **orders: Any) -> Child: ...


@pytest.fixture
async def spawn(database: DatabaseSettings, sql: Sql) -> AsyncIterator[Spawn]:
    """Start children; whatever becomes of the test, they end with it."""
    await sql.execute(TABLES)
    children: list[Child] = []
    url = database.sqlalchemy_url().render_as_string(hide_password=False)

    def start(target: Callable[[Pipe, Orders], None], **orders: Any) -> Child:
        child = Child(target, Orders(**{"url": url, **orders}))
        children.append(child)
        return child

    yield start
    for child in children:
        child.bury()


class Command(Protocol):
    """Runs `pgebus` with arguments; returns its status, output and errors."""

    async def __call__(self, *arguments: str) -> tuple[int, str, str]: ...


@pytest.fixture
def command(
    database: DatabaseSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    """In this process, since starting Python takes most of a command's time."""

    def here(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pgebus", *arguments])
        with pytest.raises(SystemExit) as ended:
            run()
        return int(ended.value.code or 0), *capsys.readouterr()

    for name in set(os.environ) - set(environment()):
        monkeypatch.delenv(name)
    monkeypatch.setenv("PGEBUS_DATABASE__URL", url_of(database))
    monkeypatch.chdir(tmp_path)

    async def command(*arguments: str) -> tuple[int, str, str]:
        return await asyncio.to_thread(here, *arguments)

    return command


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the maintenance of every system in this process come round twenty times a second."""
    monkeypatch.setattr(maintenance, "LOOK_SECONDS", 0.05)


@pytest.fixture
async def another(server: Server, database: DatabaseSettings) -> AsyncIterator[Sql]:
    """Another plain connection, for somebody who stands in the way."""
    connection = await server.connect(database.sqlalchemy_url().database)
    yield connection
    connection.terminate()


@pytest.fixture
def inquest(monkeypatch: pytest.MonkeyPatch) -> Inquest:
    """Have a coroner in this process who looks often and knows nothing of fresh servers."""
    seen = Inquest()
    monkeypatch.setattr(maintenance, "Coroner", watched(seen, patient=False))
    monkeypatch.setattr(maintenance, "LOOK_SECONDS", 0.05)
    return seen


@pytest.fixture
def patient_inquest(monkeypatch: pytest.MonkeyPatch) -> Inquest:
    """Have the coroner of every system in this process watched, and nothing about it changed."""
    seen = Inquest()
    monkeypatch.setattr(maintenance, "Coroner", watched(seen, patient=True))
    return seen
