"""`pgebus worker` as it is used: in processes of its own, with real signals."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from pgebus import DatabaseSessionManager, DatabaseSettings
from pgebus.cli.app import run
from pgebus.cli.worker.orders import Order
from pgebus.cli.worker.supervising import _Crew
from pgebus.cli.worker.supervision import Supervisor
from pgebus.models import SCHEMA_VERSION
from tests.conftest import Server
from tests.embedded import embedded
from tests.system.bus import Sql, delivery, finished, publish
from tests.system.commands import Running
from tests.system.waiting import until

CANARY = "canary-4b7e"

APP = """
import asyncio
import os
import time
from pathlib import Path

from pgebus import EventRouter, EventSystem, Settings

router = EventRouter()


@router.on("job.gated")
async def gated(ctx, payload):
    print("begun in", os.getpid())
    while not Path("gate").exists():
        await asyncio.sleep(0.01)


@router.on("job.blocks")
async def blocks(ctx, payload):
    print("begun in", os.getpid())
    time.sleep(3600)


@router.on("job.quick")
async def quick(ctx, payload):
    print("version one")


system = EventSystem(router, Settings())
number = 7


async def make():
    return EventSystem(router, Settings())


def fail():
    raise RuntimeError("not today")


def leave_a_child():
    if os.fork() == 0:
        while not Path("gate").exists():
            time.sleep(0.01)
        os._exit(0)
    os._exit(3)
"""

Start = Callable[..., Running]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start `pgebus worker`; it ends with the test."""
    (tmp_path / "app.py").write_text(APP, encoding="utf-8")
    running: list[Running] = []

    def begin(database: DatabaseSettings | str, *arguments: str, **variables: str) -> Running:
        if isinstance(database, DatabaseSettings):
            database = database.sqlalchemy_url().render_as_string(hide_password=False)
        command = Running(
            tmp_path, ["worker", *(arguments or ["app:system"])], PGEBUS_DATABASE__URL=database, **variables
        )
        running.append(command)
        return command

    yield begin
    for command in running:
        command.bury()


async def alive(sql: Sql, count: int) -> list[int]:
    """Wait until so many workers say that they run; return the ids of their processes."""

    async def there() -> list[int]:
        rows = await sql.fetch("SELECT pid FROM pgebus.workers WHERE ended_at IS NULL")
        return [row["pid"] for row in rows] if len(rows) == count else []

    await until(there, 30.0)
    return await there()


# signals


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=lambda number: number.name
)
async def test_the_first_signal_lets_the_handlers_finish(
    start: Start, database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, tmp_path: Path, number: int
) -> None:
    worker = start(database)
    event_id = await publish(sm, "job.gated")
    await worker.says("begun in")
    worker.signal(number)
    await worker.says("The worker stops")
    assert worker.process.poll() is None
    (tmp_path / "gate").touch()
    assert await worker.ends() == 0
    await finished(sql, event_id)
    assert await sql.fetchval("SELECT count(*) FROM pgebus.workers WHERE ended_at IS NULL") == 0
    assert "Traceback" not in worker.said


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
async def test_the_second_signal_ends_it_at_once_and_its_deliveries_are_given_back(
    start: Start, database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, number: int, status: int
) -> None:
    worker = start(database)
    event_id = await publish(sm, "job.gated")
    await worker.says("begun in")
    worker.signal(number)
    await worker.says("The worker stops")
    worker.signal(number)
    assert await worker.ends() == status
    row = await delivery(sql, event_id)
    assert (row["status"], row["attempt"]) == ("pending", 0)
    assert "Traceback" not in worker.said


async def test_a_third_signal_ends_even_a_worker_whose_loop_is_blocked(
    start: Start, database: DatabaseSettings, sm: DatabaseSessionManager
) -> None:
    worker = start(database)
    await publish(sm, "job.blocks")
    await worker.says("begun in")
    for said in ("The worker stops", "The worker ends at once"):
        worker.signal(signal.SIGTERM)
        await worker.says(said)
    worker.signal(signal.SIGTERM)
    assert await worker.ends() == 143
    assert "has not ended in time" not in worker.said


@pytest.mark.slow
async def test_after_the_second_signal_a_blocked_loop_is_given_ten_seconds(
    start: Start, database: DatabaseSettings, sm: DatabaseSessionManager
) -> None:
    worker = start(database)
    await publish(sm, "job.blocks")
    await worker.says("begun in")
    for said in ("The worker stops", "The worker ends at once"):
        worker.signal(signal.SIGTERM)
        await worker.says(said)
    assert await worker.ends() == 143
    assert "has not ended in time" in worker.said


# several processes


