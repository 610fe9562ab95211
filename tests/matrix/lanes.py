"""A lane: one run of the suite, on one PostgreSQL and one set of libraries."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from tests.matrix import libraries, servers

# They do not touch PostgreSQL, so one major is enough for them.
_WITHOUT_POSTGRES: Final = ("tests/unit", "tests/typing")


@dataclass(frozen=True)
class Lane:
    """One PostgreSQL, named by its major, and one set of libraries."""

    postgres: str = servers.WHEEL
    libraries: str = libraries.NEWEST

    def __str__(self) -> str:
        return f"PostgreSQL {self.postgres}, {self.libraries} libraries"


@dataclass(frozen=True)
class Outcome:
    """What became of a lane; *trouble* says why there may be tests that have not run at all."""

    lane: Lane
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    trouble: str | None = None

    @property
    def ok(self) -> bool:
        return self.trouble is None and self.failed == 0


def select(postgres: Sequence[str] | None, names: Sequence[str] | None) -> list[Lane]:
    """Return the lanes that were asked for: all of them when nothing was, all of an axis when it is empty.

    One axis varies at a time: every PostgreSQL with the newest libraries, all libraries on the PostgreSQL of the wheel.
    The lane where they meet is run once.
    """
    if postgres is None and names is None:
        postgres, names = [], []
    majors = [] if postgres is None else (postgres or servers.MAJORS)
    sets = [] if names is None else (names or libraries.NAMES)
    lanes = [*(Lane(postgres=major) for major in majors), *(Lane(libraries=name) for name in sets)]
    return list(dict.fromkeys(lanes))


def run(lane: Lane, arguments: Sequence[str]) -> Outcome:
    """Run pytest with *arguments*, whose output goes where ours goes."""
    try:
        programs, python = servers.programs(lane.postgres), libraries.python(lane.libraries)
    except servers.UnavailableError as error:
        return Outcome(lane, trouble=f"NOT RUN: {error}")
    left_out = [] if lane.postgres == servers.WHEEL else [f"--ignore={path}" for path in _WITHOUT_POSTGRES]
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        done = subprocess.run(  # noqa: S603 - an interpreter of ours
            [python, "-m", "pytest", f"--junitxml={report}", *left_out, *arguments],
            cwd=libraries.ROOT,
            env=_environment(programs),
            check=False,
        )
        return read(lane, report, done.returncode)


def read(lane: Lane, report: Path, status: int) -> Outcome:
    """Return what pytest wrote into its *report* before it ended with *status*."""
    trouble = None if status in {0, 1} else f"pytest ended with {status}"
    if not report.is_file():
        return Outcome(lane, trouble=trouble or "pytest has left no report")
    suites = list(ElementTree.parse(report).iter("testsuite"))  # noqa: S314 - pytest has just written it

    def total(*attributes: str) -> float:
        return sum(float(suite.attrib[attribute]) for suite in suites for attribute in attributes)

    failed, skipped = int(total("failures", "errors")), int(total("skipped"))
    if status == 1 and not failed:
        trouble = "pytest ended with 1"
    return Outcome(lane, int(total("tests")) - failed - skipped, failed, skipped, total("time"), trouble)


def table(outcomes: Sequence[Outcome]) -> str:
    """Return one line for each lane, below the names of the columns."""
    width = max((len(str(outcome.lane)) for outcome in outcomes), default=0)
    lines = [f"{'lane':{width}}  passed  failed  skipped  seconds"]
    for outcome in outcomes:
        counts = f"{outcome.passed:6}  {outcome.failed:6}  {outcome.skipped:7}  {outcome.seconds:7.0f}"
        lines.append(f"{outcome.lane!s:{width}}  {counts}  {outcome.trouble or ''}".rstrip())
    return "\n".join(lines)


def _environment(programs: Path | None) -> dict[str, str]:
    """Return the environment of a lane: a server that somebody has named for all tests must not take its place."""
    ours = {"PGEBUS_TEST_URL", "PGEBUS_TEST_POSTGRES"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return kept | ({"PGEBUS_TEST_POSTGRES": str(programs)} if programs else {})
