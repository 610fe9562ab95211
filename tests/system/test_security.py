"""A worker with no more rights than it needs, among objects and policies that mean it no good."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import asyncpg
import pytest

from pgebus import (
    ConfigurationError,
    DatabaseSessionManager,
    DatabaseSettings,
    EventContext,
    EventRouter,
    EventSystem,
    Group,
    Reject,
    Retry,
)
from tests.roles import casting
from tests.system.bus import Sql, backfilled, delivery, finished, publish, rounds, running, settings
from tests.system.faults import EFFECTS, effects, record
from tests.system.processes import Inquest
from tests.system.waiting import until


async def test_the_workers_role_is_enough_for_everything_that_a_worker_does(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, inquest: Inquest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From start to stop: declaring, scheduling, publishing, retrying, recovering, adopting, sweeping, pruning."""
    monkeypatch.setattr("pgebus._runtime.pruning.PRUNE_SECONDS", 0.05)
    router = EventRouter()

    @router.on("order.placed", transactional=True, group=Group("limited", start="beginning", max_running=2))
    async def once(ctx: EventContext, payload: dict[str, Any]) -> None:
        await record(ctx, payload["n"])
        await ctx.publish("order.seen", {}, dedup_key=f"seen-{payload['n']}")

    @router.on("order.#")
    async def often(ctx: EventContext, payload: dict[str, Any]) -> None:
        if payload.get("fail") and ctx.attempt == 1:
            raise Retry
        if payload.get("reject"):
            raise Reject("no")

    router.every("* * * * *", "ticked", missed="all")(_nothing)
    await sql.execute(
        "INSERT INTO pgebus.schedules (channel, type, cron, timezone, last_at)"
        " VALUES ('events', 'ticked', '* * * * *', 'UTC', now() - interval '3 minutes')"
    )
    await sql.execute(f"{EFFECTS}; GRANT INSERT, SELECT ON effects TO PUBLIC")
    async with casting(sql, database) as cast:
        await cast.grant()
        early = await publish(sm, "order.placed", {"n": 0})
        late = await publish(sm, "later.known")
        lost = await publish(sm, "order.lost")
        await sql.execute("INSERT INTO pgebus.workers (id, channel) VALUES (7, 'events')")
        await sql.execute(
            "UPDATE pgebus.deliveries SET status = 'running', worker_id = 7, claimed_at = now(), claim_seq = 1,"
            " attempt = 1 WHERE event_id = $1",
            lost,
        )
        login = await cast.login(cast.roles.worker)
        async with running(router, login, recovery_grace_seconds=0.05, retention_seconds=None) as system:
            await backfilled(sql)
            several = [await publish(sm, "order.placed", {"n": n}, key="k") for n in range(1, 4)]
            retried = await publish(sm, "order.retried", {"fail": True})
            dead = await publish(sm, "order.rejected", {"reject": True})
            await until(lambda: sql.fetchval("SELECT count(*) = 4 FROM effects"))
            await until(
                lambda: sql.fetchval(
                    "SELECT count(*) = 2 FROM pgebus.deliveries WHERE event_id = ANY ($1) AND attempt > 1",
                    [retried, lost],
                )
            )
            await finished(sql, retried, lost)
            await finished(sql, dead, status="dead")
            router.on("later.known", name="later")(often)
            await finished(sql, late)
            await rounds(sql)
            await until(lambda: sql.fetchval("SELECT count(*) >= 2 FROM pgebus.events WHERE type = 'ticked'"))
            assert {loop.name: loop.last_error for loop in system.health().loops if loop.failures} == {}
        assert await effects(sql) == dict.fromkeys(range(4), 1)
        assert early < several[0]
        assert await sql.fetchval("SELECT bool_and(ended_at IS NOT NULL) FROM pgebus.workers")
        async with running(router, login, retention_seconds=0.0) as system:
            # What is dead keeps its event.
            await until(lambda: sql.fetchval("SELECT count(*) = 1 FROM pgebus.events"))
            assert {loop.name: loop.last_error for loop in system.health().loops if loop.failures} == {}
    assert (await delivery(sql, dead))["status"] == "dead"


