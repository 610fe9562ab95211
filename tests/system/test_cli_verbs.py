"""`pgebus deliveries`, `show` and the verbs, on the command line."""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pgebus import ConfigurationError, DatabaseSettings
from pgebus.cli.acting import BATCH, Act
from pgebus.cli.options import age_of, moment_of
from tests.postgres.plain_sql import subscribe
from tests.postgres.states import STATES, event_in
from tests.system.bus import Sql
from tests.system.conftest import Command
from tests.system.faults import connected
from tests.system.test_cli_check import environment, url_of
from tests.system.test_verbs_at_work import fill


async def statuses(sql: Sql) -> list[str]:
    rows = await sql.fetch("SELECT status FROM pgebus.deliveries ORDER BY event_id, consumer_group")
    return [row["status"] for row in rows]


async def test_deliveries_are_listed_page_by_page_and_shown(sql: Sql, command: Command) -> None:
    assert await command("deliveries") == (0, "There are no such deliveries.\n", "")
    ids = [await event_in(sql, status) for status in STATES]
    status, out, err = await command("deliveries")
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["event", *map(str, reversed(ids))]
    assert "ValueError: Ada is unknown" in out
    status, out, err = await command("deliveries", "--limit", "2")
    assert [line.split()[0] for line in out.splitlines()[1:]] == [str(ids[6]), str(ids[5])]
    assert err == f"There may be more: --after {ids[5]}:default\n"
    out = (await command("deliveries", "--after", f"{ids[5]}:default", "--limit", "1"))[1]
    assert out.splitlines()[1].split()[0] == str(ids[4])
    out = (await command("deliveries", "--status", "dead", "--status", "running", "--type", "a.*", "--json"))[1]
    assert [each["status"] for each in json.loads(out)] == ["dead", "running"]
    assert (await command("deliveries", "--finished-before", "1h"))[1] == "There are no such deliveries.\n"
    assert len((await command("deliveries", "--finished-after", "1h"))[1].splitlines()) == 4

    status, out, err = await command("show", str(ids[5]))
    assert (status, err) == (0, "")
    for part in (f"event {ids[5]}: a.b", '{"name": "Ada"}', "default: dead", "attempt 2", "second", "Traceback of Ada"):
        assert part in out
    shown = json.loads((await command("show", str(ids[5]), "--json"))[1])
    assert (shown["payload"], shown["deliveries"][0]["status"]) == ({"name": "Ada"}, "dead")
    status, out, err = await command("show", "4711")
    assert (status, out, "There is no event 4711" in err) == (1, "", True)


async def test_nothing_in_a_row_moves_the_cursor(sql: Sql, command: Command) -> None:
    """Keys and errors come from anywhere, also from somebody who knows what a terminal makes of them."""
    event_id = await event_in(sql, "dead", key="k\x1b[2J\n\r\u202e")
    await sql.execute("""UPDATE pgebus.deliveries SET errors = '[{"type": "E", "message": "\\u001b[31m"}, 7]'""")
    for arguments in (["deliveries"], ["show", str(event_id)]):
        status, out, _ = await command(*arguments)
        assert status == 0
        assert not {"\x1b", "\r", "\u202e"} & set(out)


# The command, what it makes of the dead letter and the completed event that are there, and what it says.
VERBS: list[tuple[list[str], list[str], str]] = [
    (["redrive"], ["pending", "completed"], "1 dead letter"),
    (["replay", "default"], ["pending", "pending"], "2 events"),
    (["cancel", "--status", "dead"], ["cancelled", "completed"], "1 delivery"),
    (["prune", "--older-than", "10m"], ["dead"], "1 event"),
    (["purge", "--type", "#"], ["cancelled", "completed"], "2 events"),
]


@pytest.mark.parametrize(("arguments", "becomes", "counted"), VERBS, ids=[each[0][0] for each in VERBS])
async def test_a_verb_says_how_many_and_is_meant(
    arguments: list[str], becomes: list[str], counted: str, sql: Sql, command: Command
) -> None:
    """Without --yes, and nobody there to ask, nothing is changed: and that is no success."""
    await subscribe(sql, "default", "#")
    for each in ("dead", "completed"):
        await event_in(sql, each)
    status, out, err = await command(*arguments, "--dry-run")
    assert (status, out.startswith(f"{counted} would be "), err) == (0, True, "")
    status, out, err = await command(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"{counted} would be ")
    assert err.endswith("Nothing was changed: say --yes.\n")
    assert (await command(*arguments, "--json"))[0] == 2
    assert await statuses(sql) == ["dead", "completed"]
    status, out, err = await command(*arguments, "--yes")
    assert (status, out.startswith(f"{counted} "), out.endswith(".\n"), err) == (0, True, True, "")
    assert await statuses(sql) == becomes
    again = json.loads((await command(*arguments, "--yes", "--json"))[1])
    assert again == {"command": arguments[0], "found": 0, "changed": 0, "dry_run": False}
    status, out, _ = await command(*arguments, "--yes")
    assert (status, out.startswith("No ")) == (0, True)


