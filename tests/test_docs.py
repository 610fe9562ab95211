"""The documentation holds: its programs run, its fragments too, and what it names is there."""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import re
import signal
import sys
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path
from shlex import quote
from textwrap import dedent, indent
from typing import Any

import pytest
from pydantic import BaseModel, SecretStr
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import pgebus
from pgebus import (
    DatabaseSessionManager,
    DatabaseSettings,
    EventContext,
    EventRouter,
    EventSystem,
    EventSystemSettings,
    Settings,
)
from pgebus.models import SCHEMA_VERSION
from pgebus.session import FORBIDDEN
from tests.conftest import Server
from tests.system.bus import Sql, finished, publish
from tests.system.waiting import until

ROOT = Path(__file__).parent.parent
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
REFERENCE, GUARANTEES = ROOT / "docs" / "reference.md", ROOT / "docs" / "guarantees.md"
# The guide to subclassing is executed elsewhere, in an interpreter of its own: a subclass of Event is for good.
GUIDES = [page for page in (ROOT / "docs").rglob("*.md") if page.name != "subclassing.md"]
PAGES = sorted([ENGLISH, CHINESE, ROOT / "CHANGELOG.md", *GUIDES])
# What is in them is executed in tests/examples.
EXAMPLES = sorted((ROOT / "examples").glob("*/README.md"))

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)
_VARIABLE = re.compile(r"^\| `PGEBUS_(DATABASE|EVENT_SYSTEM)__(\w+)` \| (\S.*?) \|", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    code: str

    @property
    def id(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def is_program(self) -> bool:
        """Whether it is complete; everything else is a fragment."""
        return self.language == "python" and "asyncio.run(" in self.code

    def compiled(self) -> Any:
        """The code, which may await at its top level."""
        return compile(self.code, self.id, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)

    def tree(self) -> str:
        """What the code is, without its comments and its layout."""
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST
        return ast.dump(compile(self.code, self.id, "exec", flags=flags, dont_inherit=True))


def blocks(*pages: Path) -> list[Block]:
    found = []
    for page in pages:
        source = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(source):
            found.append(Block(page, source.count("\n", 0, match.start()) + 1, match[1], match[2]))
    return found


def prose(page: Path) -> str:
    """The page without its blocks: a comment in one of them is no heading."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


# The Chinese README has the same programs; a test of its own says so.
TRANSLATED = [page for page in PAGES if page != CHINESE]
PROGRAMS = [block for block in blocks(*TRANSLATED) if block.is_program]
FRAGMENTS = [block for block in blocks(*TRANSLATED) if block.language == "python" and not block.is_program]
(QUICK_START,) = [block for block in PROGRAMS if "demo.hello" in block.code]
(WORKER,) = [block for block in PROGRAMS if "add_signal_handler" in block.code]


def test_every_program_is_run_by_a_test() -> None:
    assert {QUICK_START.id, WORKER.id} == {block.id for block in PROGRAMS}


# --- programs


@dataclass(frozen=True)
class Address:
    """Where a test's database is, as the settings name it."""

    host: str
    port: int
    user: str
    password: str
    database: str

    @classmethod
    def of(cls, settings: DatabaseSettings) -> Address:
        url = settings.sqlalchemy_url()
        host = url.host or url.query.get("host") or "localhost"
        port = url.port or url.query.get("port") or 5432
        assert isinstance(host, str)
        assert not isinstance(port, tuple)
        assert url.username
        assert url.database
        # Where every connection is trusted, any password will do.
        return cls(host, int(port), url.username, str(url.password or "none"), url.database)

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("PGEBUS_")}
        ours = {f"PGEBUS_DATABASE__{name.upper()}": str(value) for name, value in vars(self).items()}
        return {**kept, **ours, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}


@asynccontextmanager
async def program(code: str, address: Address, directory: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run *code* inside the block, and leave nothing running behind it."""
    script = directory / "program.py"
    script.write_text(code, encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(script),
        cwd=directory,
        env=address.environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def output(process: asyncio.subprocess.Process) -> list[str]:
    """Wait for the program's end, which has to be a good one; return its lines."""
    try:
        async with asyncio.timeout(30):
            stdout, stderr = await process.communicate()
    except TimeoutError:
        process.send_signal(signal.SIGABRT)  # the fault handler says where it hangs
        stdout, stderr = await process.communicate()
    assert (process.returncode, stderr.decode()) == (0, "")
    return stdout.decode().splitlines()


def replaced(code: str, replacements: dict[str, str]) -> str:
    for printed, ours in replacements.items():
        assert code.count(printed) == 1, printed
        code = code.replace(printed, ours)
    return code


def quick_start_for(address: Address) -> str:
    """The quick start as it is printed, but for the database and the length of the delay."""
    return replaced(
        QUICK_START.code,
        {
            '"host": "localhost"': f'"host": {address.host!r}',
            '"port": 5432': f'"port": {address.port!r}',
            '"user": "app"': f'"user": {address.user!r}',
            '"password": "secret"': f'"password": {address.password!r}',
            '"database": "app"': f'"database": {address.database!r}',
            "timedelta(seconds=10)": "timedelta(seconds=1)",
        },
    )


def outside_of_its_block(code: str) -> str:
    """The quick start with the second event published after the session's `async with` has ended."""
    before, comment, rest = code.partition("        # Not handled before its time has come.\n")
    assert comment
    inside, blank, after = rest.partition("\n\n")
    assert "run_at=" in inside
    return before + indent(dedent(inside), "    ") + blank + after


@pytest.mark.parametrize("outside", [False, True], ids=["inside the block", "after the block"])
async def test_the_quick_start_runs_as_printed(
    database: DatabaseSettings, sql: Sql, tmp_path: Path, outside: bool
) -> None:
    """Its second event is published on the same session, inside or after its `async with` block."""
    code = quick_start_for(Address.of(database))
    async with program(outside_of_its_block(code) if outside else code, Address.of(database), tmp_path) as process:
        lines = sorted(line.partition(" ")[2] for line in await output(process))
    assert lines == [
        "event 1 says 'hi'",
        "event 2 says 'hi again'",
        "published two events, one of them for later",
    ]
    rows = await sql.fetch(
        "SELECT d.status, d.attempt, d.finished_at - e.created_at AS took, e.run_at - e.created_at AS delay"
        " FROM pgebus.deliveries d JOIN pgebus.events e ON e.id = d.event_id ORDER BY d.event_id"
    )
    assert [(row["status"], row["attempt"]) for row in rows] == [("completed", 1), ("completed", 1)]
    assert rows[1]["took"] >= rows[1]["delay"] > timedelta(seconds=0.5)
    assert await sql.fetchval("SELECT count(*) FROM pgebus.workers WHERE ended_at IS NULL") == 0


async def test_the_worker_program_stops_when_it_is_told(database: DatabaseSettings, sql: Sql, tmp_path: Path) -> None:
    async with program(WORKER.code, Address.of(database), tmp_path) as process:
        await until(lambda: sql.fetchval("SELECT bool_or(idle) FROM pgebus.workers"))
        process.terminate()
        assert await output(process) == []
    assert await sql.fetchval("SELECT count(*) FROM pgebus.workers WHERE ended_at IS NULL") == 0


async def test_the_tables_are_made_as_printed(empty_database: DatabaseSettings, server: Server, tmp_path: Path) -> None:
    (block,) = [each for each in blocks(ENGLISH) if "pgebus migrate" in each.code]
    address = Address.of(empty_database)
    code = replaced(
        block.code,
        {
            "HOST=localhost": f"HOST={quote(address.host)} PGEBUS_DATABASE__PORT={address.port}",
            "DATABASE=app": f"DATABASE={quote(address.database)}",
            "USER=app": f"USER={quote(address.user)}",
            "PASSWORD=secret": f"PASSWORD={quote(address.password)}",
        },
    )
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("PGEBUS_")}
    process = await asyncio.create_subprocess_shell(
        code,
        cwd=tmp_path,
        env={**kept, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        _, stderr = await process.communicate()
    assert (process.returncode, stderr.decode()) == (0, "")
    connection = await server.connect(address.database)
    assert await connection.fetchval("SELECT pgebus.schema_version()") == SCHEMA_VERSION
    await connection.close()


@pytest.mark.parametrize("block", [b for b in blocks(*TRANSLATED) if b.language == "toml"], ids=lambda block: block.id)
def test_a_configuration_file_is_taken(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("PGEBUS_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "pgebus.toml"
    file.write_text(block.code, encoding="utf-8")
    monkeypatch.setenv("PGEBUS_CONFIG_FILE", str(file))
    read = tomllib.loads(block.code)
    assert read
    settings = Settings()
    for section, values in read.items():
        for name, value in values.items():
            found = getattr(getattr(settings, section), name)
            assert (found.get_secret_value() if isinstance(found, SecretStr) else found) == value


# --- fragments


class _Base(DeclarativeBase):
    pass


class Order(_Base):
    """A table of the application."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    total: Mapped[int]


async def bank_is_open() -> bool:
    return False


async def prepared(sm: DatabaseSessionManager) -> dict[str, Any]:
    """Return the names that the fragments use; each gets a router of its own."""
    async with sm.engine.begin() as connection:
        await connection.run_sync(_Base.metadata.create_all)
        await connection.execute(text("CREATE TABLE stock (reserved integer)"))
        await connection.execute(text("INSERT INTO stock VALUES (0)"))
    public = {name: getattr(pgebus, name) for name in pgebus.__all__}
    return {
        **public,
        "__name__": "docs",
        "Any": Any,
        "Order": Order,
        "Session": Session,
        "asyncio": asyncio,
        "bank_is_open": bank_is_open,
        "datetime": datetime,
        "engine": sm.engine,
        "publisher_sm": sm,
        "router": EventRouter(),
        "sync_engine": create_engine(sm.engine.url.set(drivername="postgresql+psycopg"), poolclass=NullPool),
        "text": text,
        "timedelta": timedelta,
    }


async def execute(block: Block, names: dict[str, Any]) -> None:
    result = eval(block.compiled(), names)  # noqa: S307 - our own documentation
    if inspect.isawaitable(result):
        await result


@pytest.mark.parametrize("fragment", FRAGMENTS, ids=lambda block: block.id)
async def test_a_fragment_runs_with_the_names_that_it_takes_for_granted(
    fragment: Block, sm: DatabaseSessionManager
) -> None:
    await execute(fragment, await prepared(sm))


HANDLED = [
    block
    for block in FRAGMENTS
    if block.page.name in ("middleware.md", "dependencies.md") and "@router.on(" in block.code
]


@pytest.mark.parametrize("block", HANDLED, ids=lambda block: block.id)
async def test_the_handlers_of_a_guide_run(
    block: Block, database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    names = await prepared(sm)
    await execute(block, names)
    types = re.findall(r'@router\.on\("([\w.]+)"', block.code)
    async with EventSystem(names["router"], Settings(database=database)):
        await finished(sql, *[await publish(sm, each, {"order_id": 1}) for each in types])


async def test_the_handlers_of_the_readme_do_what_it_says(
    database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    """Everything the README publishes goes through everything that it registers, on one system."""
    names = await prepared(sm)
    router: EventRouter = names["router"]
    for block in FRAGMENTS:
        if block.page == ENGLISH:
            await execute(block, names)
    router.include_router(names["shop"])
    handled = count(1)
    done = asyncio.Event()

    @router.on("stock.reserved")
    async def watch(ctx: EventContext, _payload: dict[str, Any]) -> None:
        if next(handled) == 1_102:
            done.set()

    async with EventSystem(router, Settings(database=database)):
        async with sm.session() as session:
            for event_type, payload in (
                ("payment.requested", {"amount": 0}),
                ("payment.requested", {"amount": 1}),
                ("shop.mail.order.placed", {"order_id": 1}),
            ):
                await pgebus.publish_event(session, event_type, payload, "events")
            await session.commit()

        async def settled() -> bool:
            states = "SELECT count(*) FROM pgebus.deliveries WHERE status = 'running' OR status = 'pending' AND {}"
            return done.is_set() and not await sql.fetchval(states.format("due_at < now() + interval '1 minute'"))

        await until(settled, 60.0)  # two thousand transactions
    assert await sql.fetchval("SELECT reserved FROM stock") == 1_102
    rows = await sql.fetch(
        "SELECT type, status, attempt, count(*) AS n FROM pgebus.deliveries GROUP BY 1, 2, 3 ORDER BY 1, 2"
    )
    assert [tuple(row) for row in rows] == [
        ("order.placed", "completed", 1, 1_102),
        ("payment.requested", "dead", 1, 1),
        ("payment.requested", "pending", 0, 1),
        ("shop.mail.order.placed", "completed", 1, 1),
        ("stock.reserved", "completed", 1, 1_102),
    ]
    causes = (
        "SELECT count(*) FROM pgebus.events WHERE headers ->> 'causation_id' IN (SELECT id::text FROM pgebus.events)"
    )
    assert await sql.fetchval(causes) == 1_102


@pytest.mark.parametrize("block", [b for b in blocks(*TRANSLATED) if b.language == "sql"], ids=lambda block: block.id)
async def test_an_sql_block_runs(block: Block, sql: Sql) -> None:
    await sql.execute(block.code)


# --- pages


def test_both_readmes_have_the_same_structure() -> None:
    levels = [[len(match[1]) for match in _HEADING.finditer(prose(page))] for page in (ENGLISH, CHINESE)]
    assert levels[0] == levels[1]
    marks = [
        [line[:2] for line in prose(page).splitlines() if line.startswith(("| ", "- "))] for page in (ENGLISH, CHINESE)
    ]
    assert marks[0] == marks[1]


def test_both_readmes_have_the_same_code_but_for_comments() -> None:
    english, chinese = blocks(ENGLISH), blocks(CHINESE)
    assert [block.language for block in english] == [block.language for block in chinese]
    for one, other in zip(english, chinese, strict=True):
        if one.language == "python":
            assert one.tree() == other.tree(), (one.id, other.id)
        else:
            bare = [re.sub(r" *#.*", "", block.code) for block in (one, other)]
            assert bare[0] == bare[1], (one.id, other.id)


def anchor_of(heading: str) -> str:
    """The anchor that a renderer gives to ``heading``: lower case, no punctuation, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, *EXAMPLES], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        if anchor:
            assert anchor in [anchor_of(match[2]) for match in _HEADING.finditer(prose(linked))], target


def settings_of(page: Path) -> dict[tuple[str, str], str]:
    return {(section.lower(), name.lower()): default for section, name, default in _VARIABLE.findall(prose(page))}


def fields() -> dict[tuple[str, str], Any]:
    sections: dict[str, type[BaseModel]] = {"database": DatabaseSettings, "event_system": EventSystemSettings}
    return {
        (section, field.alias or name): field.get_default(call_default_factory=True)
        for section, model in sections.items()
        for name, field in model.model_fields.items()
    }


@pytest.mark.parametrize("page", [ENGLISH, CHINESE, REFERENCE], ids=lambda page: page.name)
def test_the_settings_and_their_defaults_are_what_the_tables_say(page: Path) -> None:
    known = fields()
    printed = settings_of(page)
    assert printed
    for setting, default in printed.items():
        value = known[setting]
        if value is None:
            assert default in ("none", "无"), setting
        elif isinstance(value, float):
            assert float(default.strip("`")) == value, setting
        else:
            assert default == f"`{value}`", setting


def test_the_reference_has_every_setting() -> None:
    assert set(settings_of(REFERENCE)) == set(fields())


def test_the_reference_has_every_public_name() -> None:
    section = prose(REFERENCE).partition("## Public names\n")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == sorted(pgebus.__all__)


def test_the_reference_has_everything_that_is_forbidden_on_the_session() -> None:
    section = prose(REFERENCE).partition("### GuardedSession\n")[2].partition("\n## ")[0]
    allowed, separator, forbidden = section.partition("Forbidden:")
    assert separator
    assert set(re.findall(r"`(\w+)`", forbidden.partition("\n\n")[0])) == set(FORBIDDEN)
    methods = {name for name in vars(pgebus.GuardedSession) if not name.startswith("_")}
    assert set(re.findall(r"`(\w+)`", allowed.partition("Allowed:")[2].partition("\n\n")[0])) == methods - {"unsafe"}


def test_the_tests_that_the_guarantees_name_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", prose(GUARANTEES))
    assert named
    for file, test in named:
        defined = {
            node.name
            for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        }
        assert test in defined, (file, test)
