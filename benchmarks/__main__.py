"""`python -m benchmarks`: measures pgebus and whoever else is installed, in one run, and prints tables.

`--install` makes the peers' environments. Each measure also runs alone: `python -m benchmarks drain latency`.
"""

from __future__ import annotations

import argparse
import platform
import time
from importlib.metadata import version
from pathlib import Path

from benchmarks.measures import MEASURES, Plan, Table
from benchmarks.peers import PEERS, PGEBUS
from benchmarks.running import arena


def markdown(table: Table) -> str:
    """Return *table* as Markdown."""
    lines = [f"| | {' | '.join(table.columns)} |", f"|---|{'---:|' * len(table.columns)}"]
    for name, figures in table.rows:
        shown = ("-" if each is None else f"{each:,.0f}" if abs(each) >= 100 else f"{each:.3g}" for each in figures)
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join([table.title, "", *lines, *(["", table.note] if table.note else [])])


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("measures", nargs="*", help=f"of {', '.join(MEASURES)}; all by default")
    parser.add_argument("--runs", type=int, default=3, help="how often; the tables show medians")
    parser.add_argument("--scale", type=float, default=1.0, help="what the numbers of events are multiplied by")
    parser.add_argument("--against", help="peers, by comma; all that are installed by default, '' for none")
    parser.add_argument("--install", action="store_true", help="make the environments of the peers first")
    parser.add_argument("--chart", type=Path, help="write a chart to this PNG file; needs matplotlib")
    options = parser.parse_args()
    if unknown := set(options.measures) - set(MEASURES):
        parser.error(f"there is no measure {', '.join(sorted(unknown))}")
    names = None if options.against is None else options.against.split(",")
    peers = tuple(each for each in PEERS if names is None or each.name in names)
    if options.install:
        for each in peers:
            each.install()
    plan = Plan((PGEBUS, *(each for each in peers if each.is_here())), options.runs, options.scale)
    tables: dict[str, Table] = {}
    with arena() as where:
        found = where.server_version()
        print(f"PostgreSQL {found}, Python {platform.python_version()}, SQLAlchemy {version('sqlalchemy')}, ", end="")
        print(f"asyncpg {version('asyncpg')}; medians of {plan.runs}\n", flush=True)
        for name in options.measures or MEASURES:
            began = time.perf_counter()
            tables[name] = MEASURES[name](where, plan)
            print(markdown(tables[name]))
            print(f"\n({time.perf_counter() - began:.0f} s)\n", flush=True)
    if options.chart:
        from benchmarks.chart import draw

        draw(tables, options.chart)


if __name__ == "__main__":
    main()
