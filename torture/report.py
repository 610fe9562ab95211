"""What a run has shown: for people, and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torture.checker import RULES, Violation
from torture.plan import KINDS, MARKS, missing

_SHOWN = 5


@dataclass
class Report:
    """The result of one run.

    Attributes:
        command: What repeats it; the faults and the choices are the same, the timing is not.
        seed: Decides both.
        versions: Of everything that matters.
        events: How many events were confirmed to publishers.
        counts: Rows that were compared.
        ways: Transactions, by the way in which they published.
        outcomes: Transactions, by what their publisher knows of them.
        planned: Faults, by kind.
        skipped: Faults that found no target, by kind.
        marks: What has hit.
        rates: Deliveries finished per second.
        recovery: Seconds from a SIGKILL to a rerun.
        seconds: How long the parts of the run took.
        excused: Marks that cannot be hit on this machine.
        notes: What could not be tried, and why.
        violations: What is wrong.
    """

    command: str
    seed: int
    versions: dict[str, str]
    events: int
    counts: dict[str, int] = field(default_factory=dict)
    ways: dict[str, int] = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=dict)
    planned: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    marks: dict[str, int] = field(default_factory=dict)
    rates: dict[str, Any] = field(default_factory=dict)
    recovery: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    excused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)

    @property
    def missed(self) -> list[str]:
        """What should have hit and did not."""
        return missing(self.marks, self.events, frozenset(self.excused))

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong, and the faults have really hit."""
        return not self.violations and not self.missed

    def as_json(self) -> dict[str, Any]:
        """Return everything, for `json.dumps()`."""
        found = Counter(violation.rule for violation in self.violations)
        return {
            "ok": self.ok,
            **asdict(self),
            "missed": self.missed,
            "violations": {rule: found[rule] for rule in RULES},
            "examples": [list(violation) for violation in _examples(self.violations)],
        }

    def lines(self) -> Iterator[str]:
        """Return what a newcomer should read."""
        yield ""
        yield f"torture, seed {self.seed}: {self.command}"
        yield "on " + ", ".join(f"{name} {version}" for name, version in self.versions.items())
        yield ""
        yield "What ran"
        yield f"  {self.events} events that publishers know to be there; {_several(self.counts)}"
        yield f"  transactions of publishers: {_several(self.outcomes)}"
        yield f"  by way of publishing: {_several(self.ways)}"
        yield f"  seconds: {_several(self.seconds)}"
        per_second = {name: value for name, value in self.rates.items() if name not in ("all", "of")}
        yield f"  deliveries finished under faults: {self.rates.get('all')} of {self.rates.get('of')}"
        yield f"  per second: {_several(per_second)}"
        yield ""
        yield "What went wrong, on purpose"
        for kind, count in self.planned.items():
            without = f", {self.skipped[kind]} found no target" if self.skipped.get(kind) else ""
            yield f"  {count:6} x {KINDS[kind].says}{without}"
        yield ""
        yield "What it hit"
        for name, mark in MARKS.items():
            yield f"  {self.marks.get(name, 0):6} {mark.says}"
        for note in self.notes:
            yield f"  {note}"
        yield ""
        yield "From kill -9 to the rerun, in seconds"
        for name, value in self.recovery.items():
            yield f"  {name}: {value}"
        yield ""
        yield "What is wrong"
        found = Counter(violation.rule for violation in self.violations)
        for rule, says in RULES.items():
            yield f"  {found[rule]:6} {rule}: {says}"
        for violation in _examples(self.violations):
            yield f"  {violation.rule}: {violation.detail}"
        for each in self.missed:
            yield f"  not enough to say anything: {each}"
        yield ""
        yield "PASSED" if self.ok else "FAILED"


def _several(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _examples(violations: Sequence[Violation]) -> list[Violation]:
    """Return the first few of each rule."""
    shown: Counter[str] = Counter()
    examples = []
    for violation in violations:
        shown[violation.rule] += 1
        if shown[violation.rule] <= _SHOWN:
            examples.append(violation)
    return examples
