"""What Alembic loads in every command of a host: it can do no harm."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import _pgebus_alembic
from _pgebus_alembic import strays

SOURCE = Path(_pgebus_alembic.__file__)
LOADED = """
import alembic.config, sys
from alembic.runtime.plugins import _all_plugins
assert "alembic.autogenerate.pgebus" in _all_plugins
assert "pgebus" not in sys.modules
"""


def test_the_entry_point_names_the_module() -> None:
    (point,) = [each for each in entry_points(group="alembic.plugins") if each.name == "alembic.autogenerate.pgebus"]
    assert point.load() is _pgebus_alembic


def test_the_module_can_be_iterated_over() -> None:
    """Before 1.20.1, Alembic takes what an entry point names for a list; from then on, a list is deprecated."""
    assert list(_pgebus_alembic) == [_pgebus_alembic]  # type: ignore[arg-type] # modules are no iterables


def test_nothing_but_alembic_util_is_imported_at_the_top() -> None:
    """It is loaded while Alembic is being imported: anything else may not be there yet, or fail."""
    imported = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.parse(SOURCE.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert {name for name in imported if name and name.partition(".")[0] not in sys.stdlib_module_names} == {
        "alembic.util"
    }


def test_a_broken_pgebus_breaks_no_alembic_command(tmp_path: Path) -> None:
    (tmp_path / "pgebus").mkdir()
    (tmp_path / "pgebus" / "__init__.py").write_text("raise RuntimeError", encoding="utf-8")
    (tmp_path / SOURCE.name).write_text(SOURCE.read_text(encoding="utf-8"), encoding="utf-8")
    done = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-W", "error", "-c", LOADED],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_revision_of_somebody_else_is_told_from_ours(tmp_path: Path) -> None:
    for name, line in {
        "ours.py": 'revision = "pgebus_0002"',
        "theirs.py": "revision: str = 'abc123'\ndown_revision: str = 'pgebus_0001'",
        "no_revision.py": "x = 1",
        "disguised.py": "revision = 'pgebus_orders'",
    }.items():
        (tmp_path / name).write_text(f'"""Text."""\n\n{line}\n', encoding="utf-8")
    assert [each.name for each in strays(tmp_path)] == ["disguised.py", "theirs.py"]
    assert strays() == []
