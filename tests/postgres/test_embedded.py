"""The embedded server: whose programs it runs. That it starts, crashes and comes back is used all over the tests."""

from __future__ import annotations

import re
from pathlib import Path

import asyncpg
import pytest
from tests.embedded import embedded

import pgebus.embedded
from pgebus.embedded import EmbeddedPostgres
from pgebus.errors import ConfigurationError


async def version(postgres: EmbeddedPostgres) -> str:
    connection = await asyncpg.connect(postgres.url(None))
    try:
        return str(await connection.fetchval("SHOW server_version"))
    finally:
        await connection.close()


async def test_it_runs_the_programs_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the wheel is not installed."""
    with embedded({"fsync": "off"}) as postgres:
        expected = await version(postgres)
    programs = postgres._programs
    monkeypatch.setattr(pgebus.embedded, "_find_wheel", None)
    with EmbeddedPostgres({"fsync": "off"}, programs=programs) as postgres:
        assert await version(postgres) == expected


@pytest.mark.skipif(not pgebus.embedded._is_root(), reason="only root runs PostgreSQL as another user")
async def test_root_may_have_its_programs_in_a_closed_directory(tmp_path: Path) -> None:
    """PostgreSQL refuses root, and the user it is run as instead cannot read there."""
    original = embedded()._programs
    closed = tmp_path / "closed"
    copied = pgebus.embedded._copy(original, closed)
    closed.chmod(0o700)
    with EmbeddedPostgres({"fsync": "off"}, programs=copied) as postgres:
        assert await version(postgres)
    assert closed.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("present", [[], ["initdb"], ["pg_ctl"]])
def test_a_directory_without_the_programs_is_refused(tmp_path: Path, present: list[str]) -> None:
    for name in present:
        (tmp_path / name).touch()
    with pytest.raises(ConfigurationError, match=re.escape(repr(str(tmp_path)))) as caught:
        EmbeddedPostgres(programs=tmp_path)
    for name in ("initdb", "pg_ctl"):
        assert (f"no {name} " in str(caught.value)) == (name not in present)


async def test_a_relative_path_means_where_the_program_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs themselves are run in the root directory."""
    programs = embedded()._programs
    monkeypatch.chdir(programs.parent)
    with EmbeddedPostgres({"fsync": "off"}, programs=Path(programs.name)) as postgres:
        assert await version(postgres)
