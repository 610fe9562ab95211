"""What a person does to groups and keys, from Python and on the command line."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

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
    publish_event,
)
from tests.system.bus import Sql, publish, running
from tests.system.conftest import Command, Spawn
from tests.system.waiting import until
from tests.system.worker_process import work

router = EventRouter("shop")
system = EventSystem(router, Settings(database={"database": "nowhere"}))


@router.on("order.*", group="mail")
async def thank(_ctx: EventContext, _payload: dict[str, Any]) -> None: ...


@router.on("#", transactional=True)
async def note(_ctx: EventContext, _payload: dict[str, Any]) -> None: ...


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
            unwanted, found = await operations.list_groups(session, "events")
            assert await operations.list_groups(session, "elsewhere") == []
        assert (unwanted.group, unwanted.declared, unwanted.patterns, unwanted.unhandled) == ("default", False, (), 1)
        assert (found.group, found.declared) == ("g", True)
        assert (found.patterns, found.forgotten) == (("a.*", "b"), ("b",))
        assert (found.max_running, found.workers, found.pending, found.blocked) == (3, 1, 2, 1)
        assert found.paused_at is not None
        status, out, err = await command("groups")
        assert (status, err) == (0, "")
        assert "a.* [b]" in out
        assert "not declared" in out
        assert "paused since" in out
        assert "at most 3" in out
        _, written = json.loads((await command("groups", "--json"))[1])
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
        status, _, err = await command("groups", "remove", "g", "--yes")
        assert (status, "running worker" in err, "Traceback" in err) == (1, True, False)
    await publish(sm, "a", key="k")
    await publish(sm, "a", key="k")
    assert (await command("groups", "remove", "g", "--yes")) == (
        0,
        "Group 'g' is removed; deliveries cancelled: 2.\n",
        "",
    )
    status, out, err = await command("groups", "remove", "h", "--pattern", "b")
    assert (status, out, "has no pattern 'b'" in err) == (1, "", True)
    assert (await command("groups", "remove", "h", "--pattern", "a"))[1] == "Pattern 'a' of group 'h' is removed.\n"
    rows = await sql.fetch("SELECT consumer_group, status, count(*) FROM pgebus.deliveries GROUP BY 1, 2 ORDER BY 1, 2")
    assert [tuple(row) for row in rows] == [("g", "cancelled", 2), ("h", "blocked", 1), ("h", "pending", 1)]
    await publish(sm, "a")
    assert await sql.fetchval("SELECT consumer_group FROM pgebus.deliveries WHERE status = 'unhandled'") == "default"


async def test_what_a_removed_group_still_gets_is_listed_and_removed(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, command: Command
) -> None:
    """A publisher that was under way when its group was removed has seen the group, and commits later."""
    served = EventRouter(group="g")
    served.on("a")(nothing)
    async with running(served, database):
        pass
    async with sm.session() as publishing:
        await publish_event(publishing, "a", {}, "events")
        async with sm.session() as session:
            assert await operations.remove_group(session, "g") == 0
            await session.commit()
        await publishing.commit()
    async with sm.session() as session:
        (left,) = await operations.list_groups(session)
        assert (left.channel, left.group, left.declared, left.pending) == ("events", "g", False, 1)
        assert (left.patterns, left.paused_at, left.max_running, left.workers) == ((), None, None, 0)
    assert "not declared" in (await command("groups"))[1]
    assert (await command("groups", "pause", "g"))[0] == 2
    assert (await command("groups", "remove", "g", "--yes")) == (
        0,
        "Group 'g' is removed; deliveries cancelled: 1.\n",
        "",
    )
    assert (await command("groups", "remove", "g"))[0] == 2
    assert await sql.fetchval("SELECT status FROM pgebus.deliveries") == "cancelled"
    assert (await command("groups"))[1].startswith("There are no consumer groups")


async def test_a_key_may_wait_for_what_nobody_here_knows(sm: DatabaseSessionManager, sql: Sql) -> None:
    await sql.execute(
        "INSERT INTO pgebus.deliveries (event_id, due_at, channel, consumer_group, type, key, status, holds_key) VALUES"
        " (1, now(), 'events', 'g', 'a', 'k', 'unhandled', true), (2, now(), 'events', 'g', 'a', 'k', 'blocked', false)"
    )
    async with sm.session() as session:
        (key,) = await operations.blocked_keys(session)
    assert (key.head, key.status) == (1, "unhandled")
    assert key.since == await sql.fetchval("SELECT due_at FROM pgebus.deliveries WHERE event_id = 1")


async def test_the_history_is_not_read(sm: DatabaseSessionManager, sql: Sql) -> None:
    """What is finished may be millions of rows; each unfinished status has its own index."""
    await sql.execute(
        "INSERT INTO pgebus.deliveries (event_id, due_at, channel, consumer_group, type, status, finished_at, key)"
        " SELECT n, now(), 'events', 'g', 'a', 'completed', now(), 'k' FROM generate_series(1, 20000) n"
    )
    await sql.execute(
        "INSERT INTO pgebus.deliveries (event_id, due_at, channel, consumer_group, type, key, status, finished_at,"
        " worker_id, claimed_at) SELECT n, now(), 'events', 'g', 'a', 'k', status,"
        " CASE WHEN status = 'dead' THEN now() END, CASE WHEN status = 'running' THEN 1 END,"
        " CASE WHEN status = 'running' THEN now() END"
        " FROM unnest('{pending,pending,blocked,running,dead,unhandled}'::text[]) WITH ORDINALITY u(status, o),"
        " LATERAL (SELECT 30000 + o AS n) m"
    )
    await sql.execute("VACUUM ANALYZE pgebus.deliveries")
    async with sm.session() as session:
        (found,) = await operations.list_groups(session)
        assert (found.pending, found.blocked, found.running, found.dead, found.unhandled) == (2, 1, 1, 1, 1)
        (found,) = await operations.list_groups(session, "events")
        assert found.pending == 2
        assert await operations.remove_group(session, "g") == 6
        scans = "SELECT seq_scan FROM pg_stat_xact_user_tables WHERE relname = 'deliveries'"
        assert await session.scalar(text(scans)) == 0
        # Not after the removal's transaction began: a group declared again is younger than what was cancelled.
        cancelled = "SELECT bool_and(finished_at = now()) FROM pgebus.deliveries WHERE status = 'cancelled'"
        assert await session.scalar(text(cancelled)) is True
        await session.rollback()


async def test_a_group_whose_workers_were_all_killed_is_removed(
    sm: DatabaseSessionManager, sql: Sql, spawn: Spawn
) -> None:
    """Nobody is left to write down that they ended; but their locks are gone."""
    worker = spawn(work)
    await worker.says("ready")
    async with sm.session() as session:
        (found,) = await operations.list_groups(session)
        assert found.workers == 1
    with pytest.raises(StateError, match="served by 1"):
        async with sm.session() as session:
            await operations.remove_group(session, "default")
    await worker.killed()
    gone = (
        "SELECT count(*) = 0 FROM pg_locks l JOIN pg_database d ON d.oid = l.database"
        " WHERE l.locktype = 'advisory' AND d.datname = current_database()"
    )
    await until(lambda: sql.fetchval(gone))
    assert await sql.fetchval("SELECT ended_at IS NULL FROM pgebus.workers")
    async with sm.session() as session:
        (found,) = await operations.list_groups(session)
        assert found.workers == 0
        assert await operations.remove_pattern(session, "default", "mail.sent")
        assert await operations.remove_group(session, "default") == 0
        assert await operations.list_groups(session) == []


@pytest.mark.parametrize("also", [None, "other"])
async def test_what_a_running_process_has_is_not_removed(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, command: Command, also: str | None
) -> None:
    """It would be there again within a minute, without the events in between; also where others serve its group."""
    served = EventRouter()
    served.on("a", group="g")(nothing)
    served.on("b", group="g")(nothing)
    served.on("c", group="other")(nothing)
    async with running(served, database, **({"groups": [also]} if also else {})):
        await sql.execute(
            "UPDATE pgebus.subscriptions SET declared_at = now() - interval '6 minutes' WHERE pattern = 'b'"
        )
        status, out, err = await command("groups", "remove", "g", "--pattern", "a")
        assert (status, out, "1 worker(s) of channel 'events' are running" in err) == (1, "", True)
        assert (await command("groups", "remove", "g", "--yes"))[0] == 1
        async with sm.session() as session:
            with pytest.raises(StateError, match="was declared"):
                await operations.remove_pattern(session, "g", "a")
            assert await operations.remove_pattern(session, "g", "b")
            await session.commit()
        found = await sql.fetch("SELECT pattern FROM pgebus.subscriptions ORDER BY 1")
        assert [row["pattern"] for row in found] == ["a", "c"]
    async with sm.session() as session:
        assert await operations.remove_pattern(session, "g", "a")
        assert not await operations.remove_pattern(session, "g", "a")


async def test_the_channel_may_be_said_before_the_command_or_behind_it(sql: Sql, command: Command) -> None:
    await sql.execute(
        "INSERT INTO pgebus.consumer_groups (channel, consumer_group) VALUES ('events', 'g'), ('other', 'g')"
    )

    async def changed() -> list[str]:
        where = "paused_at IS NOT NULL OR max_running IS NOT NULL"
        rows = await sql.fetch(f"SELECT channel FROM pgebus.consumer_groups WHERE {where} ORDER BY 1")
        return [row["channel"] for row in rows]

    assert (await command("groups", "--channel", "other", "pause", "g"))[0] == 0
    assert await changed() == ["other"]
    assert (await command("groups", "--channel", "other", "resume", "g"))[1] == "Group 'g' is resumed.\n"
    assert (await command("groups", "--channel", "other", "limit", "g", "2"))[0] == 0
    assert await changed() == ["other"]
    assert (await command("groups", "--channel", "other", "pause", "g", "--channel", "events"))[0] == 0
    assert await changed() == ["events", "other"]
    assert (await command("groups", "--channel", "other", "remove", "g", "--pattern", "a"))[0] == 1
    assert (await command("groups", "--channel", "other", "remove", "g"))[0] == 0
    assert await changed() == ["events"]
    # The others write no JSON: said, and not passed over.
    status, out, err = await command("groups", "--json", "resume", "g")
    assert (status, out, "--json" in err) == (2, "", True)
    assert await changed() == ["events"]


async def test_a_channel_without_groups_is_told_from_one_that_nobody_serves(sql: Sql, command: Command) -> None:
    await sql.execute(
        "INSERT INTO pgebus.consumer_groups (channel, consumer_group) VALUES ('b', 'g'), ('a', 'g'), ('a', 'h')"
    )
    said = (await command("groups", "--channel", "nope"))[1]
    assert said == "Channel 'nope' has no consumer groups. Channels that have: 'a', 'b'.\n"
    assert (await command("groups", "--channel", "nope", "--json"))[1] == "[]\n"
    await sql.execute("DELETE FROM pgebus.consumer_groups")
    said = (await command("groups", "--channel", "nope"))[1]
    assert said == "There are no consumer groups: no worker has started yet.\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["groups", "pause", "a\udcff"],
        ["groups", "resume", "a\udcff"],
        ["groups", "limit", "a\udcff", "1"],
        ["groups", "remove", "a\udcff"],
        ["groups", "remove", "a\udcff", "--pattern", "a"],
        ["groups", "remove", "g", "--pattern", "a\udcff"],
        ["groups", "remove", "g", "--pattern", "a..b"],
        ["groups", "--channel", "a\udcff"],
        ["groups", "--channel", "a\udcff", "pause", "g"],
        ["blocked", "--group", "a\udcff"],
        ["blocked", "--channel", "a\udcff"],
        ["blocked", "--limit", "99999999999999999999"],
    ],
)
async def test_a_mistake_in_the_arguments_is_no_matter_of_the_database(
    arguments: list[str], sql: Sql, command: Command
) -> None:
    await sql.execute("INSERT INTO pgebus.consumer_groups (channel, consumer_group) VALUES ('events', 'g')")
    status, out, err = await command(*arguments)
    assert (status, out, "PGEBUS_DATABASE__URL" in err, "Traceback" in err) == (2, "", False, False)
    assert len(err.splitlines()) == 1


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


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("raises:x", "Module 'raises' cannot be imported: RuntimeError: first second ("),
        ("no_python:x", "Module 'no_python' cannot be imported: SyntaxError: "),
        ("exits:x", "Module 'exits' cannot be imported: SystemExit: 3 ("),
        ("lacks:x", "Module 'lacks' cannot be imported: ModuleNotFoundError: No module named 'not_there_at_all' ("),
        ("misused:x", "Module 'misused' cannot be imported: ConfigurationError: Group 'a b'"),
        ("fine:shop.router", "'fine:shop.router' cannot be read: ValueError: not now."),
        ("fine:shop.missing", "There is no router 'fine:shop.missing': AttributeError: "),
        ("fine:shop", "'fine:shop' is neither"),
        (".:x", "'.:x' names no router."),
        ("..fine:x", "'..fine:x' names no router."),
        ("fine..x:x", "There is no module 'fine..x', neither in "),
    ],
)
async def test_a_program_that_cannot_be_read_is_named_in_one_line(
    where: str, said: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = {
        "raises": "raise RuntimeError('first\\nsecond.')",
        "no_python": "def :",
        "exits": "raise SystemExit(3)",
        "lacks": "import not_there_at_all",
        "misused": "from pgebus import Group; Group('a b')",
        "fine": "class Shop:\n    @property\n    def router(self): raise ValueError('not now')\nshop = Shop()",
    }
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, program in programs.items():
        (tmp_path / f"{name}.py").write_text(f"{program}\n")
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()
    status, out, err = await command("routes", where)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(said)
