"""The small parts of `pgebus worker`: orders, the files that are watched, lengths of time."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from pgebus.cli.durations import duration
from pgebus.cli.worker.orders import Order
from pgebus.cli.worker.reloading import snapshot


def test_an_order_is_read_as_it_was_written() -> None:
    order = Order("app.bus:system", ("mail", "default"), "uvloop", "debug", 7)
    assert Order.read(order.text()) == order


def write(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("1", encoding="utf-8")


def test_python_files_are_watched_but_not_those_of_others(tmp_path: Path) -> None:
    write(tmp_path, "app.py", "shop/mail.py", "shop/notes.txt", "x/__pycache__/app.py", ".git/hook.py")
    write(tmp_path, "env/pyvenv.cfg", "env/lib/a.py", "lib/site-packages/b.py", "node_modules/c.py")
    assert {str(Path(path).relative_to(tmp_path)) for path in snapshot([tmp_path])} == {"app.py", "shop/mail.py"}


@pytest.mark.parametrize("change", ["written", "made", "removed"])
def test_every_change_is_seen(tmp_path: Path, change: str) -> None:
    write(tmp_path, "app.py")
    before = snapshot([tmp_path])
    assert snapshot([tmp_path]) == before
    if change == "written":
        (tmp_path / "app.py").write_text("12", encoding="utf-8")
    elif change == "made":
        write(tmp_path, "another.py")
    else:
        (tmp_path / "app.py").unlink()
    assert snapshot([tmp_path]) != before


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-1, "0 ms"),
        (0.0352, "35 ms"),
        (0.9996, "1.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min"),
        (125, "2 min 5 s"),
        (3600, "1 h"),
        (9000, "2 h 30 min"),
        (250_000, "2 d 21 h"),
    ],
)
def test_a_length_of_time_is_said_in_two_units(seconds: float, said: str) -> None:
    assert duration(timedelta(seconds=seconds)) == said
