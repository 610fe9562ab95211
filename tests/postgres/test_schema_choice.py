"""Which schema the migrations take in an application's environment: the first place that names one."""

from __future__ import annotations

import re
from argparse import Namespace
from io import StringIO
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from tests.schema_names import ODD

from pgebus.errors import ConfigurationError, InvalidSchemaError

HOST = """
from alembic import context
context.configure(url="postgresql://", literal_binds=True)
with context.begin_transaction():
    context.run_migrations()
"""
VARIABLE = "PGEBUS_DATABASE__SCHEMA"


class Choice:
    """An application's environment in files; it writes SQL down, and needs no server."""

    def __init__(self, folder: Path) -> None:
        (folder / "env.py").write_text(HOST)
        (folder / "versions").mkdir()
        self._ini, self._toml = folder / "alembic.ini", folder / "pyproject.toml"
        self._locations = (
            f"path_separator = newline\nversion_locations = {folder}/versions\n  pgebus:migrations/versions"
        )
        self.written = StringIO()

    def schema(
        self, *, attribute: object = None, x: tuple[str, ...] = (), ini: str | None = None, toml: str | None = None
    ) -> str:
        """Return the schema that `upgrade --sql` makes."""
        self._ini.write_text(
            f"[alembic]\nscript_location = %(here)s\n{self._locations}\n"
            + ("" if ini is None else f"pgebus_schema = {ini}\n"),
            encoding="utf-8",
        )
        self._toml.write_text(
            "[tool.alembic]\n" + ("" if toml is None else f"pgebus_schema = {toml}\n"), encoding="utf-8"
        )
        self.written = StringIO()
        config = Config(self._ini, toml_file=self._toml, output_buffer=self.written, cmd_opts=Namespace(x=list(x)))
        if attribute is not None:
            config.attributes["pgebus_schema"] = attribute
        command.upgrade(config, "pgebus@head", sql=True)
        (made,) = re.findall(r'^CREATE SCHEMA IF NOT EXISTS "((?:[^"]|"")+)";$', self.written.getvalue(), re.MULTILINE)
        return str(made).replace('""', '"')


@pytest.fixture
def choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Choice:
    monkeypatch.delenv(VARIABLE, raising=False)
    return Choice(tmp_path)


@pytest.mark.parametrize("first", range(6))
def test_the_first_place_wins(first: int, choice: Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program, the command line, `alembic.ini`, `pyproject.toml`, the environment; else it is `pgebus`."""
    names = ["program", "line", "ini", "toml", "environment", "pgebus"]
    given = [name if place >= first else None for place, name in enumerate(names)]
    if given[4] is not None:
        monkeypatch.setenv(VARIABLE, given[4])
    line = ("other=7",) if given[1] is None else ("other=7", f"pgebus_schema={given[1]}")
    toml = None if given[3] is None else f"'{given[3]}'"
    assert choice.schema(attribute=given[0], x=line, ini=given[2], toml=toml) == names[first]


def test_an_odd_name_comes_through_every_place(choice: Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both files per cent signs are doubled."""
    odd = ODD[0]
    doubled = odd.replace("%", "%%")
    in_toml = doubled.replace("\\", "\\\\").replace('"', '\\"')
    for place in (
        {"attribute": odd},
        {"x": (f"pgebus_schema={odd}",)},
        {"ini": doubled},
        {"toml": f'"{in_toml}"'},
    ):
        assert choice.schema(**place) == odd
    monkeypatch.setenv(VARIABLE, odd)
    assert choice.schema() == odd


@pytest.mark.parametrize(
    "place",
    [
        {"attribute": ""},
        {"attribute": 7},
        {"attribute": "pg_mine"},
        {"x": ("pgebus_schema=",)},
        {"x": ("pgebus_schema",)},
        {"x": (f"pgebus_schema={'ä' * 32}",)},
        {"ini": ""},
        {"ini": "tablesample"},
        {"toml": "''"},
        {"toml": "7"},
        {"toml": '"tab\\tbed"'},
    ],
)
def test_a_name_that_cannot_be_is_refused_before_any_sql(place: dict[str, object], choice: Choice) -> None:
    """An empty one too: whoever writes down that there is one does not mean `pgebus`."""
    with pytest.raises(InvalidSchemaError):
        choice.schema(**place)  # type: ignore[arg-type] # the type of each differs
    assert "events" not in choice.written.getvalue()


@pytest.mark.parametrize("place", ["ini", "toml"])
@pytest.mark.parametrize("name", ["100%", "%s", "%d", "a % b", "%(nothing)s"])
def test_a_per_cent_sign_that_is_not_doubled_is_named_as_such(place: str, name: str, choice: Choice) -> None:
    with pytest.raises(ConfigurationError, match="per cent sign"):
        choice.schema(**{place: name if place == "ini" else f"'{name}'"})  # type: ignore[arg-type] # a file's text
    assert "events" not in choice.written.getvalue()


def test_an_empty_variable_counts_as_not_set(choice: Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for the settings."""
    monkeypatch.setenv(VARIABLE, "")
    assert choice.schema() == "pgebus"
