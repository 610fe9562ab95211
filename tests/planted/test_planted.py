"""Planted bugs fit the source, the machinery sees red and green, and the documentation says what catches what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.planted import running
from tests.planted.__main__ import caught_by, main, table
from tests.planted.bug import Bug, Edit, SourceChangedError
from tests.planted.catalogue import BUGS
from tests.planted.running import BROKEN, ENDLESS, GREEN, RED, ROOT, Result, copied, first_failure, run

BY_NAME = {bug.name: bug for bug in BUGS}


def test_there_are_twenty() -> None:
    assert [bug.name for bug in BUGS] == [f"B{number}" for number in range(1, 21)]
    assert all(bug.tests for bug in BUGS)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_fits_the_source_and_is_one_that_python_can_read(bug: Bug) -> None:
    """When this fails, the source has changed: make the same mistake in the new one."""
    texts: dict[str, str] = {}
    for edit in bug.edits:
        before = texts.get(edit.path) or (ROOT / "src" / "pgebus" / edit.path).read_text(encoding="utf-8")
        texts[edit.path] = edit.applied(before)
        assert texts[edit.path] != before
    for path, text in texts.items():
        compile(text, path, "exec")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_the_tests_that_are_asked_are_there(bug: Bug) -> None:
    for test in (test for tests in bug.tests.values() for test in tests):
        path, _, name = test.partition("::")
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not name or f"def {name.partition('[')[0]}(" in text, test


@pytest.mark.parametrize("text", ["x = 2", "x = 1\nx = 1"])
def test_text_that_has_changed_is_an_error(text: str) -> None:
    with pytest.raises(SourceChangedError, match=r"store\.py"):
        Edit("store.py", "x = 1", "x = 3").applied(text)


def test_the_checkout_is_left_alone() -> None:
    path = Path("src/pgebus/_runtime/supervision.py")
    before = (ROOT / path).read_bytes()
    with copied(BY_NAME["B7"]) as tree:
        assert (tree / path).read_bytes() != before
        assert not (tree / ".git").exists()
    assert (ROOT / path).read_bytes() == before
    assert not tree.exists()


def test_a_bug_turns_a_test_red() -> None:
    """The whole way: a copy, the bug in it, the test that fails because of it, by its name."""
    test = "tests/unit/test_outcome.py::test_nul_and_lone_surrogates_are_replaced"
    result = run(BY_NAME["B13"], "unit", [test])
    assert (result.bug, result.layer, result.outcome, result.test) == ("B13", "unit", RED, test)
    assert result.caught


@pytest.mark.slow
def test_without_a_bug_it_is_green() -> None:
    assert run(None, "unit", ["tests/unit/test_outcome.py"]).outcome == GREEN


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layer"), [("B4", "postgres"), ("B16", "interleavings"), ("B7", "system")])
def test_a_bug_is_noticed(name: str, layer: str) -> None:
    assert run(BY_NAME[name], layer, BY_NAME[name].tests[layer]).caught


@pytest.mark.slow
def test_what_cannot_be_run_and_what_does_not_end_is_no_proof() -> None:
    assert run(None, "unit", ["tests/unit/test_nowhere.py"]).outcome == BROKEN
    result = run(None, "unit", ["tests/unit/test_outcome.py"], longest=0.1)
    assert result.outcome == ENDLESS
    assert not result.caught


def test_the_first_failure_is_a_test() -> None:
    assert (
        first_failure("ERROR a.py\nFAILED a.py::test_b[x - y] - assert 0\nFAILED a.py::test_c") == "a.py::test_b[x - y]"
    )
    assert first_failure("ERROR a.py::test_b[x - y]") == "a.py::test_b[x - y]"
    assert first_failure("FAILED a.py::test_c - assert [1] - 2 == 3") == "a.py::test_c"
    assert first_failure("ERROR a.py") is None


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was run, by its name and layer; all of it red."""
    done: list[tuple[str, str]] = []

    def red(bug: Bug | None, layer: str, tests: Sequence[str], **_: Any) -> Result:
        name = "control" if bug is None else bug.name
        done.append((name, layer))
        return Result(name, layer, RED, "test.py::test", 1.0, running.digest(bug, tests))

    monkeypatch.setattr(running, "run", red)
    return done


def test_what_is_known_is_not_run_again(runs: list[tuple[str, str]], tmp_path: Path) -> None:
    kept = tmp_path / "results"
    assert main(["B7", "B13", "--layer", "unit", "--results", str(kept)]) == 0
    assert runs == [("B7", "unit"), ("B13", "unit")]
    assert main(["B7", "--results", str(kept)]) == 0
    assert runs[2:] == [("B7", "system")]
    assert main(["B7", "--again", "--results", str(kept)]) == 0
    assert runs[3:] == [("B7", "unit"), ("B7", "system")]
    assert main(["--table", "--results", str(kept)]) == 0
    assert runs[5:] == []


def test_a_result_of_another_source_is_none(runs: list[tuple[str, str]], tmp_path: Path) -> None:
    kept, bug = tmp_path / "results", BY_NAME["B7"]
    main(["B7", "--results", str(kept)])
    assert set(caught_by(bug, kept)) == {"unit", "system"}
    other = replace(bug, edits=(*bug.edits, Edit("errors.py", "a", "b")))
    assert caught_by(other, kept) == {}
    assert "**nothing**" in table([other], kept)


def test_a_bug_that_nothing_notices_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    green = Result("B7", "unit", GREEN, None, 1.0, "")
    monkeypatch.setattr(running, "run", lambda *_, **__: green)
    assert main(["B7", "--results", str(tmp_path / "results")]) == 1


def test_the_control_has_to_be_green(runs: list[tuple[str, str]], tmp_path: Path) -> None:
    assert main(["B7", "B13", "--control", "--results", str(tmp_path / "results")]) == 1
    assert runs == [("control", "unit"), ("control", "system")]


@pytest.mark.usefixtures("runs")
def test_an_unknown_bug_is_a_misuse() -> None:
    with pytest.raises(SystemExit):
        main(["B21"])


def test_the_documentation_has_a_row_for_each() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    for bug in BUGS:
        assert f"| {bug.name} | {bug.what} |" in text, bug.name
    assert "**nothing**" not in text
