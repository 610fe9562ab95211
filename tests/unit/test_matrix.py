"""The test matrix: which lanes are run, what is left out, and what it says at the end."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
from tests.matrix import lanes, libraries, servers
from tests.matrix.__main__ import main
from tests.matrix.lanes import Lane, Outcome, read, run, select, table

REPORT = '<testsuites><testsuite tests="9" errors="1" failures="2" skipped="1" time="3.5"/></testsuites>'


def test_without_a_choice_every_lane_is_run_once() -> None:
    found = select(None, None)
    assert len(found) == len(set(found)) == len(servers.MAJORS) + len(libraries.NAMES) - 1
    assert {lane.postgres for lane in found} == set(servers.MAJORS)
    assert {lane.libraries for lane in found} == set(libraries.NAMES)


def test_a_choice_leaves_out_the_rest() -> None:
    assert select(["13", "15"], None) == [Lane(postgres="13"), Lane(postgres="15")]
    assert select(None, ["oldest"]) == [Lane(libraries="oldest")]
    assert select(["13"], ["oldest"]) == [Lane(postgres="13"), Lane(libraries="oldest")]
    assert select([], None) == [Lane(postgres=major) for major in servers.MAJORS]


def test_the_lowest_bounds_are_those_of_the_project() -> None:
    assert doctest.testmod(libraries).failed == 0
    assert libraries.python(libraries.NEWEST).is_file()


def test_a_report_is_counted(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    assert read(Lane(), report, 1) == Outcome(Lane(), passed=5, failed=3, skipped=1, seconds=3.5)


@pytest.mark.parametrize("status", [0, 1, 2, 5])
def test_a_lane_that_left_no_report_has_not_passed(tmp_path: Path, status: int) -> None:
    assert not read(Lane(), tmp_path / "report.xml", status).ok


@pytest.mark.parametrize("status", [1, 2, 3, 5, -9])
def test_a_status_is_not_outshone_by_a_report_without_failures(tmp_path: Path, status: int) -> None:
    report = tmp_path / "report.xml"
    report.write_text('<testsuites><testsuite tests="9" errors="0" failures="0" skipped="0" time="3.5"/></testsuites>')
    outcome = read(Lane(), report, status)
    assert (outcome.passed, outcome.ok) == (9, False)


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with no npm and nothing in the cache; it does not have PostgreSQL 7 either."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(servers._VERSIONS, "7", "7.4.30")
    monkeypatch.setattr(servers, "MAJORS", ("7",))


@pytest.mark.usefixtures("nowhere")
def test_a_postgresql_that_is_not_to_be_had_is_reported() -> None:
    outcome = run(Lane(postgres="7"), [])
    assert not outcome.ok
    assert "NOT RUN" in table([outcome])
    assert "/usr/lib/postgresql/7/bin" in table([outcome])


@pytest.mark.usefixtures("nowhere")
def test_a_lane_that_was_not_run_makes_the_whole_fail(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--postgres"]) == 1
    assert "NOT RUN" in capsys.readouterr().out


def test_what_follows_two_dashes_goes_to_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run_nothing(lane: Lane, arguments: list[str]) -> Outcome:
        seen.append((lane, arguments))
        return Outcome(lane, passed=1)

    monkeypatch.setattr("tests.matrix.__main__.run", run_nothing)
    assert main(["--postgres", "13", "--", "-x", "--postgres"]) == 0
    assert seen == [(Lane(postgres="13"), ["-x", "--postgres"])]


def test_no_server_that_somebody_named_takes_the_place_of_a_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGEBUS_TEST_URL", "postgresql://elsewhere/db")
    monkeypatch.setenv("PGEBUS_TEST_POSTGRES", "/elsewhere")
    assert not {"PGEBUS_TEST_URL", "PGEBUS_TEST_POSTGRES"} & lanes._environment(None).keys()
    assert lanes._environment(Path("/16/bin"))["PGEBUS_TEST_POSTGRES"] == "/16/bin"
