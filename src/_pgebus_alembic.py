"""What Alembic loads while it is itself being imported, in every command of every application that has pgebus.

It compares nothing: it hands over to `pgebus.migrations.plugin`, and not before something is compared. So nothing
that is wrong with pgebus, or with what pgebus imports, can keep an `alembic` command from running.
"""

from __future__ import annotations

import atexit
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from alembic.util import DispatchPriority, PriorityDispatchResult

if TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext
    from alembic.operations.ops import UpgradeOps
    from alembic.runtime.plugins import Plugin

__all__ = ["setup"]

_VERSIONS = Path(__file__).with_name("pgebus") / "migrations" / "versions"
_OF_OTHERS = re.compile(r"^revision\b[^=\n]*=\s*['\"](?!pgebus_\d{4}['\"])", re.MULTILINE)


class _Iterable(ModuleType):
    """A module that holds itself: before 1.20.1, Alembic iterates over what an entry point names."""

    def __iter__(self) -> Iterator[ModuleType]:
        yield self


sys.modules[__name__].__class__ = _Iterable


def setup(plugin: Plugin) -> None:
    """Register what autogenerate calls on PostgreSQL, before and after it compares the tables."""
    plugin.add_autogenerate_comparator(_before, "schema", qualifier="postgresql", priority=DispatchPriority.FIRST)
    plugin.add_autogenerate_comparator(_after, "schema", qualifier="postgresql", priority=DispatchPriority.LAST)
    # `alembic revision` without --autogenerate calls nothing of ours, and what it writes is there when it has ended.
    atexit.register(_warn_of_strays)


def strays(versions: Path = _VERSIONS) -> list[Path]:
    """Return the revisions among ours that are not ours: the ids of ours are `pgebus_` and four digits."""
    return [file for file in sorted(versions.glob("*.py")) if _OF_OTHERS.search(file.read_text(encoding="utf-8"))]


def _before(context: AutogenContext, _operations: UpgradeOps, schemas: set[str | None]) -> PriorityDispatchResult:
    from pgebus.migrations import plugin

    plugin.choose_schemas(context, schemas)
    return PriorityDispatchResult.CONTINUE


def _after(context: AutogenContext, operations: UpgradeOps, _schemas: set[str | None]) -> PriorityDispatchResult:
    from pgebus.migrations import plugin

    plugin.leave_ours_alone(context, operations)
    plugin.place_revision(context, operations)
    return PriorityDispatchResult.CONTINUE


def _warn_of_strays() -> None:
    try:
        found = strays()
    except (OSError, UnicodeError):  # imported from an archive, or by a user who may not read it
        return
    for file in found:
        sys.stderr.write(
            f"\nWARNING: {file} is a revision of your application among the files of pgebus: the next installation"
            " of pgebus would lose it. Delete it, and make it again in a folder of your own:\n\n"
            f"    rm '{file}'\n"
            "    alembic revision --head base --version-path migrations/versions -m '…'\n\n"
        )
