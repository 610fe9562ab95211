"""The migrations as a branch in an application's own history: adopt, merge, upgrade, downgrade, and again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from tests.conftest import Server
from tests.postgres.hosts import HEAD, CommandError, Host, Template

from pgebus.models import SCHEMA_VERSION
from pgebus.settings import DatabaseSettings

NEXT_RELEASES = "SELECT relname FROM pg_class WHERE relnamespace = to_regnamespace('pgebus') AND relname LIKE 'news%'"


@pytest.fixture
def template() -> Template:
    return "generic"


@pytest.fixture
def host(template: Template, tmp_path: Path, empty_database: DatabaseSettings) -> Iterator[Host]:
    with Host(tmp_path, template, empty_database) as host:
        yield host


@pytest.fixture
async def sql(server: Server, empty_database: DatabaseSettings) -> Any:
    connection = await server.connect(empty_database.sqlalchemy_url().database)
    yield connection
    await connection.close()


@pytest.mark.parametrize(
    "template",
    [
        "generic",
        pytest.param("async", marks=pytest.mark.slow),
        pytest.param("pyproject", marks=pytest.mark.slow),
        pytest.param("pyproject_async", marks=pytest.mark.slow),
    ],
)
def test_a_host_lives_with_us_from_release_to_release(host: Host) -> None:
    """`upgrade pgebus@head` always works: before and after each merge, and before and after each of our releases."""
    host.alembic("upgrade", "pgebus@head")
    assert host.current() == [HEAD]
    first = host.revise("first", "--autogenerate").stem.partition("_")[0]
    assert host.heads() == sorted([first, HEAD])
    host.alembic("upgrade", "pgebus@head")
    host.alembic("upgrade", "heads")
    assert host.current() == sorted([first, HEAD])

    merged = host.merge("ours and theirs")
    assert merged.parent == host.versions
    host.alembic("upgrade", "pgebus@head")
    host.alembic("upgrade", "head")
    assert "No new upgrade operations" in host.alembic("check")
    (head,) = host.current()

    for number in (SCHEMA_VERSION + 1, SCHEMA_VERSION + 2):
        host.release(number)
        assert host.heads() == sorted([head, f"pgebus_{number:04}"])
        host.alembic("upgrade", "pgebus@head")
        assert host.current() == sorted([head, f"pgebus_{number:04}"])
        assert host.merge(f"release {number}").parent == host.versions
        host.alembic("upgrade", "pgebus@head")
        host.alembic("upgrade", "head")
        (head,) = host.current()
        assert f"pgebus_{number:04} (pgebus)" in host.alembic("history")

    # Down: what was merged with us goes with us, what came before the merge stays.
    host.alembic("downgrade", "pgebus@base")
    assert host.current() == [first]
    host.alembic("upgrade", f"pgebus_{SCHEMA_VERSION + 2:04}")
    assert host.current() == sorted([first, f"pgebus_{SCHEMA_VERSION + 2:04}"])
    host.alembic("upgrade", "pgebus@head")  # what has been merged with us is of our branch
    assert host.current() == [head]

    # From scratch: everything at once, or ours alone.
    host.alembic("downgrade", "base")
    assert host.current() == []
    host.alembic("upgrade", "head")
    assert host.current() == [head]
    host.alembic("downgrade", "base")
    host.alembic("upgrade", f"pgebus_{SCHEMA_VERSION + 2:04}")
    assert host.current() == [f"pgebus_{SCHEMA_VERSION + 2:04}"]
    host.alembic("upgrade", "pgebus@head")
    assert host.current() == [head]


@pytest.mark.parametrize("template", ["pyproject_async"])
def test_a_host_on_asyncpg_that_is_configured_in_its_pyproject_adopts_us(host: Host) -> None:
    host.alembic("upgrade", "pgebus@head")
    assert host.revise("first", "--autogenerate").parent == host.versions
    host.alembic("upgrade", "heads")
    assert "No new upgrade operations" in host.alembic("check")
    host.alembic("downgrade", "pgebus@base")
    assert len(host.current()) == 1


@pytest.mark.slow
def test_a_label_that_stayed_behind_would_fail(host: Host) -> None:
    """Why the label travels: with it on an older revision, a host that has merged can't upgrade any more."""
    host.alembic("upgrade", "pgebus@head")
    host.revise("first", "--autogenerate")
    host.merge("ours and theirs")
    host.release(SCHEMA_VERSION + 1)
    for file in host.our_versions.glob("*.py"):
        source = file.read_text(encoding="utf-8")
        label = '("pgebus",)' if f"{SCHEMA_VERSION:04}" in file.name else "None"
        changed = re.sub(r"^(branch_labels\b[^=]*= ).*$", rf"\g<1>{label}", source, flags=re.MULTILINE)
        file.write_text(changed, encoding="utf-8")
    host.restart()
    with pytest.raises(CommandError, match="Multiple head revisions"):
        host.alembic("upgrade", "pgebus@head")