async def test_a_child_that_is_killed_is_replaced_and_ctrl_c_is_heard_once(
    start: Start, database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, tmp_path: Path
) -> None:
    """A terminal sends SIGINT to the whole process group; the children get only what the supervisor hands on."""
    supervisor = start(database, "app:make", "--processes", "2")
    first, second = await alive(sql, 2)
    os.kill(first, signal.SIGKILL)

    async def replaced() -> bool:
        pids = {row["pid"] for row in await sql.fetch("SELECT pid FROM pgebus.workers WHERE ended_at IS NULL")}
        return second in pids and len(pids - {first}) == 2

    await until(replaced, 30.0)
    assert "has ended by SIGKILL; it is started again" in supervisor.said
    event_id = await publish(sm, "job.gated")
    await supervisor.says("begun in")
    os.killpg(supervisor.process.pid, signal.SIGINT)
    await supervisor.says("The worker stops", 2)
    (tmp_path / "gate").touch()
    assert await supervisor.ends() == 0
    await finished(sql, event_id)
    assert supervisor.left() == []


@pytest.mark.slow
async def test_the_second_signal_to_a_supervisor_ends_all_at_once(
    start: Start, database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql
) -> None:
    supervisor = start(database, "app:system", "--processes", "2")
    await alive(sql, 2)
    event_id = await publish(sm, "job.gated")
    await supervisor.says("begun in")
    supervisor.signal(signal.SIGTERM)
    await supervisor.says("The worker stops", 2)
    supervisor.signal(signal.SIGTERM)
    assert await supervisor.ends() == 143
    row = await delivery(sql, event_id)
    assert (row["status"], row["attempt"]) == ("pending", 0)
    assert supervisor.left() == []


@pytest.mark.parametrize("job", ["job.gated", pytest.param("job.blocks", marks=pytest.mark.slow)])
async def test_no_child_outlives_a_supervisor_that_is_killed(
    start: Start, database: DatabaseSettings, sm: DatabaseSessionManager, sql: Sql, job: str
) -> None:
    """Whatever its handlers do; those that can be cancelled are, and their deliveries are given back."""
    supervisor = start(database, "app:system", "--processes", "2")
    await alive(sql, 2)
    event_id = await publish(sm, job)
    await supervisor.says("begun in")
    supervisor.signal(signal.SIGKILL)
    await supervisor.nothing_is_left()
    if job == "job.gated":
        row = await delivery(sql, event_id)
        assert (row["status"], row["attempt"]) == ("pending", 0)


async def test_the_end_of_a_process_is_noticed_also_when_a_child_of_it_lives_on(
    start: Start, database: DatabaseSettings, tmp_path: Path
) -> None:
    """The child has what the supervisor listens to."""
    supervisor = start(database, "app:leave_a_child", "--processes", "2")
    try:
        assert await supervisor.ends() == 3, supervisor.said
    finally:
        (tmp_path / "gate").touch()
    await supervisor.nothing_is_left()


# reload


async def test_a_change_of_the_program_restarts_it_and_a_mistake_waits_for_the_next_one(
    start: Start, database: DatabaseSettings, sm: DatabaseSessionManager, tmp_path: Path
) -> None:
    worker = start(database, "app:system", "--reload")
    await publish(sm, "job.quick")
    await worker.says("version one")
    program = tmp_path / "app.py"
    program.write_text(APP + "\n1 +\n", encoding="utf-8")
    await worker.says("it is started again when a file changes")
    assert "cannot be imported: SyntaxError" in worker.said
    program.write_text(APP.replace("version one", "the second version"), encoding="utf-8")
    await publish(sm, "job.quick")
    await worker.says("the second version")
    worker.signal(signal.SIGINT)
    assert await worker.ends() == 0
    assert worker.left() == []


# mistakes


async def told(worker: Running, status: int, *words: str) -> None:
    """A mistake is told in one line, without a traceback and without a secret."""
    assert await worker.ends() == status, worker.said
    lines = [line for line in worker.said.splitlines() if " INFO " not in line]
    assert len(lines) == 1, worker.said
    for word in words:
        assert word in lines[0]
    assert CANARY not in worker.said


Misused = Callable[..., None]


@pytest.fixture
def misused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Misused]:
    """Make a mistake in this process, before anything is started: starting Python takes most of a command's time."""
    (tmp_path / "app.py").write_text(APP, encoding="utf-8")
    level = logging.getLogger("pgebus").level

    def run_here(arguments: list[str], *words: str, **variables: str) -> None:
        for name in [name for name in os.environ if name.startswith("PGEBUS_")]:
            monkeypatch.delenv(name)
        for name, value in {"PGEBUS_DATABASE__URL": NOWHERE, **variables}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "argv", ["pgebus", "worker", *arguments])
        monkeypatch.setitem(sys.modules, "uvloop", None)  # it cannot be imported
        importlib.invalidate_caches()
        with pytest.raises(SystemExit) as ended:
            run()
        out, err = capsys.readouterr()
        assert (ended.value.code, out, len(err.splitlines())) == (2, "", 1), err
        assert all(word in err for word in words), err
        assert CANARY not in err

    yield run_here
    logging.getLogger("pgebus").setLevel(level)
    for name in ("app", "broken"):
        sys.modules.pop(name, None)