async def test_whoever_is_asked_may_say_no(sql: Sql, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    await event_in(sql, "dead")

    class Terminal:
        """Answers a question, once."""

        def __init__(self, answer: str) -> None:
            self.answer = answer

        def isatty(self) -> bool:
            return True

        def readline(self, *_: int) -> str:
            return self.answer

        def __iter__(self) -> Any:
            return iter([self.answer])

    for answer, status, becomes in (("n\n", 1, "dead"), ("y\n", 0, "pending")):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        seen, out, _ = await command("redrive")
        assert (seen, "1 dead letter will be redriven. Go on?" in out) == (status, True)
        assert await statuses(sql) == [becomes]


@pytest.mark.parametrize("given", [[], ["--created-before", "2100-01-01"]])
async def test_nobody_was_asked_about_what_was_published_meanwhile(
    sql: Sql, database: DatabaseSettings, command: Command, monkeypatch: pytest.MonkeyPatch, given: list[str]
) -> None:
    """While the operator thinks, those that were counted are completed, and as many others come."""
    await event_in(sql, "pending")
    ask = Act.ask

    def think(self: Act, found: int) -> None:
        ask(self, found)
        asyncio.run(meanwhile())

    async def meanwhile() -> None:
        async with connected(database) as other:
            await other.execute("UPDATE pgebus.deliveries SET status = 'completed', finished_at = now()")
            event_id = await event_in(other, "pending")
            await other.execute("UPDATE pgebus.events SET created_at = now() WHERE id = $1", event_id)

    monkeypatch.setattr(Act, "ask", think)
    status, out, _ = await command("cancel", "--type", "a.b", *given, "--yes")
    assert (status, out) == (0, "No deliveries cancelled. 1 had changed meanwhile, or are locked.\n")
    assert await statuses(sql) == ["completed", "pending"]


async def test_a_held_key_is_let_go(sql: Sql, command: Command) -> None:
    await event_in(sql, "dead", holds_key=True)
    await event_in(sql, "blocked", key="k")
    assert (await command("release-key", "default", "k"))[0] == 2
    assert await statuses(sql) == ["dead", "blocked"]
    status, out, _ = await command("release-key", "default", "k", "--yes", "--reason", "lost", "--by", "ada")
    assert (status, out) == (0, "1 delivery made to let go of key 'k'.\n")
    assert await statuses(sql) == ["dead", "pending"]
    assert "Released: by ada: lost" in (await command("show", "1"))[1]


async def test_a_key_that_nothing_holds_any_more_is_let_go_as_well(sql: Sql, command: Command) -> None:
    """As `pgebus doctor` says, where no worker sweeps."""
    await event_in(sql, "blocked", key="k")
    status, out, _ = await command("release-key", "default", "k")
    assert (status, out) == (0, "No deliveries made to let go of key 'k'.\n")
    assert await statuses(sql) == ["pending"]


async def test_a_group_is_removed_when_that_is_meant_and_batch_by_batch(sql: Sql, command: Command) -> None:
    await fill(sql, 2 * BATCH)
    await subscribe(sql, "default", "a.b")
    status, out, err = await command("groups", "remove", "default")
    assert (status, out) == (2, "")
    assert err == "2,000 deliveries would be cancelled with group 'default'. Nothing was changed: say --yes.\n"
    assert await sql.fetchval("SELECT count(*) FROM pgebus.subscriptions") > 0
    status, out, _ = await command("groups", "remove", "default", "--yes")
    assert (status, out) == (0, "Group 'default' is removed; deliveries cancelled: 2000.\n")
    assert await sql.fetchval("SELECT count(DISTINCT xmin::text) FROM pgebus.deliveries") == 2
    assert (await command("groups", "remove", "default", "--yes"))[0] == 2


async def test_what_cannot_be_purged_yet_is_said(sql: Sql, command: Command) -> None:
    await event_in(sql, "running")
    await event_in(sql, "completed")
    status, out, err = await command("purge", "--type", "a.b", "--yes")
    assert (status, out) == (1, "1 event emptied.\n")
    assert "still to be handled: 1" in err


async def test_many_are_done_batch_by_batch(sql: Sql, command: Command) -> None:
    await fill(sql, 2 * BATCH + 1)
    assert (await command("redrive", "--yes"))[1] == "2,001 dead letters redriven.\n"
    assert await sql.fetchval("SELECT count(DISTINCT xmin::text) FROM pgebus.deliveries") == 3
    assert (await command("cancel", "--type", "a.b", "--yes"))[1] == "2,001 deliveries cancelled.\n"
    assert (await command("prune", "--older-than", "0s", "--yes"))[1] == "2,001 events deleted.\n"


async def test_an_event_that_a_table_of_the_user_refers_to_is_not_pruned(sql: Sql, command: Command) -> None:
    await event_in(sql, "completed")
    await sql.execute("CREATE TABLE mine AS SELECT id FROM pgebus.events")
    await sql.execute("ALTER TABLE mine ADD FOREIGN KEY (id) REFERENCES pgebus.events")
    status, out, err = await command("prune", "--older-than", "1m", "--yes")
    assert (status, err) == (0, "")
    assert out == (
        "No events deleted. 1 had changed meanwhile, are locked, or are kept by a table or a trigger of yours.\n"
    )


MISTAKES = [
    ["deliveries", "--limit", "0"],
    ["deliveries", "--limit", "1000000000"],
    ["deliveries", "--status", "done"],
    ["deliveries", "--after", "7"],
    ["deliveries", "--after", "-7:default"],
    ["deliveries", "--created-after", "yesterday"],
    ["deliveries", "--created-after", "999999999w"],
    ["deliveries", "--type", "a..b"],
    ["deliveries", "--key", "a\udcff"],
    ["deliveries", "99999999999999999999"],
    ["show", "x"],
    ["show", "99999999999999999999"],
    ["redrive", "--group", "a b", "--yes"],
    ["redrive", "x"],
    ["replay", "--yes"],
    ["replay", "nobody", "--yes"],
    ["replay", "default", "--channel", "", "--yes"],
    ["cancel", "--yes"],
    ["cancel", "--channel", "events", "--yes"],
    ["cancel", "--status", "completed", "--yes"],
    ["release-key", "default", "", "--yes"],
    ["prune", "--yes"],
    ["prune", "--older-than", "7", "--yes"],
    ["prune", "--older-than", "-7d", "--yes"],
    ["purge", "--yes"],
]


async def test_a_mistake_is_said_in_a_line_and_changes_nothing(sql: Sql, command: Command) -> None:
    for each in STATES:
        await event_in(sql, each)
    for arguments in MISTAKES:
        status, out, err = await command(*arguments)
        assert (status, out, "Traceback" in err, bool(err)) == (2, "", False, True), (arguments, status, out, err)
    assert await statuses(sql) == list(STATES)


async def test_whoever_stops_reading_gets_no_traceback(sql: Sql, database: DatabaseSettings) -> None:
    """As `pgebus deliveries | head -1` does; and no colours where nobody wants them."""
    await fill(sql, 3_000)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "pgebus.cli", "deliveries", "--limit", "4000"),
        env={**environment(), "PGEBUS_DATABASE__URL": url_of(database), "NO_COLOR": "1"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert (await process.stdout.readline()).startswith(b"event")
    process.stdout._transport.close()  # type: ignore[attr-defined]  # a StreamReader has no way to stop reading
    assert await process.stderr.read() == b""
    await process.wait()


def test_a_moment_is_written_as_a_time_or_as_an_age() -> None:
    clock = datetime(2030, 1, 2, tzinfo=UTC)
    assert moment_of("36h", clock) == datetime(2029, 12, 31, 12, tzinfo=UTC)
    assert moment_of("2030-01-01T12:00+02:00", clock) == datetime(2030, 1, 1, 10, tzinfo=UTC)
    assert moment_of("2030-01-01", clock) == datetime(2030, 1, 1).astimezone()
    assert age_of("4w") == timedelta(weeks=4)
    for wrong in ("", "7", "d", "1.5d", "7 d", "999999999w"):
        with pytest.raises(ConfigurationError):
            age_of(wrong)


async def test_what_dies_again_is_not_redriven_in_place_of_the_others(sql: Sql, command: Command) -> None:
    """A worker may be as fast as the batches, and the cause not mended."""
    await fill(sql, 2 * BATCH + 1)
    await sql.execute(
        "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN new.status = 'dead';"
        " new.finished_at = clock_timestamp(); RETURN new; END$$;"
        "CREATE TRIGGER die BEFORE UPDATE ON pgebus.deliveries FOR EACH ROW EXECUTE FUNCTION die()"
    )
    assert (await command("redrive", "--yes"))[1] == "2,001 dead letters redriven.\n"
    assert await sql.fetchval("SELECT count(*) FROM pgebus.deliveries WHERE round = 2") == 2 * BATCH + 1
