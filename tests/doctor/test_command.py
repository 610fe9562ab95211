"""`pgebus doctor`: what it says, how it exits, and that the guide shows it as it is. WRITE_DOCS=1 writes the guide."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest

import pgebus.doctor
from pgebus import DatabaseSettings
from pgebus.doctor import _server
from tests.postgres.plain_sql import Sql, subscribe
from tests.postgres.states import event_in
from tests.system.conftest import Command
from tests.system.test_cli_check import url_of

PAGE = Path(__file__).parent.parent.parent / "docs" / "guides" / "doctor.md"
CONSOLE = re.compile(r"^```console\n(\$ pgebus doctor.*?)^```$", re.MULTILINE | re.DOTALL)
SAME = (
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"), "2026-01-31 12:00:00"),
    (re.compile(r"^\S+/\S+: schema", re.MULTILINE), "app@localhost:5432/app: schema"),
)


async def provoke(sql: Sql) -> None:
    await subscribe(sql, "mail", "order.*")
    await event_in(sql, "pending", group="mail", event_type="order.placed")
    await event_in(sql, "dead", group="mail", event_type="order.placed")
    await sql.execute("INSERT INTO pgebus.events (type) VALUES ('invoice.due')")
    await sql.execute("ALTER TABLE pgebus.deliveries SET (autovacuum_enabled = off)")


async def test_the_guide_shows_what_the_command_says(
    sql: Sql, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_server, "_END_OF_LIFE", {})  # the same on all releases
    page = PAGE.read_text(encoding="utf-8")
    written: list[str] = []
    for block in CONSOLE.finditer(page):
        line = block[1].splitlines()[0]
        if not written:
            await provoke(sql)
        else:
            await sql.execute("TRUNCATE pgebus.consumer_groups, pgebus.events CASCADE")
            await sql.execute("ALTER TABLE pgebus.deliveries RESET (autovacuum_enabled)")
        status, out, err = await command(*shlex.split(line)[2:])
        assert (status, err) == (0 if written else 1, "")
        for pattern, text in SAME:
            out = pattern.sub(text, out)
        written.append(f"{line}\n{out}")
    anew = iter(written)
    shown = CONSOLE.sub(lambda _: f"```console\n{next(anew)}```", page)
    if os.environ.get("WRITE_DOCS"):
        PAGE.write_text(shown, encoding="utf-8")
    assert len(written) == 2
    assert page == shown


def test_the_guide_lists_every_code() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in Path(pgebus.doctor.__file__).parent.glob("_*.py"))
    made = set(re.findall(r"(?:notice|problem|warning|make|problem\))\(\s*\"([a-z-]+)\"", sources))
    table = PAGE.read_text(encoding="utf-8").partition("## Codes")[2]
    listed = {
        code for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for code in re.findall(r"`([^`]+)`", row)
    }
    assert made == listed


async def test_programs_get_all_of_it(sql: Sql, command: Command) -> None:
    status, out, err = await command("doctor", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert (found["schema"], found["worst"]) == ("pgebus", "notice")
    assert {each["severity"] for each in found["findings"]} == {"ok", "notice"}
    await provoke(sql)
    status, out, err = await command("doctor", "--json")
    found = json.loads(out)
    assert (status, found["worst"], found["findings"][0]["severity"]) == (1, "problem", "problem")
    assert set(found["findings"][0]) == {"code", "severity", "seen", "remedy", "subject"}


async def test_without_a_database_it_says_where_it_looked(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGEBUS_DATABASE__URL", "postgresql://app:canary-71c5@127.0.0.1:1/nowhere")
    status, out, err = await command("doctor")
    assert (status, err) == (1, "")
    assert out.startswith("problem  unreachable: ")
    assert "PGEBUS_DATABASE__URL" in out
    assert "canary" not in out


async def test_settings_that_are_wrong_are_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGEBUS_DATABASE__URL", "mysql://app@127.0.0.1/nowhere")
    status, out, err = await command("doctor")
    assert (status, out, "Traceback" in err) == (2, "", False)


async def test_a_database_without_tables_is_told_what_to_do(
    empty_database: DatabaseSettings, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGEBUS_DATABASE__URL", url_of(empty_database))
    status, out, _ = await command("doctor")
    assert (status, "pgebus migrate" in out) == (1, True)


async def test_nothing_in_a_row_moves_the_cursor(sql: Sql, command: Command) -> None:
    await event_in(sql, "dead", key="k\x1b[2J", holds_key=True)
    await event_in(sql, "blocked", key="k\x1b[2J")
    await sql.execute("""UPDATE pgebus.deliveries SET errors = '[{"type": "E", "message": "\\u001b[31m"}]'""")
    out = (await command("doctor"))[1]
    assert "key-held" in out
    assert "\x1b" not in out
