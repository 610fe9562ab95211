"""Run lanes one after the other, and end with a table of them; the status is 0 when all of them passed."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence

from tests.matrix import libraries, servers
from tests.matrix.lanes import Outcome, run, select, table

EXAMPLES = """\
examples:
  python -m tests.matrix                                      all lanes
  python -m tests.matrix --postgres 13 15                     two of them
  python -m tests.matrix --libraries oldest -- -x tests/unit  what follows -- goes to pytest
"""


def main(arguments: Sequence[str]) -> int:
    """Do what the command line says."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options = _parser().parse_args(arguments[:at])
    outcomes: list[Outcome] = []
    try:
        for lane in select(options.postgres, options.libraries):
            print(f"\n##### {lane}", flush=True)
            outcomes.append(run(lane, arguments[at + 1 :]))
    finally:  # whoever interrupts the last lane wants to know about the others
        print(f"\n{table(outcomes)}")
    return 0 if all(outcome.ok for outcome in outcomes) else 1


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m tests.matrix",
        description="Run the tests on every PostgreSQL and on the oldest and the newest libraries.",
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--postgres", nargs="*", choices=servers.MAJORS, help="only these majors")
    parser.add_argument("--libraries", nargs="*", choices=libraries.NAMES, help="only these sets of libraries")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
