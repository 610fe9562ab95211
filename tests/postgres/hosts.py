"""Applications with an Alembic environment of their own, made by `alembic init`, and a copy of pgebus to release.

Each has its own copy of the packages on its path, so that a test can write the next revisions of pgebus as a
developer of pgebus would.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

from pgebus.models import SCHEMA_VERSION
from pgebus.settings import DatabaseSettings

Template = Literal["generic", "async", "pyproject", "pyproject_async"]
ROOT: Final = Path(__file__).parents[2]
SHELL: Final = Path(__file__).with_name("alembic_shell.py")

MODELS: Final = """
from sqlalchemy import ForeignKey, MetaData
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import pgebus


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
"""

SUBCLASS: Final = """

class OrderPlaced(pgebus.Event, event_type="order.placed"):
    order_id: Mapped[int | None] = mapped_column(ForeignKey(Order.__table__.c.id), index=True)
"""


class CommandError(Exception):
    """What `alembic` said when it refused."""


class Host:
    """An application in a folder of its own; a context manager, because it keeps a process."""

    def __init__(self, folder: Path, template: Template, settings: DatabaseSettings) -> None:
        self.folder = folder / "host"
        self.packages = folder / "packages"
        self.template = template
        self.variables: dict[str, str] = {}
        self._settings = settings
        self._shell: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "src", self.packages, ignore=ignored)
        self.folder.mkdir()
        self.alembic("init", "-t", self.template, "migrations")
        self._configure()
        self.models(MODELS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restart()

    def alembic(self, *arguments: str) -> str:
        """Run `alembic` in the host's folder; return what it wrote to stdout."""
        if self._shell is None:
            self._shell = subprocess.Popen(  # noqa: S603 - our own interpreter
                [sys.executable, str(SHELL)],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        self._shell.stdin.write(json.dumps(arguments) + "\n")
        self._shell.stdin.flush()
        reply = json.loads(self._shell.stdout.readline())
        if reply["code"]:
            raise CommandError(reply["output"] + reply["messages"])
        return str(reply["output"])

    def alembic_as_a_process(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `alembic` as a person does, to its very end."""
        return subprocess.run(  # noqa: S603 - our own interpreter
            [sys.executable, "-m", "alembic", *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def restart(self) -> None:
        """Forget what was imported: models or revisions were changed."""
        if self._shell is not None:
            self._shell.communicate(timeout=30)
            self._shell = None

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("PGEBUS_")}
        path = os.pathsep.join(filter(None, [str(self.packages), kept.get("PYTHONPATH")]))
        own = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "error"}
        return kept | own | self.variables

    @property
    def versions(self) -> Path:
        """The folder of the host's own revisions."""
        return self.folder / "migrations" / "versions"

    @property
    def our_versions(self) -> Path:
        """The folder of our revisions in the host's copy of pgebus."""
        return self.packages / "pgebus" / "migrations" / "versions"

    def models(self, source: str) -> None:
        (self.folder / "models.py").write_text(source, encoding="utf-8")
        self.restart()

    def env(self, target: str, **options: object) -> None:
        """Set what `env.py` compares with, and more options of `context.configure`."""
        file = self.folder / "migrations" / "env.py"
        source = re.sub(
            r"^(import models\n)?target_metadata = .*$",
            lambda _: f"import models\ntarget_metadata = {target}",
            file.read_text(encoding="utf-8"),
            flags=re.MULTILINE,
        )
        source = re.sub(r"(target_metadata=target_metadata)(, \w+=\w+)*", r"\1", source)
        for name, value in options.items():
            source = source.replace(
                "target_metadata=target_metadata", f"target_metadata=target_metadata, {name}={value!r}"
            )
        file.write_text(source, encoding="utf-8")

    def option(self, name: str, value: str) -> None:
        """Set an option of Alembic in the file that this host keeps them in; `%` begins a reference in both."""
        value = value.replace("%", "%%")
        if self.template.startswith("pyproject"):
            file, line = self.folder / "pyproject.toml", f"{name} = {json.dumps(value, ensure_ascii=False)}"
            section = "[tool.alembic]"
        else:
            file, line, section = self.folder / "alembic.ini", f"{name} = {value}", "[alembic]"
        source = file.read_text(encoding="utf-8")
        assert source.count(f"{section}\n") == 1
        file.write_text(source.replace(f"{section}\n", f"{section}\n{line}\n"), encoding="utf-8")
        self.restart()

    def revise(self, message: str, *arguments: str) -> Path:
        """Make a revision; return its file, wherever it is."""
        before = set(self._files())
        self.alembic("revision", "-m", message, *arguments)
        (made,) = set(self._files()) - before
        return made

    def merge(self, message: str) -> Path:
        """Merge all heads; return the revision's file, wherever it is."""
        before = set(self._files())
        self.alembic("merge", "heads", "-m", message)
        (made,) = set(self._files()) - before
        return made

    def release(self, number: int) -> None:
        """Add our revision *number* to the host's copy of pgebus, and move the label to it."""
        for file in self.our_versions.glob("*.py"):
            source = file.read_text(encoding="utf-8")
            file.write_text(re.sub(r'= \("pgebus",\)$', "= None", source, flags=re.MULTILINE), encoding="utf-8")
        (self.our_versions / f"{number:04}_next.py").write_text(
            NEXT.format(new=number, old=number - 1), encoding="utf-8"
        )
        self.restart()

    def heads(self) -> list[str]:
        return sorted(line.split()[0] for line in self.alembic("heads").splitlines())

    def current(self) -> list[str]:
        return sorted(line.split()[0] for line in self.alembic("current").splitlines())

    def _files(self) -> list[Path]:
        return [*self.versions.glob("*.py"), *self.our_versions.glob("*.py")]

    def _configure(self) -> None:
        driver = "postgresql+asyncpg" if "async" in self.template else "postgresql+psycopg"
        url = self._settings.sqlalchemy_url().set(drivername=driver).render_as_string(hide_password=False)
        ini = self.folder / "alembic.ini"
        source = re.sub(r"^sqlalchemy\.url = .*$", f"sqlalchemy.url = {url.replace('%', '%%')}",
                        ini.read_text(encoding="utf-8"), flags=re.MULTILINE)  # fmt: skip
        if self.template.startswith("pyproject"):
            toml = self.folder / "pyproject.toml"
            places = 'version_locations = ["%(here)s/migrations/versions", "pgebus:migrations/versions"]\n'
            toml.write_text(
                toml.read_text(encoding="utf-8").replace("prepend_sys_path", places + "prepend_sys_path", 1)
            )
        else:
            places = "version_locations = %(here)s/migrations/versions\n    pgebus:migrations/versions"
            source = source.replace("path_separator = os", f"path_separator = newline\n{places}")
        ini.write_text(source, encoding="utf-8")
        self.env("models.Base.metadata")


# Our newest revision; its number is the version of the schema.
HEAD: Final = f"pgebus_{SCHEMA_VERSION:04}"

NEXT: Final = '''"""Something new."""

from alembic import op

from pgebus.migrations.place import execute

revision = "pgebus_{new:04}"
down_revision = "pgebus_{old:04}"
branch_labels = ("pgebus",)
depends_on = None

VERSION = (
    "CREATE OR REPLACE FUNCTION {{schema}}.schema_version() RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT number'"
)


def upgrade() -> None:
    execute(op.get_context(), "CREATE TABLE {{schema}}.news_{new} (id int)")
    execute(op.get_context(), VERSION.replace("number", "{new}"))


def downgrade() -> None:
    execute(op.get_context(), "DROP TABLE {{schema}}.news_{new}")
    execute(op.get_context(), VERSION.replace("number", "{old}"))
'''
