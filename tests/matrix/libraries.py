"""Virtual environments with the oldest and the newest libraries: the extra `dev`, with constraints on top."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from typing import Final

from tests.matrix.servers import UnavailableError

ROOT: Final = Path(__file__).parents[2]

# What the environment of this very process has: `make` installs the newest of everything.
NEWEST: Final = "newest"
OLDEST: Final = "oldest"
# Both are supported side by side, and the newest of everything is 2.1. Alembic 1.20.0 is the last one that takes its
# plugins as iterables, see _pgebus_alembic.
_BETWEEN: Final = {"sqlalchemy-2.0": ["sqlalchemy<2.1", "alembic==1.20.0"]}

NAMES: Final = (OLDEST, *_BETWEEN, NEWEST)

_LOWER_BOUND: Final = re.compile(r"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)")


def python(name: str) -> Path:
    """Return the interpreter of the environment *name*; make the environment when it is not there or out of date.

    Raises:
        UnavailableError: pip could not install it.
    """
    if name == NEWEST:
        return Path(sys.executable)
    environment = ROOT / f".venv-{name}"
    interpreter = environment / "bin" / "python"
    # Whatever decides what is in it; when that changes it is made afresh, so that no leftover is tested.
    recipe = "\n".join([sys.version, _pyproject(), *_constraints(name)])
    installed = environment / ".installed"
    if not installed.is_file() or installed.read_text() != recipe:
        _make(environment, interpreter, _constraints(name))
        installed.write_text(recipe)
    return interpreter


def lowest(dependencies: list[str]) -> list[str]:
    """Return *dependencies* pinned to the lowest release that each allows.

    >>> lowest(["sqlalchemy[asyncio]>=2.0.53", "alembic>=1.18"])
    ['sqlalchemy==2.0.53', 'alembic==1.18']
    """
    bounds = [_LOWER_BOUND.match(dependency) for dependency in dependencies]
    return [f"{bound[1]}=={bound[2]}" for bound in bounds if bound]


def _constraints(name: str) -> list[str]:
    if name == OLDEST:
        dependencies: list[str] = tomllib.loads(_pyproject())["project"]["dependencies"]
        return lowest(dependencies)
    return _BETWEEN[name]


def _pyproject() -> str:
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def _make(environment: Path, interpreter: Path, constraints: list[str]) -> None:
    shutil.rmtree(environment, ignore_errors=True)
    venv.create(environment, with_pip=True)
    wanted = environment / "constraints.txt"
    wanted.write_text("\n".join(constraints) + "\n")
    pip = (interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    done = subprocess.run(  # noqa: S603 - pip
        (*pip, "--editable", f"{ROOT}[dev]", "--constraint", wanted),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UnavailableError(f"pip could not install {', '.join(constraints)}: {done.stderr.strip()}")