NOWHERE = f"postgresql://shop:{CANARY}@127.0.0.1:1/orders"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["app"], ["'app' names no EventSystem", "package.module:name"]),
        (["nowhere:system"], ["There is no module 'nowhere'"]),
        (["app:sytem"], ["There is no EventSystem 'app:sytem'"]),
        (["app:number"], ["is int", "a function that returns one"]),
        (["app:router"], ["is an EventRouter", "EventSystem(router, Settings())"]),
        (["app:fail"], ["RuntimeError: not today", "app.py, line"]),
        (["app:system", "--groups", "mail"], ["groups that no handler is in: mail"]),
        (["app:system", "--groups", "default,,mail"], ["Group ''"]),
        (["app:system", "--reload", "--processes", "2"], ["Leave out --processes"]),
        (["app:system", "--loop", "uvloop"], ["pip install uvloop"]),
    ],
    ids=lambda each: " ".join(each) if each[0].startswith(("app", "nowhere")) else "",
)
def test_what_is_wrong_with_the_program_is_told_in_one_line(
    misused: Misused, arguments: list[str], words: list[str]
) -> None:
    misused(arguments, *words)


def test_a_module_that_cannot_be_imported_says_where(misused: Misused, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("\n\nvalue = 1 / 0\n", encoding="utf-8")
    misused(["broken:system"], "ZeroDivisionError", f"{tmp_path / 'broken.py'}, line 3")


def test_settings_that_are_wrong_are_the_programs_mistake(misused: Misused) -> None:
    misused(["app:system"], "event_system.n_workers", "app.py, line", PGEBUS_EVENT_SYSTEM__N_WORKERS="many")


async def test_three_processes_tell_of_a_mistake_once(start: Start) -> None:
    await told(start(NOWHERE, "app:nothing", "--processes", "3"), 2, "There is no EventSystem 'app:nothing'")


async def test_a_database_that_does_not_answer(start: Start) -> None:
    await told(start(NOWHERE), 1, "shop@127.0.0.1:1/orders", "[Errno ")


async def test_a_database_that_is_not_there(start: Start, server: Server) -> None:
    await told(start(server.settings("no_such_database")), 1, "no_such_database", "does not exist")


@pytest.mark.slow
async def test_a_password_that_is_wrong(start: Start) -> None:
    with embedded({"fsync": "off"}) as postgres:
        (Path(postgres.host) / "data" / "pg_hba.conf").write_text("local all all scram-sha-256\n")
        postgres.restart()
        url = f"postgresql://postgres:{CANARY}@/postgres?host={postgres.host}"
        await told(start(url), 1, "password authentication failed")


async def test_tables_that_are_missing(start: Start, empty_database: DatabaseSettings) -> None:
    await told(start(empty_database), 1, "does not hold the tables of pgebus", "pgebus migrate")


async def test_tables_of_another_release(start: Start, database: DatabaseSettings, sql: Sql) -> None:
    newer = SCHEMA_VERSION + 2
    await sql.execute(
        f"CREATE OR REPLACE FUNCTION pgebus.schema_version() RETURNS integer LANGUAGE sql AS 'SELECT {newer}'"
    )
    await told(start(database), 1, f"is at version {newer}", "Install the release")


@pytest.mark.skipif(importlib.util.find_spec("uvloop") is None, reason="uvloop is not installed")
async def test_it_runs_on_uvloop_and_hears_signals(
    start: Start, database: DatabaseSettings, sm: DatabaseSessionManager, tmp_path: Path
) -> None:
    (tmp_path / "app.py").write_text(APP.replace('"version one"', "type(asyncio.get_running_loop())"), encoding="utf-8")
    worker = start(database)
    await publish(sm, "job.quick")
    await worker.says("uvloop.Loop")
    worker.signal(signal.SIGTERM)
    assert await worker.ends() == 0


# logs


@pytest.mark.slow
async def test_the_logging_that_a_program_sets_up_stays(
    start: Start, database: DatabaseSettings, tmp_path: Path
) -> None:
    (tmp_path / "app.py").write_text(
        f"import logging\nlogging.basicConfig(format='ours: %(message)s')\n{APP}", encoding="utf-8"
    )
    worker = start(database, "app:system", "--log-level", "info")
    await worker.says("ours: Handling channel")
    worker.signal(signal.SIGTERM)
    assert await worker.ends() == 0
    assert " INFO " not in worker.said


@pytest.mark.parametrize(("failing", "status"), [(1, 1), (3, 0)], ids=["the first one", "one of several"])
async def test_a_process_that_cannot_be_started_ends_no_other(
    failing: int, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of processes, or of memory, is reached for a moment."""
    start, times = asyncio.create_subprocess_exec, 0

    async def exec_(program: str, *_: str, **options: Any) -> asyncio.subprocess.Process:
        nonlocal times
        times += 1
        if times == failing:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        (life,) = options["pass_fds"]
        return await start(program, "-c", f"import os, time; os.write({life}, b'r'); time.sleep(60)", **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", exec_)
    crew = _Crew(Order("app:system"), Supervisor(3, Random(1)))

    async def told() -> bool:
        if ready := len(crew._processes) == 3:
            crew._happened.put_nowait(lambda: crew._told(signal.SIGTERM))
        return ready or running.done()

    running = asyncio.create_task(crew.run(()))
    await until(told)
    async with asyncio.timeout(10):
        assert await running == status
    assert times == (4 if status == 0 else 1)
