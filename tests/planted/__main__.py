"""Plant bugs, one after the other, and end with a table of what has caught them; the status is 0 when all were."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from tests.planted import running
from tests.planted.bug import Bug
from tests.planted.catalogue import BUGS
from tests.planted.running import CONTROL, GREEN, RESULTS, Result

EXAMPLES = """\
examples:
  python -m tests.planted                all of them, as far as they have no result yet
  python -m tests.planted B7 B20         two of them
  python -m tests.planted --layer unit   what one layer catches
  python -m tests.planted --control      the same tests, without a bug: all of them have to be green
  python -m tests.planted --table        what is known, as Markdown
"""


def main(arguments: Sequence[str], bugs: Sequence[Bug] = BUGS) -> int:
    """Do what the command line says."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if unknown := set(options.bugs) - {bug.name for bug in bugs}:
        parser.error(f"no such bug: {', '.join(sorted(unknown))}")
    chosen = [bug for bug in bugs if not options.bugs or bug.name in options.bugs]
    kept: Path = options.results
    if options.table:
        print(table(chosen, kept))
        return 0
    if options.control:
        return _control(chosen, kept, again=options.again)
    for bug in chosen:
        for layer, tests in bug.tests.items():
            if not options.layer or layer in options.layer:
                _once(bug, layer, tests, kept, again=options.again)
    print(f"\n{table(chosen, kept)}")
    escaped = [bug.name for bug in chosen if not caught_by(bug, kept)]
    if escaped:
        print(f"\nnoticed by nothing: {', '.join(escaped)}")
    return 1 if escaped else 0


def caught_by(bug: Bug, kept: Path = RESULTS) -> dict[str, Result]:
    """Return the results, by layer, that show that *bug* is noticed, of this source."""
    known = running.results(kept)
    found = {layer: known.get((bug.name, layer)) for layer in bug.tests}
    return {
        layer: result
        for layer, result in found.items()
        if result is not None and result.caught and result.digest == running.digest(bug, bug.tests[layer])
    }


def table(bugs: Sequence[Bug], kept: Path = RESULTS) -> str:
    """Return which test of which layer was the first to fail, as Markdown."""
    lines = ["| bug | | noticed by |", "|---|---|---|"]
    for bug in bugs:
        first = [f"{layer}: {_named(result.test)}" for layer, result in caught_by(bug, kept).items()]
        lines.append(f"| {bug.name} | {bug.what} | {'<br>'.join(first) or '**nothing**'} |")
    return "\n".join(lines)


def _named(test: str | None) -> str:
    # The sample that a sweep takes is another one each day.
    return f"`{re.sub(r' with seed [0-9]+', '', test or '').rpartition('/')[2]}`"


def _control(bugs: Sequence[Bug], kept: Path, *, again: bool) -> int:
    layers: dict[str, list[str]] = {}
    for bug in bugs:
        for layer, tests in bug.tests.items():
            known = layers.setdefault(layer, [])
            known += [test for test in tests if test not in known]
    found = [_once(None, layer, tests, kept, again=again) for layer, tests in layers.items()]
    return 0 if all(result.outcome == GREEN for result in found) else 1


def _once(bug: Bug | None, layer: str, tests: Sequence[str], kept: Path, *, again: bool) -> Result:
    """Return the result that is known, or find it out and keep it."""
    name = CONTROL if bug is None else bug.name
    result = running.results(kept).get((name, layer))
    if again or result is None or result.digest != running.digest(bug, tests):
        longest = running.LONGEST_SECONDS * (1 if bug is not None else 4)
        result = running.run(bug, layer, tests, longest=longest)
        running.keep(result, kept)
    print(f"{name:7} {layer:13} {result.outcome:7} {result.seconds:6.1f} s  {result.test or ''}", flush=True)
    return result


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m tests.planted",
        description="Put bugs into a copy of the source, and see whether the tests notice.",
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("bugs", nargs="*", metavar="B7", help="only these")
    parser.add_argument("--layer", action="append", help="only this layer; may be repeated")
    parser.add_argument("--control", action="store_true", help="run the same tests without a bug")
    parser.add_argument("--again", action="store_true", help="also where there is a result of this source")
    parser.add_argument("--table", action="store_true", help="run nothing; print what is known")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the results are kept")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
