"""The `pgebus` command: what runs before anything else is imported.

It needs nothing but the standard library: without the extra `cli` it has to say so, in one line.
"""

from __future__ import annotations

import sys

__all__ = ["main"]

_EXTRA = ("rich", "typer")


def main() -> None:
    """Run the command line, or say what has to be installed first."""
    try:
        from pgebus.cli.app import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        sys.exit("pgebus: the command line needs the extra 'cli': pip install 'pgebus[cli]'")
    run()
