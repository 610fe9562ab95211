"""Draws what was measured of pgebus and its peers."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import matplotlib

from benchmarks.measures import Table

matplotlib.use("Agg")

from matplotlib import pyplot

PANELS: Final = (
    ("drain", "drain /s", "Drained per second"),
    ("publish", "10 connections /s", "Published per second,\none transaction each"),
    ("publish", "bulk /s", "Published per second,\nmany at once"),
    ("latency", "p50 ms", "Idle latency, median ms\n(less is better)"),
)


def draw(tables: dict[str, Table], to: Path) -> None:
    """Write a picture with a panel for each of the measures that were run."""
    panels = [each for each in PANELS if each[0] in tables]
    figure, axes = pyplot.subplots(1, max(1, len(panels)), figsize=(4 * max(1, len(panels)), 3.6), squeeze=False)
    for axis, (measure, column, title) in zip(axes[0], panels, strict=False):
        rows = [(name, value) for name, _ in tables[measure].rows if (value := tables[measure].figure(name, column))]
        rows.sort(key=lambda row: row[1], reverse="ms" not in column)
        names = [name for name, _ in rows][::-1]
        colours = ["#2a6f97" if name == "pgebus" else "#a9c6d9" if name != "raw" else "#dddddd" for name in names]
        axis.barh(names, [value for _, value in rows][::-1], color=colours)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(to, dpi=110)