# In a schema that comes before PostgreSQL's own, for every role that is not careful.
HOSTILE = """
CREATE SCHEMA hostile;
CREATE FUNCTION hostile.fail() RETURNS text LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'misled'; END $$;
CREATE FUNCTION hostile.now() RETURNS timestamptz LANGUAGE sql AS 'SELECT hostile.fail()::timestamptz';
CREATE FUNCTION hostile.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS 'SELECT hostile.fail()::timestamptz';
CREATE FUNCTION hostile.pg_notify(text, text) RETURNS void LANGUAGE sql AS 'SELECT hostile.fail()';
CREATE FUNCTION hostile.starts_with(text, text) RETURNS bool LANGUAGE sql AS 'SELECT hostile.fail()::bool';
CREATE FUNCTION hostile.pg_try_advisory_lock(bigint) RETURNS bool LANGUAGE sql AS 'SELECT hostile.fail()::bool';
CREATE FUNCTION hostile.pg_advisory_unlock_all() RETURNS void LANGUAGE sql AS 'SELECT hostile.fail()';
CREATE FUNCTION hostile.quote_ident(text) RETURNS text LANGUAGE sql AS 'SELECT hostile.fail()';
CREATE FUNCTION hostile.equal(text, text) RETURNS bool LANGUAGE sql AS 'SELECT hostile.fail()::bool';
CREATE FUNCTION hostile.equal(bigint, bigint) RETURNS bool LANGUAGE sql AS 'SELECT hostile.fail()::bool';
CREATE FUNCTION hostile.joined(text, text) RETURNS text LANGUAGE sql AS 'SELECT hostile.fail()';
CREATE OPERATOR hostile.= (LEFTARG = text, RIGHTARG = text, FUNCTION = hostile.equal);
CREATE OPERATOR hostile.= (LEFTARG = bigint, RIGHTARG = bigint, FUNCTION = hostile.equal);
CREATE OPERATOR hostile.~ (LEFTARG = text, RIGHTARG = text, FUNCTION = hostile.equal);
CREATE OPERATOR hostile.|| (LEFTARG = text, RIGHTARG = text, FUNCTION = hostile.joined);
CREATE TABLE hostile.events (id int); CREATE TABLE hostile.deliveries (id int); CREATE TABLE hostile.workers (id int);
CREATE TABLE hostile.consumer_groups (id int); CREATE TABLE hostile.subscriptions (id int);
CREATE FUNCTION hostile.fan_out() RETURNS int LANGUAGE sql AS 'SELECT 1';
CREATE FUNCTION hostile.complete(bigint, text, integer, bigint, text) RETURNS int LANGUAGE sql AS 'SELECT 1';
CREATE FUNCTION hostile.schema_version() RETURNS int LANGUAGE sql AS 'SELECT 99';
GRANT USAGE ON SCHEMA hostile TO PUBLIC; GRANT ALL ON ALL TABLES IN SCHEMA hostile TO PUBLIC;
"""


async def test_a_worker_is_not_led_to_objects_of_others(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, brisk: None
) -> None:
    """Also where the role's search path puts them before PostgreSQL's own."""
    await sql.execute(HOSTILE)
    router, entered = EventRouter(), asyncio.Event()

    @router.on("order.#")
    async def plain(ctx: EventContext, payload: dict[str, Any]) -> None:
        if ctx.attempt == 1:
            raise Retry

    @router.on("stock.counted", transactional=True, group="other")
    async def whole(ctx: EventContext, payload: dict[str, Any]) -> None:
        entered.set()

    async with casting(sql, database) as cast:
        await cast.grant()
        login = await cast.login(cast.roles.worker)
        await sql.execute(f"ALTER ROLE {cast.logins[-1]} SET search_path = hostile, pg_catalog, public")
        async with running(router, login) as system:
            for kind in ("order.placed", "stock.counted"):
                await finished(sql, *[await publish(sm, kind, {}, key="k") for _ in range(3)])
            await rounds(sql)
            assert {loop.name: loop.last_error for loop in system.health().loops if loop.failures} == {}
    assert entered.is_set()


async def test_the_functions_are_not_led_to_objects_of_the_session(sql: Sql) -> None:
    """Neither to tables in its temporary schema, nor to functions and operators before PostgreSQL's own."""
    await sql.execute(HOSTILE)
    await sql.execute(
        "INSERT INTO pgebus.consumer_groups (channel, consumer_group) VALUES ('events', 'g');"
        "INSERT INTO pgebus.subscriptions (channel, consumer_group, pattern) VALUES ('events', 'g', 'a.*');"
        "INSERT INTO pgebus.workers (id, channel, idle) VALUES (1, 'events', true);"
        "CREATE TEMP TABLE deliveries (id int); CREATE TEMP TABLE subscriptions (id int);"
        "CREATE TEMP TABLE new_events (id int); CREATE TEMP TABLE old_events (id int);"
        "CREATE TEMP TABLE workers (id int); SET search_path = pg_temp, hostile, pg_catalog"
    )
    with pytest.raises(asyncpg.RaiseError, match="misled"):
        await sql.execute("SELECT now()")
    await sql.execute("INSERT INTO pgebus.events (type, key) VALUES ('a.b', 'k'), ('a.c', 'k'), ('a.d', NULL)")
    await sql.execute(
        "SET search_path = pg_catalog; UPDATE pgebus.deliveries SET status = 'running', worker_id = 1,"
        " claimed_at = now(), claim_seq = 1 WHERE type = 'a.b'; SET search_path = pg_temp, hostile, pg_catalog"
    )
    await sql.execute(
        "SET pgebus.tx = 'm'; DO $$ BEGIN PERFORM pgebus.complete(min(event_id), 'g', 1, 1, 'm')"
        " FROM pgebus.deliveries; END $$"
    )
    rows = await sql.fetch("TABLE pgebus.deliveries")
    assert {row["type"]: row["status"] for row in rows} == {"a.b": "completed", "a.c": "pending", "a.d": "pending"}
    await sql.execute("DELETE FROM pgebus.events")
    assert await sql.fetch("TABLE pgebus.deliveries") == []


