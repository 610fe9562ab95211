"""Runs tests on a copy of the repository with a bug in it, and keeps what came of it, line by line, in a file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Final

from tests.planted.bug import Bug

ROOT: Final = Path(__file__).parents[2]
RESULTS: Final = ROOT / ".planted.jsonl"
# A bug may well leave a test waiting for ever. It is asked to end, so that it stops its server, and then made to.
LONGEST_SECONDS: Final = 300.0
_LAST_SECONDS: Final = 30.0
# A process in the background of a shell ignores SIGINT, and so would its children.
_PYTEST: Final = (
    "import signal, sys, pytest; signal.signal(signal.SIGINT, signal.default_int_handler);"
    " sys.exit(pytest.main(sys.argv[1:]))"
)
# The same tests without a bug: what is red there proves nothing.
CONTROL: Final = "control"

# Where a test is made of more than its own file.
_WHOLE: Final = ("interleavings", "model", "sweeps")

RED: Final = "red"
GREEN: Final = "green"
ENDLESS: Final = "endless"
BROKEN: Final = "broken"


@dataclass(frozen=True)
class Result:
    """What one layer had to say about one bug.

    Attributes:
        bug: Its name, or `control`.
        layer: Which tests.
        outcome: "red", "green", "endless" when the time was up, or "broken" when pytest could not run them.
        test: The first one that failed, or None.
        seconds: How long it took.
        digest: Of the source, the bug and the tests; a result of another digest is out of date.
    """

    bug: str
    layer: str
    outcome: str
    test: str | None
    seconds: float
    digest: str

    @property
    def caught(self) -> bool:
        """Whether that shows that the suite notices the bug."""
        return self.outcome == RED and self.test is not None


@contextmanager
def copied(bug: Bug | None, root: Path = ROOT) -> Iterator[Path]:
    """Make a copy of the repository, with *bug* in it, which is gone at the end.

    Raises:
        SourceChangedError: If the bug does not fit the source any more.
    """
    with tempfile.TemporaryDirectory(prefix="pgebus-planted-") as directory:
        tree = Path(directory) / "pgebus"
        left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "node_modules")
        shutil.copytree(root, tree, ignore=left_out)
        if bug is not None:
            bug.plant(tree)
        yield tree


def run(bug: Bug | None, layer: str, tests: Sequence[str], *, longest: float = LONGEST_SECONDS) -> Result:
    """Run *tests* on a copy with *bug*, or on one without any, up to the first that fails."""
    began = monotonic()
    with copied(bug) as tree:
        status, output = _pytest(tree, tests, longest, first_only=bug is not None)
    if status is None:
        outcome = ENDLESS
    elif status in {0, 1}:
        outcome = RED if status else GREEN
    else:
        outcome = BROKEN
    return Result(
        CONTROL if bug is None else bug.name,
        layer,
        outcome,
        first_failure(output),
        round(monotonic() - began, 1),
        digest(bug, tests),
    )


def first_failure(output: str) -> str | None:
    """Return the test that pytest's summary names first; a module that cannot be imported is none."""
    for line in output.splitlines():
        if line.startswith(("FAILED ", "ERROR ")) and "::" in line:
            named = line.split(" ", 1)[1]
            # A parameter may hold what stands before the message as well.
            before, end, _ = named.partition("] - ")
            return f"{before}]" if end and "[" in named.split(" - ")[0] else _without_message(named)
    return None


def _without_message(named: str) -> str:
    return named if named.endswith("]") else named.split(" - ")[0]


def digest(bug: Bug | None, tests: Sequence[str], root: Path = ROOT) -> str:
    """Return what tells whether a result is still that of this source, this bug and these tests."""
    found = hashlib.sha256(repr((bug and bug.edits, list(tests))).encode())
    asked = {root / test.split("::")[0] for test in tests}
    parts = (each for path in asked if path.parent.name in _WHOLE for each in path.parent.rglob("*.py"))
    files = {*(root / "src").rglob("*.py"), *asked, *parts}
    for path in sorted(files):
        found.update(path.read_bytes() if path.is_file() else b"")
    return found.hexdigest()[:16]


def results(path: Path = RESULTS) -> dict[tuple[str, str], Result]:
    """Return what is kept, the last result of each bug and layer."""
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {(line["bug"], line["layer"]): Result(**line) for line in lines}


def keep(result: Result, path: Path = RESULTS) -> None:
    """Add a result to those that are kept."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def environment(tree: Path, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return an environment in which the copy's `pgebus` is the one that is imported."""
    return {
        **given,
        "PYTHONPATH": os.pathsep.join([str(tree / "src"), str(tree)]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PGEBUS_MODEL_SHRINK": "0",
    }


def _pytest(tree: Path, tests: Sequence[str], longest: float, *, first_only: bool) -> tuple[int | None, str]:
    """Return the status of pytest and what it has printed; None when the time was up."""
    options = ["-m", "", "-q", "--tb=no", "-p", "no:cacheprovider", *(["-x"] if first_only else [])]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(  # noqa: S603 - this interpreter
            [sys.executable, "-c", _PYTEST, *options, *tests],
            cwd=tree,
            env=environment(tree),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status: int | None = None
        try:
            status = process.wait(longest)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_LAST_SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it may have left behind
            process.wait()
        output.seek(0)
        return status, output.read()