async def test_a_hosts_revision_may_depend_on_ours(host: Host, sql: asyncpg.Connection[asyncpg.Record]) -> None:
    made = host.revise(
        "first", "--head", "base", "--version-path", "migrations/versions", "--depends-on", "pgebus@head"
    )
    assert "depends_on: Union[str, Sequence[str], None] = 'pgebus" in made.read_text(encoding="utf-8")
    host.alembic("upgrade", f"{made.stem.partition('_')[0]}@head")
    assert await sql.fetchval("SELECT pgebus.schema_version()") == SCHEMA_VERSION
    host.release(SCHEMA_VERSION + 1)
    host.alembic("upgrade", "pgebus@head")
    assert len(await sql.fetch(NEXT_RELEASES)) == 1
    host.alembic("upgrade", "heads")
    host.merge("the next release")
    host.alembic("upgrade", "head")
    host.alembic("downgrade", "pgebus@base")
    assert await sql.fetchval("SELECT to_regnamespace('pgebus')") is None
    host.alembic("upgrade", "head")
    assert len(await sql.fetch(NEXT_RELEASES)) == 1


async def test_the_whole_history_can_be_written_down(host: Host, sql: asyncpg.Connection[asyncpg.Record]) -> None:
    """`--sql`, with psycopg's dialect, which doubles per cent signs; the way down as well."""
    host.revise("first", "--head", "base", "--version-path", "migrations/versions")
    host.merge("ours and theirs")
    up = host.alembic("upgrade", "head", "--sql")
    await sql.execute(up)
    await sql.execute("INSERT INTO pgebus.events (type) VALUES ('a')")
    assert await sql.fetchval("SELECT count(*) FROM pgebus.deliveries") == 1
    before = host.current()
    assert len(before) == 1
    host.alembic("upgrade", "head")
    assert host.current() == before
    await sql.execute(host.alembic("downgrade", "head:base", "--sql"))
    assert await sql.fetchval("SELECT to_regnamespace('pgebus')") is None


def test_a_plain_revision_among_our_files_is_loudly_warned_of(host: Host) -> None:
    """Nothing of ours is called while it is made, so the warning comes last, with the commands that put it right."""
    made = host.alembic_as_a_process("revision", "-m", "lost")
    (stray,) = host.our_versions.glob("*_lost.py")
    assert made.returncode == 0, made.stderr
    assert made.stderr.count("WARNING") == 1
    commands = re.findall(r"^    (\S.*)$", made.stderr, re.MULTILINE)
    assert commands[0] == f"rm '{stray}'"
    stray.unlink()
    made = host.alembic_as_a_process(*commands[1].replace("'…'", "found").split()[1:])
    assert (made.returncode, made.stderr) == (0, "")
    assert len(list(host.versions.glob("*_found.py"))) == 1
    # With a head of the host's own there is a choice to make, and Alembic asks for it.
    with pytest.raises(CommandError, match="Multiple heads"):
        host.revise("which")


@pytest.mark.slow
def test_the_separator_of_alembic_init_loses_our_revisions_without_a_word(host: Host) -> None:
    """Why the guide says newline; when Alembic says something some day, the guide may say less."""
    ini = host.folder / "alembic.ini"
    source = ini.read_text(encoding="utf-8").replace("path_separator = newline", "path_separator = os")
    ini.write_text(source.replace("/versions\n    pgebus", "/versions:pgebus"), encoding="utf-8")
    assert host.heads() == []
