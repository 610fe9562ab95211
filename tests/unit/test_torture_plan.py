"""What the torture plans, counts and writes down."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from torture.history import DeliveryRow, EventRow, History, Outcome, Run, Unit
from torture.ledger import Ledger, read, read_file
from torture.nemesis import Held
from torture.plan import KINDS, MARKS, SCALE, missing, schedule
from torture.publishing import WAYS
from torture.reading import marks_of, quantile, read_journal, recovery_seconds
from torture.report import Report
from torture.tables import RULES, type_of
from torture.tally import Tally


def test_a_seed_makes_the_same_schedule_again_and_another_one_another() -> None:
    assert schedule(7, 5_000) == schedule(7, 5_000)
    assert schedule(7, 5_000) != schedule(8, 5_000)


def test_a_schedule_has_its_faults_in_order_all_over_the_run_and_as_many_as_planned() -> None:
    faults = schedule(1, SCALE)
    assert faults == sorted(faults)
    assert Counter(fault.kind for fault in faults) == {name: kind.times for name, kind in KINDS.items()}
    kills = [fault.at for fault in faults if fault.kind == "kill"]
    assert kills[0] < 0.06
    assert kills[-1] > 0.94
    assert max(later - earlier for earlier, later in pairwise(kills)) < 2.1 / len(kills)


def test_a_small_run_has_one_fault_of_each_kind() -> None:
    assert {fault.kind for fault in schedule(1, 10)} == KINDS.keys()


def test_a_run_whose_faults_did_not_hit_is_not_good() -> None:
    assert missing({}, SCALE)
    assert missing({}, 10), "not even a small one"
    enough = {name: mark.times for name, mark in MARKS.items()}
    assert missing(enough, SCALE) == []
    for name in MARKS:
        assert len(missing({**enough, name: MARKS[name].times - 1}, SCALE)) == 1
    assert missing({**enough, "disk_errors": 0}, SCALE, frozenset({"disk_errors"})) == []


def test_a_report_is_bad_when_something_is_wrong_or_nothing_was_hit() -> None:
    enough = {name: mark.times for name, mark in MARKS.items()}
    report = Report("make torture", 1, {}, SCALE, marks=enough)
    assert report.ok
    assert list(report.lines())[-1] == "PASSED"
    report.marks = {**enough, "kills_inside": 0}
    assert not report.ok
    assert not report.as_json()["ok"]


def test_the_ways_to_publish_are_a_thousand_parts_and_every_type_is_published_and_owed_something() -> None:
    assert sum(way.share for way in WAYS.values()) == 1000
    seen = {type_of(number) for number in range(2_000)}
    assert seen | {"stock.moved", "order.billed"} == RULES.promises.keys()


def test_a_ledger_knows_what_was_begun_and_what_became_of_it(tmp_path: Path) -> None:
    assert read_file(tmp_path / "none") == []
    with Ledger(tmp_path / "ledger") as ledger:
        ledger.begins(1, 3, "bulk", business=True)
        ledger.ended(1, Outcome.OK)
        ledger.begins(4, 4, "alone", business=False)
    with Ledger(tmp_path / "ledger") as ledger:  # of the process that comes after the killed one
        ledger.begins(5, 5, "call", business=True)
        ledger.ended(5, Outcome.FAILED)
    assert read_file(tmp_path / "ledger") == [
        (Unit(1, 3, Outcome.OK), "bulk"),
        (Unit(4, 4, Outcome.UNKNOWN, business=False), "alone"),
        (Unit(5, 5, Outcome.FAILED), "call"),
    ]


def test_a_line_that_was_cut_off_says_nothing() -> None:
    assert read(["begins 1 1 call 1\n", "ended 1 o"]) == [(Unit(1, 1, Outcome.UNKNOWN), "call")]
    assert [run.event_id for run in read_journal(["7 1\n", "8 2\n", "9"])] == [7, 8]


def test_a_tally_survives_its_writer_and_says_what_a_kill_has_hit(tmp_path: Path) -> None:
    parent, child = Tally(tmp_path / "tally", 2), Tally(tmp_path / "tally", 2)
    child.add(1, "entered")
    child.add(1, "entered")
    child.add(1, "left")
    assert (parent.inside(0), parent.inside(1), parent.all_inside()) == (0, 1, 1)
    parent.settle(1)
    assert parent.all_inside() == 0
    assert parent.total("entered") == 2


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.5, 3.0), (0.99, 4.0), (1.0, 4.0)])
def test_a_quantile_is_one_of_the_values(share: float, expected: float) -> None:
    assert quantile([1.0, 2.0, 3.0, 4.0], share) == expected
    assert quantile([], share) is None


def test_recovery_counts_from_the_kill_to_the_first_run_of_a_later_claim() -> None:

    history = History(
        events=[EventRow(1, 1, "note.sent"), EventRow(2, 2, "note.sent")],
        deliveries=[DeliveryRow(1, "mail", "completed", attempt=2, lost=1), DeliveryRow(2, "mail", "dead")],
        starts=[
            Run(1, 1, "mail", "send", 1, at=10.0),
            Run(2, 1, "mail", "send", 2, at=13.0),
            Run(3, 1, "mail", "send", 3, at=15.0),
            Run(4, 2, "mail", "send", 4, at=14.5),
        ],
        units=[Unit(1, 1, Outcome.UNKNOWN), Unit(3, 3, Outcome.UNKNOWN)],
    )
    held = [Held(10.5, 1, "mail", 1), Held(10.5, 2, "mail", 3), Held(10.5, 2, "audit", 1)]
    assert recovery_seconds(history, held) == ([2.5], [2.5, 4.0])
    marks = marks_of(history)
    assert (marks["recoveries"], marks["retried"], marks["rejected"]) == (1, 1, 1)
    assert (marks["unknown_committed"], marks["unknown_rolled_back"]) == (1, 1)
