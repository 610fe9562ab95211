"""What a command line names by `package.module:name`: imported from the current directory, or from the path."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any, Final

import pgebus
from pgebus import ConfigurationError
from pgebus.cli.messages import told

__all__ = ["imported", "told_with_place"]

_OURS: Final = Path(pgebus.__file__).parent


def imported(where: str, what: str) -> object:
    """Return what *where* names. The current directory is put on the path, as `python -m` does.

    Args:
        where: `package.module:name`; the name may have dots.
        what: What is wanted, for the message.

    Raises:
        ConfigurationError: If there is none, or the module cannot be imported.
    """
    module, separator, name = where.partition(":")
    if not (module and separator and name) or module.startswith("."):
        raise ConfigurationError(f"{where!r} names no {what}. Write package.module:name, like shop.worker:system.")
    here = os.getcwd()  # noqa: PTH109 - the path holds texts
    if sys.path[:1] != [here]:
        sys.path.insert(0, here)
    # SystemExit too: a script that has no `if __name__ == "__main__"` ends here.
    try:
        value: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module}.".startswith(f"{missing}."):
            raise ConfigurationError(f"There is no module {module!r}, neither in {here} nor on the path.") from error
        raise ConfigurationError(f"Module {module!r} cannot be imported: {told_with_place(error)}.") from error
    try:
        for part in name.split("."):
            value = getattr(value, part)
    except AttributeError as error:
        raise ConfigurationError(f"There is no {what} {where!r}: {told(error)}.") from error
    except (Exception, SystemExit) as error:
        raise ConfigurationError(f"{where!r} cannot be read: {told(error)}.") from error
    return value


def told_with_place(error: BaseException) -> str:
    """Return the type and the text of *error* in one line, and the line of the program that has raised it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_file()]
    theirs = [frame for frame in frames if not Path(frame.filename).is_relative_to(_OURS)]
    if isinstance(error, SyntaxError) or not theirs:  # says itself where it is
        return told(error)
    return f"{told(error)} ({theirs[-1].filename}, line {theirs[-1].lineno})"
