"""The steps that specs are made of: each is a statement or a call of the library, left open for a later commit."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from pgebus import operations, publish_event
from pgebus._runtime.leases import Lane, Lease, Place
from pgebus._runtime.pruning import BEGINNING
from pgebus._runtime.store import Store
from pgebus.session import GuardedSession
from tests.interleavings.parties import Party, Step

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
COMMIT: Final = Step("commit", lambda party: party.end("COMMIT"))
ROLLBACK: Final = Step("rollback", lambda party: party.end("ROLLBACK"))


def together(name: str, *steps: Step) -> Step:
    """Several steps between which nobody comes."""

    async def do(party: Party) -> object:
        results = [await step.do(party) for step in steps]
        return results[0]

    return Step(name, do)


def types(leases: Sequence[Lease]) -> str:
    return " ".join(sorted(lease.type for lease in leases)) or "-"


# What a worker does.


def claim(limit: int = 10, *, groups: Sequence[str] = ("g",), suspect: bool = False) -> Step:
    """Claim what is due; with *suspect*, one delivery that a worker died with."""

    async def do(party: Party) -> str:
        if suspect:
            leases = await party.store.claim_suspect(party.worker_id, groups)
        else:
            leases = await party.store.claim(party.worker_id, groups, limit)
        party.leases = [*party.leases, *leases]
        return types(leases)

    return Step("claim", do)


def claim_on(event_id: int, due: datetime, limit: int = 10) -> Step:
    """Claim as in a backlog: from a place in the middle of the lane on."""
    place = Place((due - _EPOCH) // timedelta(microseconds=1), event_id)

    async def do(party: Party) -> str:
        leases = await party.store.claim(party.worker_id, ["g"], limit, {Lane("g", 0): place})
        party.leases = [*party.leases, *leases]
        return types(leases)

    return Step("claim", do)


def claim_lost_once(limit: int) -> Step:
    """Claim several of those that one worker died with."""

    async def do(party: Party) -> str:
        leases = await party.store.claim_lost_once(party.worker_id, ["g"], limit)
        party.leases = [*party.leases, *leases]
        return types(leases)

    return Step("claim", do)


def claim_limited(limit: int = 10, group: str = "g") -> Step:
    async def do(party: Party) -> str:
        leases = await party.store.claim_limited(party.worker_id, group, limit)
        party.leases = [*party.leases, *(leases or [])]
        return "locked" if leases is None else types(leases)

    return Step("claim", do)


async def _complete(party: Party) -> str:
    if not party.leases:
        return "-"
    held = await party.store.complete(party.leases)
    return " ".join(lease.type for lease in party.leases if (lease.fence.event_id, lease.fence.group) in held) or "-"


async def _release(party: Party) -> str:
    held = await party.store.release([lease.fence for lease in party.leases])
    return " ".join(lease.type for lease in party.leases if (lease.fence.event_id, lease.fence.group) in held) or "-"


async def _retry(party: Party) -> bool:
    fence = party.leases[0].fence
    return await party.store.reschedule(fence, delay=0, give_back=0, handled=[], entry={"type": "failed"})


async def _bury(party: Party) -> bool:
    return await party.store.bury(party.leases[0].fence, handled=[], entry={"type": "failed"})


async def _unhandle(party: Party) -> bool:
    return await party.store.unhandle(party.leases[0].fence)


async def _sweep(party: Party) -> int:
    return (await party.store.sweep(("", "", ""), 1_000))[0]


async def _prune(party: Party) -> int:
    rows = await party.store.finished(0.0, BEGINNING, 100)
    return await party.store.remove({row["event_id"]: 0.0 for row in rows}, dead=None, unhandled=None)


async def _beat(party: Party) -> bool:
    return bool(await party.line.fetch(party.statements.beat, party.worker_id))


async def backfill_once(store: Store) -> tuple[int, int | None, int | None]:
    """Give the one pattern that is new the events that it lacks; return what `backfill()` does."""
    (new,) = await store.backfills()
    done = await store.backfill(new, new.since, 100, 100)
    assert done is not None
    return done


BEAT: Final = Step("beat", _beat)
COMPLETE: Final = Step("complete", _complete)
RELEASE: Final = Step("release", _release)
RETRY: Final = Step("retry", _retry)
BURY: Final = Step("bury", _bury)
UNHANDLE: Final = Step("unhandle", _unhandle)
SWEEP: Final = Step("sweep", _sweep)
PRUNE: Final = Step("prune", _prune)


def recover(*worker_ids: int) -> Step:
    """Take the leases of dead workers back."""

    async def do(party: Party) -> int:
        return await party.store.recover(worker_ids)

    return Step("recover", do)


def adopt(event_type: str) -> Step:
    async def do(party: Party) -> str:
        _, leases = await party.store.adopt(party.worker_id, "g", event_type, 10)
        party.leases = [*party.leases, *leases]
        return types(leases)

    return Step("adopt", do)


def idle(flag: bool) -> Step:
    async def do(party: Party) -> None:
        await party.store.set_idle(party.worker_id, flag)

    return Step("idle", do)


# What the dispatcher does for transactional handlers.


async def _handle(party: Party) -> None:
    """Begin the transaction and leave an effect, for the first lease."""
    if party.leases:
        await party.begin()
        await _effect(party)


async def _effect(party: Party) -> None:
    raw = await party.line.driver()
    await raw.execute(f"INSERT INTO effects (event_id, by) VALUES ({party.leases[0].fence.event_id}, '{party.name}')")


async def _completed(party: Party) -> None:
    if party.leases:
        await party.complete(party.leases[0])


HANDLE: Final = Step("handle", _handle)
COMPLETED: Final = Step("complete", _completed)
# As the dispatcher sends it, in one message.
END: Final = together("end", COMPLETED, COMMIT)


def follow_up(event_type: str, *, key: str | None = None) -> Step:
    """Publish in the handlers' transaction."""

    async def do(party: Party) -> None:
        assert isinstance(party.guarded, GuardedSession)
        await publish_event(party.guarded, event_type, {}, "events", key=key)

    return Step("publish", do)


