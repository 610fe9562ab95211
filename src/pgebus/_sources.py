"""What the settings find in variables and in files.

Does not decide which source wins, and checks no values.
"""

from __future__ import annotations

import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pgebus.errors import ConfigurationError

PREFIX: Final = "PGEBUS_"
CONFIG_FILE: Final = "PGEBUS_CONFIG_FILE"
_MAX_FILE_BYTES: Final = 1024 * 1024


def our_variables(variables: Mapping[str, str | None], sections: tuple[str, ...]) -> dict[str, str | None]:
    """Return the variables that set something of ours; refuse those that only look as if they did."""
    ours: dict[str, str | None] = {}
    for name, value in variables.items():
        if not name.startswith(PREFIX.lower()):
            continue
        rest = name.removeprefix(PREFIX.lower())
        section, separator, _ = rest.partition("__")
        if section in sections:
            ours[name] = value
        elif separator or rest.startswith(("_", *(f"{known}_" for known in sections))):
            names = " or ".join(f"{PREFIX}{known.upper()}__NAME" for known in sections)
            raise ConfigurationError(
                f"The variable {name.upper()!r} sets nothing. Write {names}, with two underscores."
            )
    return ours


def read_toml(path: Path) -> dict[str, Any]:
    """Return what the file holds.

    Raises:
        ConfigurationError: If it cannot be read, or is no TOML; the message names the file.
    """
    try:
        # A pipe would block for ever, and a huge file is no configuration.
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            problem = "it is no regular file"
        elif status.st_size > _MAX_FILE_BYTES:
            problem = f"it has {status.st_size} bytes; at most {_MAX_FILE_BYTES} are allowed"
        else:
            return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        problem = error.strerror or "it cannot be opened"
    except UnicodeDecodeError:
        problem = "it is not UTF-8"
    except RecursionError:
        problem = "its values are nested too deeply"
    except ValueError as error:  # tomllib's own, or a NUL in the name
        problem = str(error)
    raise ConfigurationError(f"{CONFIG_FILE} names {str(path)!r}, which cannot be used: {problem}.")
