"""A secret in the URL and one in a payload, which must show up nowhere else; and types that look like code."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import secrets
import sys
import traceback
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import typer.main
from pydantic import BaseModel, ValidationError
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from pgebus import (
    DatabaseSessionManager,
    DatabaseSettings,
    EventContext,
    EventPublisher,
    EventRouter,
    EventSystem,
    PgebusError,
    Reject,
    Retry,
    Settings,
    publish_event,
    publish_events,
)
from pgebus._runtime import listening, maintenance
from pgebus.cli.app import app
from pgebus.health import readiness
from tests.roles import casting
from tests.system.bus import Sql, finished, publish, running, settings
from tests.system.faults import healthy
from tests.system.proxy import Proxy
from tests.system.waiting import until


class Canary:
    """Two secrets, and everything that was seen."""

    def __init__(self) -> None:
        self.password = f"pass{secrets.token_hex(12)}"
        self.token = f"token{secrets.token_hex(12)}"
        self.seen: list[str] = []

    def sees(self, *what: object) -> None:
        for each in what:
            self.seen += [repr(each), str(each)]
            if isinstance(each, BaseException):
                self.seen += traceback.format_exception(each)

    def found(self) -> list[str]:
        return [seen[:2_000] for seen in self.seen if self.password in seen or self.token in seen]


class Recorder(logging.Handler):
    """Notes every record, its arguments and its traceback included."""

    def __init__(self, canary: Canary) -> None:
        super().__init__(logging.DEBUG)
        self.canary = canary

    def emit(self, record: logging.LogRecord) -> None:
        self.canary.sees(self.format(record), record.args, vars(record))


@pytest.fixture
def canary() -> Iterator[Canary]:
    canary = Canary()
    logger, recorder = logging.getLogger("pgebus"), Recorder(canary)
    level = logger.level
    logger.addHandler(recorder)
    logger.setLevel(logging.DEBUG)
    yield canary
    logger.removeHandler(recorder)
    logger.setLevel(level)


class Wanted(BaseModel):
    """What one handler takes, and the payload is not."""

    amount: int


def failing(canary: Canary) -> EventRouter:
    """Handlers that fail in every way that does not say the secret itself."""
    router = EventRouter()

    @router.on("fails.validation")
    async def validated(ctx: EventContext, payload: Wanted) -> None:
        raise AssertionError("not reached")

    @router.on("fails.plainly")
    async def plainly(ctx: EventContext, payload: dict[str, Any]) -> None:
        raise ValueError("no")

    @router.on("fails.finally")
    async def rejected(ctx: EventContext, payload: dict[str, Any]) -> None:
        raise Reject("no")

    @router.on("fails.database", transactional=True)
    async def database(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        for _ in range(2):
            await ctx.session.execute(text("INSERT INTO places VALUES (:what)"), {"what": payload["token"]})

    @router.on("fails.publishing", transactional=True)
    async def publishing(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        sql = "INSERT INTO pgebus.events (type, payload) VALUES ('no good', CAST(:payload AS jsonb))"
        await ctx.session.execute(text(sql), {"payload": json.dumps(payload)})

    @router.on("fails.replayed", transactional=True)
    async def replayed(ctx: EventContext, payload: dict[str, Any]) -> None:
        assert ctx.session is not None
        await ctx.session.execute(text("SELECT fail_once(:what)"), {"what": payload["token"]})

    @router.on("works.#", transactional=True)
    async def works(ctx: EventContext, payload: dict[str, Any]) -> None:
        canary.sees(ctx, ctx.event, ctx.session)
        if ctx.attempt == 1:
            raise Retry

    return router


TABLES = """
CREATE TABLE places (what text PRIMARY KEY); GRANT ALL ON places TO PUBLIC;
CREATE FUNCTION fail_once(text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION USING ERRCODE = '40001', MESSAGE = 'again', DETAIL = 'of ' || $1; END $$
"""


async def test_a_secret_shows_up_nowhere(
    canary: Canary, database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, brisk: None
) -> None:
    """Neither in logs nor in objects, nor in tables other than that of the events, nor where statements are shown."""
    await sql.execute(TABLES)
    kinds = ("validation", "plainly", "finally", "database", "publishing", "replayed")
    async with casting(sql, database) as cast:
        await cast.grant()
        login = await cast.login(cast.roles.worker, word=canary.password)
        given = settings(login, max_attempts=2)
        canary.sees(given, given.model_dump(), given.model_dump_json(), given.database, login)
        system = EventSystem(failing(canary), given)
        async with system:
            payload = {"token": canary.token}
            ids = [await publish(sm, f"fails.{kind}", payload, headers={"h": "1"}) for kind in kinds]
            works = [await publish(sm, "works.well", payload, key="k") for _ in range(3)]
            async with DatabaseSessionManager(login) as manager, manager.session() as session:
                await publish_events(session, [{"type": "works.many", "payload": payload} for _ in range(100)])
                canary.sees(manager, manager.engine, manager.engine.url, session)
                await session.commit()
            await finished(sql, *ids, status="dead", within=30.0)
            await finished(sql, *works, within=30.0)
            await until(lambda: sql.fetchval("SELECT bool_and(finished_at IS NOT NULL) FROM pgebus.deliveries"), 30.0)
            rows = await sql.fetch("SELECT query, application_name FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
            canary.sees(system, system.health(), readiness(system), rows)
        for table in ("deliveries", "workers", "subscriptions", "consumer_groups"):
            canary.sees(*await sql.fetch(f"SELECT t::text FROM pgebus.{table} t"))
        canary.sees(*await sql.fetch("SELECT (to_jsonb(e) - 'payload')::text FROM pgebus.events e"))
    assert canary.found() == []
    errors = await sql.fetchval("SELECT count(*) FROM pgebus.deliveries WHERE jsonb_array_length(errors) > 0")
    assert errors >= len(kinds), "the failures were not recorded, so nothing was shown"


async def test_a_secret_is_in_no_error_of_publishing(
    canary: Canary, database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """The text and the traceback of what is raised, before and after anything was sent."""
    await sql.execute("ALTER TABLE pgebus.events ADD CONSTRAINT narrow CHECK (key IS NULL OR key <> 'no')")
    bad: list[dict[str, Any]] = [
        {"payload": {"a": float("nan"), "b": canary.token}},
        {"payload": {"b": canary.token + "\x00"}},
        {"payload": [canary.token]},
        {"payload": {"b": canary.token * 50_000}},
        {"payload": {"b": canary.token, "c": object()}},
        {"payload": {"b": canary.token}, "headers": {"h": canary.token, "i": {1, 2}}},
        {"payload": {"b": canary.token}, "run_at": canary.token},
        {"payload": {"b": canary.token}, "priority": 11},
        {"payload": {"b": canary.token}, "key": "no"},
    ]
    raised = 0
    for options in bad:
        async with sm.session() as session:
            try:
                await publish_event(session, "a.b", channel="events", **options)
            except (PgebusError, SQLAlchemyError) as error:
                raised += 1
                canary.seen.append(str(error))
                if isinstance(error, PgebusError):
                    canary.seen += traceback.format_exception(error)
        async with EventPublisher(database) as publisher:
            with pytest.raises((PgebusError, SQLAlchemyError)) as caught:
                await publisher.publish("a.b", **options)
            canary.seen.append(str(caught.value))
            canary.sees(publisher)
    assert raised == len(bad)
    assert canary.found() == []


@pytest.fixture
async def proxy(database: DatabaseSettings) -> AsyncIterator[Proxy]:
    async with Proxy(database.sqlalchemy_url()) as proxy:
        yield proxy


async def test_a_password_is_in_no_error_of_connecting(
    canary: Canary, database: DatabaseSettings, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused, lost, to no database and to no host."""
    url = proxy.url.set(password=canary.password)
    router = failing(canary)

    def at(**parts: Any) -> DatabaseSettings:
        changed = url.set(**parts).render_as_string(hide_password=False)
        return DatabaseSettings.model_validate({"url": changed, "connect_timeout_seconds": 1.0})

    nowhere = [at(database="no_such_database"), at(port=1), at(host="no-such-host.invalid")]
    for each in nowhere:
        with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever it is
            await EventSystem(router, settings(each)).start()
        canary.sees(caught.value)
        async with DatabaseSessionManager(each) as manager, manager.session() as session:
            with pytest.raises(Exception) as caught:  # noqa: PT011 - as above
                await publish_event(session, "a", {"t": canary.token}, "events")
            canary.sees(caught.value)
    monkeypatch.setattr(listening, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(maintenance, "LOOK_SECONDS", 0.1)
    async with running(router, at()) as system:
        proxy.refusing = True
        proxy.reset()

        async def all_noticed() -> bool:
            canary.sees(system.health())
            return sum(not loop.ok for loop in system.health().loops) >= 2

        await until(all_noticed)
        proxy.heal()
        await healthy(system)
    for bad in (
        {"url": f"nonsense://u:{canary.password}@h/d"},
        {"password": canary.password, "url": url},
        {"port": url},
    ):
        with pytest.raises(ValidationError) as invalid:
            DatabaseSettings.model_validate(bad)
        canary.sees(invalid.value, invalid.value.errors(), invalid.value.json())
    with contextlib.suppress(PgebusError):
        Settings(database={"url": f"nonsense://u:{canary.password}@h/d"})
    assert canary.found() == []


def test_no_command_takes_a_secret_as_an_argument() -> None:
    """Arguments are in the list of processes, for everybody on the machine to see."""

    def parameters(command: Any) -> Iterator[str]:
        for parameter in command.params:
            yield from (*parameter.opts, parameter.name)
        for each in getattr(command, "commands", {}).values():
            yield from parameters(each)

    names = " ".join(parameters(typer.main.get_command(app)))
    assert "--sql" in names
    for word in ("url", "dsn", "password", "user", "host"):
        assert word not in names.lower()


@pytest.mark.parametrize("broken", [False, True])
async def test_a_redactor_decides_what_is_kept_and_logged(
    canary: Canary, database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, *, broken: bool
) -> None:
    """Of a handler that says the secret itself. One that fails keeps nothing, and its delivery goes its way."""
    router = EventRouter()

    @router.on("fails.#", transactional=True)
    async def fail(ctx: EventContext, payload: dict[str, Any]) -> None:
        raise ValueError(f"cannot use {payload['token']}")

    def redact(text: str) -> str:
        if broken:
            raise KeyError(text)
        return text.replace(canary.token, "***")

    async with EventSystem(router, settings(database, max_attempts=2), redact=redact):
        event_id = await publish(sm, "fails.loudly", {"token": canary.token})
        await finished(sql, event_id, status="dead")
    errors = await sql.fetchval("SELECT errors::text FROM pgebus.deliveries")
    canary.sees(errors)
    assert canary.found() == []
    expected = "<the redactor raised KeyError>" if broken else "cannot use ***"
    assert [each["message"] for each in json.loads(errors)] == [expected] * 2
    assert any(expected in seen for seen in canary.seen if "is dead" in seen)


async def test_a_redactor_is_a_plain_function() -> None:
    async def redact(text: str) -> str:
        return text

    for bad in (redact, "***", 7):
        with pytest.raises(TypeError, match="plain function"):
            EventSystem(EventRouter(), Settings(), redact=bad)  # type: ignore[arg-type]  # that is what is refused


# Modules of the standard library that nobody imports by chance, and that tell when somebody does.
CODE = ["os.system", "antigravity.fly", "this.s", "builtins.eval", "__import__", "subprocess.Popen", "pgebus.errors"]


async def test_a_type_that_looks_like_code_is_a_text(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """It is published, handled and shown, and nothing is imported by its name."""
    router, handled = EventRouter(), set[str]()

    @router.on("#", transactional=True)
    async def handle(ctx: EventContext, payload: dict[str, Any]) -> None:
        handled.add(ctx.event.type)
        repr(ctx.event)

    before = set(sys.modules)
    async with running(router, database):
        payload = {"py/object": "os.system", "__class__": "subprocess.Popen", "$type": "antigravity"}
        ids = [await publish(sm, event_type, payload) for event_type in CODE]
        await finished(sql, *ids)
    gc.collect()
    assert handled == set(CODE)
    assert {"antigravity", "this"} & (set(sys.modules) - before) == set()