# What an application does, or a person.


async def _look(party: Party) -> None:
    """Begin the transaction: from REPEATABLE READ on, this is what it will see to its end."""
    connection = await party.session.connection()
    await connection.exec_driver_sql("SELECT count(*) FROM pgebus.subscriptions")


LOOK: Final = Step("look", _look)


def publish(event_type: str, *, key: str | None = None, dedup_key: str | None = None, core: bool = False) -> Step:
    """Publish in a session; with *core*, on its connection."""

    async def do(party: Party) -> str:
        unit: Any = await party.session.connection() if core else party.session
        event = await publish_event(unit, event_type, {}, "events", key=key, dedup_key=dedup_key)
        return f"{event.type}{' (there)' if event.duplicate else ''}"

    return Step("publish", do)


def by_hand(name: str, sql: str) -> Step:
    """What a person sends, as the guides say; how many rows it met."""

    async def do(party: Party) -> int:
        connection = await party.session.connection()
        return int((await connection.exec_driver_sql(sql)).rowcount)

    return Step(name, do)


def operation(name: str, call: Any, *args: Any, **options: Any) -> Step:
    """A function of `pgebus.operations`; how many it returns, where it returns a list."""

    async def do(party: Party) -> object:
        done = await call(party.session, *args, **options)
        return len(done) if isinstance(done, list) else done

    return Step(name, do)


CANCEL: Final = operation("cancel", operations.cancel, event_ids=[1])
REDRIVE: Final = operation("redrive", operations.redrive, event_ids=[1])
RELEASE_KEY: Final = operation("let_go", operations.release_key, "g", "k")
DELETE: Final = by_hand("delete", "DELETE FROM pgebus.events WHERE id = 1")
LOCK_EVENT: Final = by_hand("lock", "SELECT id FROM pgebus.events WHERE id = 1 FOR KEY SHARE")
REPLAY: Final = by_hand(
    "replay",
    "UPDATE pgebus.deliveries SET status = 'pending', due_at = now(), finished_at = NULL, attempt = 0, lost = 0,"
    " handled = NULL, round = round + 1 WHERE event_id = 1 AND status = 'completed'",
)
