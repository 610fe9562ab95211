"""`pgebus status` and `pgebus trace`: in pipes, in terminals of all widths, again and again."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from sqlalchemy import text

from pgebus import DatabaseSettings
from pgebus.cli import showing
from pgebus.cli import status as shown
from pgebus.operations import GroupStatus
from tests.postgres.plain_sql import subscribe
from tests.system.bus import Sql
from tests.system.commands import PGEBUS
from tests.system.conftest import Command

EVENTS = """
INSERT INTO pgebus.events (type, headers) VALUES ('order.placed', '{}'),
  ('mail.sent', '{"correlation_id": "1", "causation_id": "1"}'),
  ('mail.opened', '{"correlation_id": "1", "causation_id": "2"}');
UPDATE pgebus.deliveries SET status = 'completed', finished_at = due_at + interval '35 milliseconds', attempt = 1,
  claim_seq = 1 WHERE event_id = 1;
UPDATE pgebus.deliveries SET status = 'dead', finished_at = due_at + interval '12 seconds', attempt = 3, claim_seq = 3,
  errors = '[{"type": "ValueError", "message": "no\\u001b[31m such"}]' WHERE event_id = 2;
"""


@pytest.fixture
async def events(sql: Sql) -> None:
    await subscribe(sql, "mail", "#")
    await sql.execute(EVENTS)


async def test_the_status_is_a_line_for_each_group(events: None, command: Command) -> None:
    status, out, err = await command("status")
    assert (status, err) == (0, "")
    title, line = out.splitlines()
    assert title.split()[:6] == ["channel", "group", "workers", "pending", "due", "oldest"]
    assert line.split()[:5] == ["events", "mail", "0", "1", "1"]
    assert "\x1b" not in out


async def test_the_status_as_json_has_numbers_and_seconds(events: None, command: Command) -> None:
    status, out, _ = await command("status", "--json", "--channel", "events")
    (group,) = json.loads(out)
    assert status == 0
    assert (group["pending"], group["dead"], group["capped"]) == (1, 1, [])
    assert 0 <= group["oldest_due_seconds"] < 60


async def test_there_may_be_no_group(database: DatabaseSettings, command: Command) -> None:
    assert await command("status") == (0, "There are no consumer groups: no worker has started yet.\n", "")
    assert await command("status", "--json") == (0, "[]\n", "")


async def test_a_number_of_seconds_needs_watch(database: DatabaseSettings, command: Command) -> None:
    status, out, err = await command("status", "5")
    assert (status, out) == (2, "")
    assert "--watch" in err


async def test_the_trace_is_a_tree(events: None, command: Command) -> None:
    status, out, err = await command("trace", "2")
    assert (status, err) == (0, "")
    assert re.sub(r"\d{4}-.*|\d+ ms later|due for.*", "…", out).splitlines() == [
        "event 1: order.placed, …",
        "├── mail: completed 35 ms after it was due",
        "└── event 2: mail.sent, …, asked for",
        r"    ├── mail: dead 12.0 s after it was due, attempt 3: ValueError: no\x1b[31m such",
        "    └── event 3: mail.opened, …",
        "        └── mail: pending, …",
    ]


async def test_the_trace_names_an_event_that_is_gone(events: None, sql: Sql, command: Command) -> None:
    await sql.execute("DELETE FROM pgebus.events WHERE id = 2")
    _, out, _ = await command("trace", "1")
    assert re.search(r"└── event 3: mail.opened, .* later, of event 2, which is gone\n", out)


async def test_the_trace_as_json_has_seconds(events: None, command: Command) -> None:
    status, out, _ = await command("trace", "3", "--json")
    assert status == 0
    found = json.loads(out)
    assert [(each["id"], each["depth"], each["cause"]) for each in found["events"]] == [
        (1, 0, None),
        (2, 1, 1),
        (3, 2, 2),
    ]
    assert found["events"][0]["deliveries"][0]["took_seconds"] == 0.035


async def test_a_deep_trace_stays_readable_and_says_that_it_is_cut(sql: Sql, command: Command) -> None:
    await sql.execute(
        "INSERT INTO pgebus.events (type, headers) SELECT 'a.b', CASE WHEN n = 1 THEN '{}'::jsonb ELSE"
        " jsonb_build_object('causation_id', (n - 1)::text, 'correlation_id', '1') END FROM generate_series(1, 60) n"
    )
    _, out, _ = await command("trace", "1", "--limit", "40")
    assert len(re.findall("event ", out)) >= 40
    assert max(map(len, out.splitlines())) < 140
    assert "event 30: a.b" in out
    assert "of event 29" in out
    assert "raise --limit" in out


async def test_an_event_that_is_not_there(database: DatabaseSettings, command: Command) -> None:
    assert await command("trace", "7") == (1, "", "There is no event 7.\n")


@pytest.mark.parametrize(
    "arguments", [["status"], ["deliveries"], ["groups"], ["trace", "1"], ["redrive", "--dry-run"]]
)
async def test_a_table_that_somebody_has_locked_is_said(
    events: None, sql: Sql, command: Command, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr(showing, "PATIENCE", text("SET LOCAL lock_timeout = '100ms'"))
    async with sql.transaction():
        await sql.execute("LOCK TABLE pgebus.deliveries IN ACCESS EXCLUSIVE MODE")
        async with asyncio.timeout(30):
            status, out, err = await command(*arguments)
    assert (status, out) == (1, "")
    assert "A table is locked by another session" in err
    assert "PGEBUS_DATABASE__URL" not in err


# terminals


def group(**values: object) -> GroupStatus:
    fields = dict.fromkeys(("pending", "due", "running", "blocked", "dead", "unhandled", "workers"), 10_000)
    return GroupStatus(
        **{  # type: ignore[arg-type]  # of the right types, by name
            "channel": "events",
            "group": "billing",
            "declared": True,
            "paused_at": None,
            "oldest_due": None,
            "per_second": 1234.5,
            "capped": ("pending", "dead"),
            **fields,
            **values,
        }
    )


@pytest.mark.parametrize("width", [30, 80, 200])
def test_a_table_that_does_not_fit_is_lines(width: int) -> None:
    console = Console(width=width, highlight=False, markup=False, force_terminal=True, color_system=None, record=True)
    for each in shown._tables([group(), group(group="mail", pending=0, capped=())], None, console):
        console.print(each)
    exported = console.export_text()
    assert max(map(len, exported.splitlines())) <= width
    assert "10000+" in exported
    assert ("10000+ pending" in " ".join(exported.split())) == (width == 30)
    assert "…" not in exported


@pytest.mark.parametrize("width", [40, 80, 200])
def test_ids_and_names_are_never_cut_off(width: int) -> None:
    """The next command needs them: `show EVENT`, `groups pause GROUP`, `release-key GROUP KEY`."""
    console = Console(width=width, highlight=False, markup=False, force_terminal=True, color_system=None, record=True)
    titles = ["event", "group", "type", "key", "status", "attempt", "round", "since", "error"]
    row = [
        "9007199254740993",
        "billing",
        "order." + "placed" * 10,
        "customer [7]",
        "dead",
        "3",
        "0",
        "today",
        "ValueError",
    ]
    for each in showing.fitting(titles, [row, row], console):
        console.print(each)
    exported = console.export_text()
    assert max(map(len, exported.splitlines())) <= width
    assert "…" not in exported
    joined = re.sub(r"\s", "", exported)
    for cell in row:
        assert joined.count(re.sub(r"\s", "", cell)) >= 2
    assert exported.count("event 9007199254740993, group billing,") == (0 if width == 200 else 2)


class Terminal:
    """A terminal in which a command runs."""

    def __init__(self, directory: Path, database: DatabaseSettings, *arguments: str, **variables: str) -> None:
        self._ours, theirs = pty.openpty()
        kept = {name: each for name, each in os.environ.items() if not name.startswith("PGEBUS_")}
        url = database.sqlalchemy_url().render_as_string(hide_password=False)
        self.process = subprocess.Popen(  # noqa: S603 - this Python
            [*PGEBUS, *arguments],
            cwd=directory,
            env={**kept, "TERM": "xterm-256color", "PGEBUS_DATABASE__URL": url, **variables},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.shown = ""

    async def shows(self, text: str, times: int = 1) -> None:
        """Wait until it was shown so many times."""
        async with asyncio.timeout(30):
            while self.shown.count(text) < times:
                self.shown += (await asyncio.to_thread(os.read, self._ours, 4096)).decode()

    async def ends(self) -> int:
        """Wait for the end, and read the rest."""
        async with asyncio.timeout(30):
            try:
                while more := await asyncio.to_thread(os.read, self._ours, 4096):
                    self.shown += more.decode()
            except OSError:  # so a terminal ends
                pass
            return await asyncio.to_thread(self.process.wait)

    def bury(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    """Terminals to be closed with the test."""
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.bury()


async def test_status_looks_again_and_again_until_ctrl_c(
    events: None, database: DatabaseSettings, sql: Sql, tmp_path: Path, terminals: list[Terminal]
) -> None:
    """It colours what is dead, and goes on when the database was away."""
    terminal = Terminal(tmp_path, database, "status", "--watch", "0.1", COLUMNS="100")
    terminals.append(terminal)
    await terminal.shows("Ctrl-C ends it", 3)
    assert re.search(r"\x1b\[31m +1\x1b", terminal.shown)
    await sql.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <>"
        " pg_backend_pid()"
    )
    seen = terminal.shown.count("Ctrl-C ends it")
    await terminal.shows("Ctrl-C ends it", seen + 3)
    terminal.process.send_signal(signal.SIGINT)
    assert await terminal.ends() == 0
    assert "Traceback" not in terminal.shown


@pytest.mark.parametrize("columns", ["40", "80"])
async def test_a_narrow_terminal_is_told_the_whole_id(
    events: None, database: DatabaseSettings, tmp_path: Path, terminals: list[Terminal], columns: str
) -> None:
    terminal = Terminal(tmp_path, database, "deliveries", "--group", "mail", COLUMNS=columns)
    terminals.append(terminal)
    assert await terminal.ends() == 0
    told = " ".join(terminal.shown.split())
    assert "event 2, group mail, type mail.sent, status dead, attempt 3," in told
    assert "error ValueError: no" in told


@pytest.mark.slow
async def test_no_color_is_heard(
    events: None, database: DatabaseSettings, tmp_path: Path, terminals: list[Terminal]
) -> None:
    terminal = Terminal(tmp_path, database, "status", NO_COLOR="1", COLUMNS="100")
    terminals.append(terminal)
    assert await terminal.ends() == 0
    assert "mail" in terminal.shown
    assert "\x1b[31m" not in terminal.shown


async def test_a_watch_whose_reader_leaves_ends_quietly(
    events: None, database: DatabaseSettings, tmp_path: Path
) -> None:
    """As in `pgebus status --watch --json | head -1`."""
    url = database.sqlalchemy_url().render_as_string(hide_password=False)
    kept = {name: each for name, each in os.environ.items() if not name.startswith("PGEBUS_")}
    process = await asyncio.create_subprocess_exec(
        *[*PGEBUS, "status", "--watch", "0.1", "--json"],
        cwd=tmp_path,
        env={**kept, "PGEBUS_DATABASE__URL": url},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    async with asyncio.timeout(30):
        (first,) = json.loads(await process.stdout.readline())
        assert first["group"] == "mail"
        process.stdout._transport.close()  # type: ignore[attr-defined]  # a reader has no other way to leave
        assert await process.stderr.read() == b""
        assert await process.wait() == 1
