"""The rules of our branch: the label is on the newest revision, and what was released is never edited."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

VERSIONS = Path(__file__).parents[2] / "src" / "pgebus" / "migrations" / "versions"
# At each release: the id of every revision in it, with its fingerprint() as the test prints it.
RELEASED = Path(__file__).parents[1] / "released_revisions.json"


_ID = re.compile(r"pgebus_\d{4}")


def fingerprint(file: Path) -> str:
    """A hash of what the revision does: comments may change, and the label moves on to the next one."""
    kept = [
        line.rstrip()
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.strip() and not line.lstrip().startswith("#") and not line.startswith("branch_labels")
    ]
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()


def problems(versions: Path, released: Mapping[str, str]) -> list[str]:
    """Return what is wrong with the branch in *versions*, in words for who changed it."""
    config = Config()
    config.set_main_option("script_location", "pgebus:migrations")
    config.set_main_option("path_separator", "newline")
    config.set_main_option("version_locations", str(versions))
    scripts = ScriptDirectory.from_config(config)
    revisions = {each.revision: each for each in scripts.walk_revisions()}
    heads = scripts.get_heads()
    labelled = [each.revision for each in revisions.values() if each.module.branch_labels is not None]
    found = []
    if len(heads) != 1:
        found.append(f"There are {len(heads)} heads: {sorted(heads)}.")
    if labelled != heads:
        found.append(f"The label is on {sorted(labelled)}; move it to the newest revision, {sorted(heads)}.")
    found += [f"The id {each!r} is not 'pgebus_' and four digits." for each in revisions if not _ID.fullmatch(each)]
    for revision, expected in released.items():
        if revision not in revisions:
            found.append(f"{revision!r} was released, and is gone.")
        elif (actual := fingerprint(Path(revisions[revision].path))) != expected:
            found.append(f"{revision!r} was released, and was edited since: {actual}. Write a new revision.")
    return found


def test_our_branch_is_in_order() -> None:
    assert problems(VERSIONS, json.loads(RELEASED.read_text(encoding="utf-8"))) == []


@pytest.fixture
def versions(tmp_path: Path) -> Path:
    """A copy of the branch."""
    return Path(shutil.copytree(VERSIONS, tmp_path / "versions", ignore=shutil.ignore_patterns("__pycache__")))


def first(versions: Path) -> Path:
    (file,) = versions.glob("0001_*.py")
    return file


def newest(versions: Path) -> Path:
    return max(versions.glob("*.py"))


def edit(file: Path, old: str, new: str) -> None:
    source = file.read_text(encoding="utf-8")
    assert old in source
    file.write_text(source.replace(old, new), encoding="utf-8")


def add(versions: Path, revision: str, *, label: str = '("pgebus",)', down: str = "pgebus_0002") -> None:
    (versions / f"{revision}.py").write_text(
        f'revision = "{revision}"\ndown_revision = "{down}"\nbranch_labels = {label}\n', encoding="utf-8"
    )


def test_the_label_moves_to_the_next_revision(versions: Path) -> None:
    released = {"pgebus_0001": fingerprint(first(versions)), "pgebus_0002": fingerprint(newest(versions))}
    edit(newest(versions), '= ("pgebus",)', "= None")
    add(versions, "pgebus_0003")
    assert problems(versions, released) == []


def test_a_label_that_stayed_behind_is_refused(versions: Path) -> None:
    add(versions, "pgebus_0003", label="None")
    assert [each for each in problems(versions, {}) if "move it" in each]


def test_two_heads_are_refused(versions: Path) -> None:
    edit(newest(versions), '= ("pgebus",)', "= None")
    add(versions, "pgebus_0003")
    add(versions, "pgebus_0004", label="None")
    assert [each for each in problems(versions, {}) if "2 heads" in each]


def test_an_id_that_is_not_ours_is_refused(versions: Path) -> None:
    edit(newest(versions), '= ("pgebus",)', "= None")
    add(versions, "abc123")
    assert [each for each in problems(versions, {}) if "'abc123'" in each]


def test_an_edited_or_deleted_release_is_refused(versions: Path) -> None:
    released = {"pgebus_0001": fingerprint(first(versions)), "pgebus_0000": ""}
    edit(first(versions), "# Every way to insert publishes", "# Another comment")
    assert [each for each in problems(versions, released) if "edited" in each] == []
    edit(first(versions), "channel text", "channel  text")
    found = problems(versions, released)
    assert [re.sub(r"[0-9a-f]{64}", "…", each) for each in found] == [
        "'pgebus_0001' was released, and was edited since: …. Write a new revision.",
        "'pgebus_0000' was released, and is gone.",
    ]
