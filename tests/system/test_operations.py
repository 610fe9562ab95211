"""What a person does to groups and keys, from Python and on the command line."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any, Protocol

import pytest

from pgebus import (
    ConfigurationError,
    DatabaseSessionManager,
    DatabaseSettings,
    EventContext,
    EventRouter,
    EventSystem,
    Group,
    Settings,
    StateError,
    operations,
)
from pgebus.cli.app import run
from tests.system.bus import Sql, publish, running
from tests.system.test_cli_check import environment, url_of
from tests.system.waiting import until

router = EventRouter("shop")
system = EventSystem(router, Settings(database={"database": "nowhere"}))


@router.on("order.*", group="mail")
async def thank(_ctx: EventContext, _payload: dict[str, Any]) -> None: ...


@router.on("#", transactional=True)
async def note(_ctx: EventContext, _payload: dict[str, Any]) -> None: ...


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


async def nothing(_ctx: EventContext, _payload: dict[str, Any]) -> None: ...


async def test_groups_are_listed_with_what_they_do(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, command: Command
) -> None:
    async with sm.session() as session:
        assert await operations.list_groups(session) == []
    assert (await command("groups"))[1].startswith("There are no consumer groups")
    served = EventRouter()
    served.on("a.*", group=Group("g", max_running=3))(nothing)
    served.on("b", group="g")(nothing)
    async with running(served, database):
        await until(lambda: sql.fetchval("SELECT count(*) = 2 FROM pgebus.subscriptions"))
        async with sm.session() as session:
            assert await operations.pause_group(session, "g")
            assert not await operations.pause_group(session, "g")
            await session.commit()
        for number in range(3):
            await publish(sm, "a.b", key="k" if number else None)
        await publish(sm, "nobody.wants")
        await sql.execute("UPDATE pgebus.subscriptions SET declared_at = now() - interval '1 hour' WHERE pattern = 'b'")
        async with sm.session() as session:
            (found,) = await operations.list_groups(session, "events")
            assert await operations.list_groups(session, "elsewhere") == []
        assert (found.group, found.patterns, found.forgotten) == ("g", ("a.*", "b"), ("b",))
        assert (found.max_running, found.workers, found.pending, found.blocked) == (3, 1, 2, 1)
        assert found.paused_at is not None
        status, out, err = await command("groups")
        assert (status, err) == (0, "")
        assert "a.* [b]" in out
        assert "paused since" in out
        assert "at most 3" in out
        (written,) = json.loads((await command("groups", "--json"))[1])
        assert (written["group"], written["forgotten"], written["pending"]) == ("g", ["b"], 2)

        assert (await command("blocked"))[1].splitlines()[1].split()[:4] == ["events", "g", "k", "1"]
        async with sm.session() as session:
            (key,) = await operations.blocked_keys(session, group="g")
            assert (key.key, key.waiting, key.head, key.status) == ("k", 1, 2, "pending")
            assert await operations.blocked_keys(session, channel="elsewhere") == []
            with pytest.raises(ConfigurationError):
                await operations.blocked_keys(session, limit=0)

        # Resumed, it is awake at once: this worker does not poll.
        assert (await command("groups", "resume", "g"))[:2] == (0, "Group 'g' is resumed.\n")
        await until(
            lambda: sql.fetchval("SELECT count(*) = 3 FROM pgebus.deliveries WHERE status = 'completed'"), within=5
        )
    assert (await command("blocked"))[1] == "No key waits.\n"


async def test_a_group_that_nobody_serves_is_removed_with_its_deliveries(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, command: Command
) -> None:
    served = EventRouter()
    served.on("a", group="g")(nothing)
    served.on("a", group="h", name="h")(nothing)
    async with running(served, database):
        async with sm.session() as session:
            with pytest.raises(StateError, match="1 running worker"):
                await operations.remove_group(session, "g")
        status, _, err = await command("groups", "remove", "g")
        assert (status, "running worker" in err, "Traceback" in err) == (1, True, False)
    await publish(sm, "a", key="k")
    await publish(sm, "a", key="k")
    assert (await command("groups", "remove", "g")) == (0, "Group 'g' is removed; deliveries cancelled: 2.\n", "")
    assert (await command("groups", "remove", "h", "--pattern", "b"))[1] == "Pattern 'b' of group 'h' was not there.\n"
    assert (await command("groups", "remove", "h", "--pattern", "a"))[1] == "Pattern 'a' of group 'h' is removed.\n"
    rows = await sql.fetch("SELECT consumer_group, status, count(*) FROM pgebus.deliveries GROUP BY 1, 2 ORDER BY 1, 2")
    assert [tuple(row) for row in rows] == [("g", "cancelled", 2), ("h", "blocked", 1), ("h", "pending", 1)]
    await publish(sm, "a")
    assert await sql.fetchval("SELECT consumer_group FROM pgebus.deliveries WHERE status = 'unhandled'") == "default"


async def test_what_is_not_there_is_named(command: Command, sm: DatabaseSessionManager, sql: Sql) -> None:
    for arguments in (["pause", "x"], ["resume", "x"], ["limit", "x", "2"], ["remove", "x"]):
        status, out, err = await command("groups", *arguments)
        assert (status, out, "no consumer group 'x'" in err, "Traceback" in err) == (2, "", True, False)
    async with sm.session() as session:
        with pytest.raises(ConfigurationError):
            await operations.limit_group(session, "x", 0)
    await sql.execute("DROP SCHEMA pgebus CASCADE")
    status, out, err = await command("groups")
    assert (status, out, "pgebus migrate" in err) == (1, "", True)


async def test_a_limit_is_set_and_lifted(database: DatabaseSettings, sql: Sql, command: Command) -> None:
    served = EventRouter(group="g")
    served.on("a")(nothing)
    async with running(served, database):
        await until(lambda: sql.fetchval("SELECT count(*) FROM pgebus.consumer_groups"))
    select = "SELECT max_running FROM pgebus.consumer_groups"
    assert (await command("groups", "limit", "g", "5"))[1] == "Group 'g' runs at most 5 at once.\n"
    assert await sql.fetchval(select) == 5
    assert (await command("groups", "limit", "g", "0"))[1] == "Group 'g' runs without a limit.\n"
    assert await sql.fetchval(select) is None


async def test_routes_say_who_gets_what_and_why(command: Command) -> None:
    """It asks no database: `system` has one that does not exist."""
    for where in (f"{__name__}:router", f"{__name__}:system"):
        status, out, err = await command("routes", where, "shop.order.placed")
        assert (status, err) == (0, "")
        assert [line.split()[:3] for line in out.splitlines()[1:]] == [
            ["mail", "shop.order.*", f"{__name__}.thank"],
            ["default", "shop.#", f"{__name__}.note"],
        ]
    where = f"{__name__}:router"
    (row,) = json.loads((await command("routes", where, "shop", "--json"))[1])
    assert row == {"group": "default", "path": "shop.#", "handler": f"{__name__}.note", "transactional": True}
    assert len((await command("routes", where))[1].splitlines()) == 3
    assert "waits as unhandled" in (await command("routes", where, "elsewhere"))[1]
    for bad in ("nothing", "no_such_module:x", f"{__name__}:missing", f"{__name__}:json", ":", f"{__name__}:"):
        status, out, err = await command("routes", bad)
        assert (status, out, "Traceback" in err) == (2, "", False), bad
    assert (await command("routes", where, "a..b"))[0] == 2
