"""Who is measured, and with which Python: peers live in virtual environments of their own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
ENVIRONMENTS: Final = HERE.parent / ".venv-peers"
PYTHONS: Final = ("python3.14", "python3.13", "python3.12")


@dataclass(frozen=True)
class Contender:
    """One program of `contenders/`.

    Attributes:
        name: Its name in the tables.
        packages: What to install for it; nothing for those that run in our own environment.
        newer: Whether it needs a Python newer than ours may be.
    """

    name: str
    packages: tuple[str, ...] = ()
    newer: bool = False

    @property
    def script(self) -> Path:
        """The program."""
        return HERE / "contenders" / f"{self.name.replace('-', '_')}_.py"

    @property
    def python(self) -> Path:
        """The interpreter that runs it."""
        return ENVIRONMENTS / self.name / "bin" / "python" if self.packages else Path(sys.executable)

    def is_here(self) -> bool:
        """Return whether it can be run."""
        return self.python.exists()

    def install(self) -> None:
        """Make its environment; says so where that is not possible."""
        if self.is_here():
            return
        base = next(filter(None, map(shutil.which, PYTHONS)), None) if self.newer else sys.executable
        if base is None:
            print(f"{self.name} needs Python 3.12 or newer, and none of {', '.join(PYTHONS)} is on the PATH.")
            return
        print(f"Installing {self.name} into {ENVIRONMENTS / self.name}")
        subprocess.run([base, "-m", "venv", str(ENVIRONMENTS / self.name)], check=True)  # noqa: S603 - our own arguments
        pip = [str(self.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uvloop"]
        if subprocess.run([*pip, *self.packages], check=False).returncode:  # noqa: S603 - as above
            shutil.rmtree(ENVIRONMENTS / self.name)
            print(f"{self.name} could not be installed, and is left out.")


PGEBUS: Final = Contender("pgebus")
RAW: Final = Contender("raw")
SQLALCHEMY: Final = Contender("sqlalchemy")
PEERS: Final = (
    Contender("procrastinate", ("procrastinate", "psycopg[binary]")),
    Contender("pgqueuer", ("pgqueuer[asyncpg]",)),
    Contender("oban", ("oban",), newer=True),
    Contender("chancy", ("chancy", "psycopg[binary]")),
    Contender("faststream-outbox", ("faststream-outbox", "asyncpg")),
)