# Row-level security


async def test_a_worker_from_which_everything_is_hidden_refuses_to_start(database: DatabaseSettings, sql: Sql) -> None:
    """It would see an empty queue for ever."""
    router = EventRouter()
    router.on("a", name="a")(_nothing)
    async with casting(sql, database) as cast:
        await cast.grant()
        login = await cast.login(cast.roles.worker)
        for table in ("deliveries", "workers"):
            await sql.execute(f"ALTER TABLE pgebus.{table} ENABLE ROW LEVEL SECURITY")
        # For others, or for reading only: a claim that may not change a row does not see it either.
        await sql.execute(
            "CREATE POLICY reading ON pgebus.deliveries FOR SELECT USING (true);"
            f"CREATE POLICY other ON pgebus.deliveries TO {_quoted(cast.roles.publisher)} USING (true);"
            "CREATE POLICY narrow ON pgebus.deliveries AS RESTRICTIVE USING (true)"
        )
        with pytest.raises(ConfigurationError, match=r"hides every row of deliveries, workers.*BYPASSRLS"):
            await EventSystem(router, settings(login)).start()


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


@pytest.mark.parametrize("way", ["policy", "bypass"])
async def test_a_worker_that_is_let_in_works(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    router = EventRouter()
    router.on("a", name="a")(_nothing)
    async with casting(sql, database) as cast:
        await cast.grant()
        login = await cast.login(cast.roles.worker, "BYPASSRLS" if way == "bypass" else "")
        tables = ("events", "deliveries", "workers", "subscriptions", "consumer_groups", "schedules")
        for table in tables:
            await sql.execute(f"ALTER TABLE pgebus.{table} ENABLE ROW LEVEL SECURITY")
            if way == "policy":
                await sql.execute(f"CREATE POLICY w ON pgebus.{table} TO {_quoted(cast.roles.worker)} USING (true)")
        with caplog.at_level(logging.WARNING, "pgebus"):
            async with running(router, login):
                await finished(sql, await publish(sm, "a"))
        warned = [record.getMessage() for record in caplog.records if "Row-level security" in record.getMessage()]
        assert len(warned) == (way == "policy")


@pytest.mark.parametrize(("table", "outcome"), [("deliveries", "refused"), ("subscriptions", "unhandled")])
async def test_policies_are_not_to_be_forced_on_the_owner(
    database: DatabaseSettings, sql: Sql, table: str, outcome: str
) -> None:
    """The triggers run as the owner: forced, they see nobody who wants the event, or may write nothing."""
    async with casting(sql, database) as cast:
        await cast.grant()
        await sql.execute(
            "INSERT INTO pgebus.consumer_groups (channel, consumer_group) VALUES ('events', 'g');"
            "INSERT INTO pgebus.subscriptions (channel, consumer_group, pattern) VALUES ('events', 'g', 'a');"
            f"ALTER TABLE pgebus.{table} ENABLE ROW LEVEL SECURITY"
        )
        publish_one = "INSERT INTO pgebus.events (type) VALUES ('a')"
        await sql.execute(publish_one)
        await sql.execute(f"ALTER TABLE pgebus.{table} FORCE ROW LEVEL SECURITY")
        if outcome == "refused":
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
                await sql.execute(publish_one)
        else:
            await sql.execute(publish_one)
        states = await sql.fetch("SELECT status FROM pgebus.deliveries ORDER BY event_id")
        assert [row[0] for row in states] == ["pending", outcome][: 1 + (outcome != "refused")]


async def _nothing(ctx: EventContext, payload: dict[str, Any]) -> None:
    pass


async def test_a_worker_for_which_no_trigger_fires_refuses_to_start(database: DatabaseSettings, sql: Sql) -> None:
    """What its handlers publish would get no delivery, and be lost."""
    await sql.execute(f'ALTER DATABASE "{database.sqlalchemy_url().database}" SET session_replication_role = replica')
    with pytest.raises(ConfigurationError, match="RESET session_replication_role"):
        await EventSystem(EventRouter(), settings(database)).start()
