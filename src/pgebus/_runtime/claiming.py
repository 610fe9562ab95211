"""The claim loop: looks for due deliveries and starts them.

Holds no more than it can start at once, plus what it has lately been finishing in a second: every delivery that it
holds is charged an attempt when the process dies.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, Final, NoReturn

from pgebus._runtime.acknowledging import Acknowledger
from pgebus._runtime.dispatching import Dispatcher, Following
from pgebus._runtime.leases import Holdings, Lease
from pgebus._runtime.outcome import Lost, Outcome, Release
from pgebus._runtime.places import Places
from pgebus._runtime.presence import Presence
from pgebus._runtime.pulse import Pulse
from pgebus._runtime.quarantine import Quarantine
from pgebus._runtime.store import Store
from pgebus._runtime.supervision import Crew
from pgebus._runtime.waking import DatabaseClock, Wakeup, next_look
from pgebus.routing import EventRouter

logger = logging.getLogger(__name__)

# Most that is ever held beyond the free slots, however fast the handlers are.
MAX_AHEAD: Final = 1_000
# With fewer attempts than that, nothing is held ahead.
ATTEMPTS_TO_SPARE: Final = 3
# How many deliveries that a worker died with are taken together, at most. When that kills another worker, each of them
# has lost two attempts, and runs alone from then on.
MOST_SUSPECTS: Final = 100
# The idle flag is cleared at most this often, and unhandled types are looked up at most this often.
FLAG_SECONDS: Final = 1.0
ADOPT_SECONDS: Final = 1.0
# Leases that nobody here knows of come from a claim whose answer was lost: rare, but they would run for ever.
STRAYS_SECONDS: Final = 10.0
ADOPT_LIMIT: Final = 100
# A limited group that another worker is just claiming from is tried again after that.
LOCKED_GROUP_SECONDS: Final = 0.05
MAX_UNKNOWN: Final = 1_000
LONGEST_STRETCH_SECONDS: Final = 0.003


class Rate:
    """How many deliveries were finished in the last second."""

    def __init__(self) -> None:
        self._finished: deque[float] = deque(maxlen=MAX_AHEAD)

    def finished(self) -> None:
        """Count one."""
        self._finished.append(monotonic())

    def per_second(self) -> int:
        """Return the count of the last second, at most `MAX_AHEAD`."""
        since = monotonic() - 1.0
        while self._finished and self._finished[0] < since:
            self._finished.popleft()
        return len(self._finished)


class Claimer:
    """The loop that claims, and the deliveries that it has started.

    Args:
        store: For claims, on a connection of its own.
        router: Knows which types this process handles.
        dispatcher: Runs a delivery.
        acknowledger: Takes its outcome.
        holdings: All leases that are held.
        presence: Says whether claiming is allowed, and in whose name.
        wakeup: Wakes the loop.
        clock: The database's clock.
        crew: The tasks of the running deliveries.
        groups: Returns the groups that are served; asked again when handlers are registered late.
        slots: How many deliveries run at once.
        ahead: How many more may be held, at most.
        poll_interval: Seconds between looks that nothing asked for.
        notify: Whether publishers are to wake this worker: "auto" while it sleeps, "always", or "off".
        health: Told when a look worked.
    """

    def __init__(
        self,
        store: Store,
        router: EventRouter,
        dispatcher: Dispatcher,
        acknowledger: Acknowledger,
        *,
        holdings: Holdings,
        presence: Presence,
        wakeup: Wakeup,
        clock: DatabaseClock,
        crew: Crew,
        groups: Callable[[], Sequence[str]],
        slots: int,
        ahead: int = MAX_AHEAD,
        poll_interval: float,
        notify: str = "auto",
        health: Pulse,
    ) -> None:
        self._store = store
        self._router = router
        self._dispatcher = dispatcher
        self._acknowledger = acknowledger
        self._holdings = holdings
        self._presence = presence
        self._wakeup = wakeup
        self._clock = clock
        self._crew = crew
        self._served = groups
        self._groups = list(groups())
        # How many deliveries of a group this process runs at once, at most; for those that have a limit.
        self._here: dict[str, int] = {}
        self._limited: frozenset[str] = frozenset()
        self._turns: deque[str | None] = deque()
        self._places = defaultdict[tuple[str, ...], Places](Places)
        self._slots = slots
        self._ahead = ahead
        self._poll_interval = poll_interval
        self._notify = notify
        self._health = health
        self._rate = Rate()
        self._buffer: deque[Lease] = deque()
        self._unbegun: set[Lease] = set()  # a task was made for it, and has not had its first step
        self._quarantine = Quarantine()
        self._suspects: set[Lease] = set()  # those that are in hand
        self._closed = False
        self._stretch_began = monotonic()
        self._turn = asyncio.Lock()
        self._backlog = True
        self._idle_of: int | None = None  # the id whose idle flag is set
        self._flag_changed = monotonic()
        self._look_at = monotonic()
        self._ask_due = True
        self._adopt_at = monotonic()
        self._strays_at = monotonic()
        self._unknown: set[str] = set()
        self._adopted = False
        self._learn_groups()

    async def run(self) -> NoReturn:
        """Claim and start, until cancelled."""
        self._strays_at = monotonic()  # also after a failed claim
        self._backlog = self._ask_due = True
        while True:
            worker_id = await self._presence.wait()
            async with self._turn:
                delay = float("inf") if self._closed else await self._round(worker_id)
            self._health.well()
            if delay == float("inf"):
                await asyncio.Future()  # closed: nothing is left to do but to be cancelled
            await self._wakeup.wait(delay)

    async def close(self, within: float) -> None:
        """Claim nothing more; wait for a claim in progress, at most *within* seconds, and give back what waits."""
        self._closed = True
        try:
            async with asyncio.timeout(within), self._turn:
                pass
        except TimeoutError:
            logger.warning("A claim was not answered in time; what it took is recovered by others.")
        self.give_back()

    def learn(self) -> None:
        """The router knows more types than before: look for what was put aside."""
        self._learn_groups()
        self._adopt_at = monotonic()
        self._wakeup.look()

    def _learn_groups(self) -> None:
        self._groups = list(self._served())
        self._here = {group.name: group.per_process for group in self._router.groups() if group.per_process}
        policies = [route.handler.retry for route in self._router.routes() if route.handler.group in self._groups]
        spare = all(policy is None or policy.max_attempts >= ATTEMPTS_TO_SPARE for policy in policies)
        # What is held when the process dies has used up an attempt, begun or not.
        self._most_ahead = self._ahead if spare else 0

    def give_back(self) -> None:
        """Release whatever was claimed and not started."""
        while self._buffer:
            lease = self._buffer.popleft()
            self._acknowledger.put(lease, Release())
            self._cleared(lease)

    def forget(self, worker_id: int) -> None:
        """Drop what was claimed in the name of *worker_id*: it was given to others."""
        for lease in self._buffer:
            if lease.fence.worker_id == worker_id:
                self._acknowledger.put(lease, Lost())
                self._cleared(lease)
        self._buffer = deque(lease for lease in self._buffer if lease.fence.worker_id != worker_id)

    async def _round(self, worker_id: int) -> float:
        """Look once, where there is reason to; return for how many seconds there is none."""
        now = monotonic()
        if now >= self._strays_at:
            await self._release_strays(worker_id)
        due_before = self._wakeup.next_due
        wanted = self._wakeup.take()
        self._ask_due = self._ask_due or (due_before is not None and self._wakeup.next_due is None)
        self._ask_due = self._wakeup.doubted() or self._ask_due
        looking = now >= self._look_at
        wanted = wanted or looking
        if now >= self._quarantine.look_at:
            self._quarantine.looked(await self._store.suspects(self._groups), now)
        if self._quarantine.may_start(now, len(self._holdings)):
            await self._claim_suspects(worker_id)
        now = monotonic()
        if self._quarantine.closed(now):
            self._backlog = True
            if not self._suspects:
                self.give_back()
            return min(self._poll_interval, max(0.001, self._quarantine.opens_at() - now))
        self._start_buffered()
        adopted = False
        if now >= self._adopt_at and (room := self._room()):
            # Half of the room, in turns where it is odd: neither what was put aside nor what comes in may keep the
            # other waiting.
            share = room // 2 if self._adopted else (room + 1) // 2
            self._adopted = adopted = share > 0 and await self._adopt(worker_id, share)

        room = self._room()
        if room == 0:
            self._backlog = self._backlog or wanted or adopted  # asked for, and not looked yet
            await self._clear_flag(worker_id, now)
            return self._until(self._look_at + self._poll_interval)
        if not (wanted or self._backlog) and self._idle_of == worker_id:
            return self._until(self._look_at)

        self._backlog = await self._claim(worker_id, room) == room or adopted
        if self._backlog:
            await self._clear_flag(worker_id, now)
            return 0.0
        if self._idle_of != worker_id:
            # Flag first, look second: a publisher that saw no flag has committed by the time of that look, or is
            # found by one of the following.
            if self._notify != "off":
                await self._store.set_idle(worker_id, True)
            self._idle_of = worker_id
            self._flag_changed = monotonic()
            self._look_at = monotonic()
            return 0.0
        return await self._plan_next_look(looking=looking)

    async def _claim(self, worker_id: int, room: int) -> int:
        """Claim up to *room* deliveries and start them; return how many.

        Limited groups are claimed one by one. They and all the others together take turns in coming first.
        """
        self._groups.append(self._groups.pop(0))
        apart = [group for group in self._groups if group in self._limited or group in self._here]
        free = [group for group in self._groups if group not in apart]
        if set(self._turns) != {*apart, None}:
            self._turns = deque([None, *apart])
        self._turns.rotate(1)
        claimed = 0
        for group in tuple(self._turns):
            left = room - claimed
            if group is not None:
                left = self._room_here(group, left)
            if left <= 0:
                continue
            if group is None:
                claimed += await self._claim_free(worker_id, free, left) if free else 0
            elif group in self._limited:
                leases = await self._claim_limited(worker_id, group, left)
                self._take(leases)
                claimed += len(leases)
            else:
                claimed += await self._claim_free(worker_id, [group], left)
        return claimed

    async def _claim_free(self, worker_id: int, groups: list[str], limit: int) -> int:
        """Claim of groups that have no limit: from where the last claim ended, then from the beginning."""
        places = self._places[tuple(sorted(groups))]
        reached = places.begin(monotonic())
        leases = await self._store.claim(worker_id, groups, limit, reached)
        places.ended(reached, leases, full=len(leases) == limit, now=monotonic())
        self._take(leases)
        if reached and len(leases) < limit:
            return len(leases) + await self._claim_free(worker_id, groups, limit - len(leases))
        return len(leases)

    async def _claim_limited(self, worker_id: int, group: str, room: int, *, suspect: bool = False) -> list[Lease]:
        leases = await self._store.claim_limited(worker_id, group, room, suspect=suspect)
        if leases is None:  # its turn comes later: nobody else waits for whoever has locked it
            self._wakeup.due_in(LOCKED_GROUP_SECONDS)
        return leases or []

    def _room_here(self, group: str, room: int) -> int:
        """Return how many deliveries of *group* this process may take, of *room*."""
        most = self._here.get(group)
        return room if most is None else min(room, most - self._holdings.of_group(group))

    async def _plan_next_look(self, *, looking: bool) -> float:
        """Return the seconds until the next look that nothing asked for."""
        if looking:
            self._look_at = monotonic() + next_look(monotonic() - self._flag_changed, self._poll_interval)
        if looking or self._ask_due:
            clock, due = await self._store.next_due(self._groups)
            self._ask_due = False
            self._clock.read(clock)
            if due is not None:
                self._wakeup.due(due)
        return self._until(self._look_at)

    def _until(self, moment: float) -> float:
        """Return the seconds until *moment*, or until something else has to be looked for."""
        return max(0.0, min(moment, self._quarantine.look_at, self._strays_at) - monotonic())

    def _room(self) -> int:
        """Return how many to claim now; zero while what is held is enough."""
        target = self._slots + min(self._most_ahead, self._rate.per_second())
        held = len(self._holdings)
        starved = not self._buffer and len(self._crew) < self._slots
        # In thirds, so that a fast worker claims many at a time, and not one for each slot that comes free; and so that
        # one third can be claimed and one be completed while the handlers have the last.
        return target - held if held < target and (starved or held * 3 <= target * 2) else 0

    def _take(self, leases: list[Lease]) -> None:
        self._holdings.add(leases)
        if leases and leases[0].fence.worker_id != self._presence.worker_id:
            for lease in leases:  # the claim was answered after this id had ended
                self._acknowledger.put(lease, Lost())
            return
        self._buffer.extend(leases)
        if self._closed:
            self.give_back()
            return
        self._start_buffered()

    def _start_buffered(self) -> None:
        while self._buffer and len(self._crew) < self._slots:
            self._start(self._buffer.popleft())

    async def _claim_suspects(self, worker_id: int) -> None:
        """Take deliveries that a worker died with, and start them with nothing else beside them.

        Of all that it held one at most is to blame, so they run several at a time; what two have died with runs alone.
        """
        groups = [group for group in self._groups if self._room_here(group, 1) > 0]
        leases: list[Lease] = []
        if self._most_ahead:
            ahead = 0 if self._holdings else min(self._most_ahead, self._rate.per_second())
            together = min(MOST_SUSPECTS, self._slots + ahead)
            wide = [group for group in groups if group not in self._here]
            leases = await self._store.claim_lost_once(worker_id, wide, together) if wide else []
        leases = leases or await self._store.claim_suspect(worker_id, groups)
        for group in groups:
            if not leases and group in self._limited:
                leases = await self._claim_limited(worker_id, group, 1, suspect=True)
        if not leases:
            # Where a group has no room now, the suspect may be one of its, and goes on waiting.
            if len(groups) == len(self._groups) and not self._limited:
                self._quarantine.looked(found=False, now=monotonic())
            return
        self._holdings.add(leases)
        if self._closed or worker_id != self._presence.worker_id:
            for lease in leases:
                self._acknowledger.put(lease, Release() if self._closed else Lost())
            return
        if len(leases) == 1:
            logger.info("Event %d starts alone: a worker died with it in hand.", leases[0].fence.event_id)
        else:
            logger.info("%d events start with nothing else beside them: a worker died with them in hand.", len(leases))
        self._quarantine.started(monotonic())
        self._suspects.update(leases)
        self._start(leases[0])  # also where no slot is free: it has waited for one long enough
        self._buffer.extendleft(reversed(leases[1:]))  # before those that only just came
        self._start_buffered()

    def _start(self, lease: Lease) -> None:
        self._unbegun.add(lease)
        task = self._crew.start(self._work(lease), f"pgebus-event-{lease.fence.event_id}-{lease.fence.group}")
        # After the crew's own callback, so that the slot is free when the loop looks.
        task.add_done_callback(lambda _: self._never_begun(lease))
        task.add_done_callback(lambda _: self._wakeup.stir())

    def _never_begun(self, lease: Lease) -> None:
        """Give *lease* back when its task was cancelled before its first step: then no `finally` of it has run."""
        if lease in self._unbegun:
            self._unbegun.discard(lease)
            self._conclude(lease, self._interrupted(lease))

    async def _work(self, lease: Lease) -> None:
        """Run *lease*, then whatever waits, in one task: one for each would cost more than a fast handler."""
        self._unbegun.discard(lease)
        task = asyncio.current_task()
        reserved: list[Lease] = []

        def following(accepts: Callable[[Lease], bool]) -> Lease | None:
            if reserved or not self._goes_on(task) or not accepts(self._buffer[0]):
                return None
            reserved.append(self._buffer.popleft())
            return reserved[0]

        await self._execute(lease, following)
        while reserved or self._goes_on(task):
            if reserved and (self._closed or (task is not None and task.cancelling())):
                await self._give_up(reserved.pop())
            elif reserved:
                await self._execute(reserved.pop(), following)
            elif monotonic() - self._stretch_began > LONGEST_STRETCH_SECONDS:
                # Handlers that never wait would keep everybody else from running: all of them together, so the time
                # is counted for all of these tasks, and begins anew with the event loop's next turn.
                asyncio.get_running_loop().call_soon(self._begin_stretch)
                await asyncio.sleep(0)
            else:
                await self._execute(self._buffer.popleft(), following)

    async def _give_up(self, lease: Lease) -> None:
        """Give back what was to be run next."""
        self._conclude(lease, self._interrupted(lease))
        await self._dispatcher.forgo(lease)

    def _goes_on(self, task: asyncio.Task[Any] | None) -> bool:
        return bool(self._buffer) and not self._closed and not (task is not None and task.cancelling())

    def _begin_stretch(self) -> None:
        self._stretch_began = monotonic()

    async def _execute(self, lease: Lease, following: Following) -> None:
        """Run one delivery and hand over its outcome."""
        outcome: Outcome = Release()
        try:
            outcome = await self._dispatcher.dispatch(lease, following)
        except asyncio.CancelledError:
            outcome = self._interrupted(lease)
        finally:
            self._rate.finished()
            self._conclude(lease, outcome)

    def _interrupted(self, lease: Lease) -> Outcome:
        """A stop, or the lease was given to others; either way the attempt was not the handlers' fault."""
        return Release() if lease.fence.worker_id == self._presence.worker_id else Lost()

    def _conclude(self, lease: Lease, outcome: Outcome) -> None:
        self._cleared(lease)
        self._acknowledger.put(lease, outcome)
        self._wakeup.stir()

    def _cleared(self, lease: Lease) -> None:
        """Take note that *lease* is out of our hands, and has not ended this process."""
        if lease in self._suspects:
            self._suspects.discard(lease)
            if not self._suspects:
                self._quarantine.ended(monotonic())

    def settled(self, due_in: float | None) -> None:
        """An outcome was written, and perhaps a delivery is due again in *due_in* seconds."""
        if (due_in is not None and due_in <= 0) or self._limited or self._here:
            self._wakeup.look()  # also because the next one of a limited group may run now
        elif due_in is not None:
            self._wakeup.due_in(due_in)
        else:
            self._wakeup.stir()

    async def _adopt(self, worker_id: int, room: int) -> bool:
        """Take over unhandled deliveries of types that are known by now; return whether there were any."""
        self._adopt_at = monotonic() + ADOPT_SECONDS
        self._limited = await self._store.limited_groups(self._groups)
        adopted = 0
        for group, event_type in await self._store.unhandled_types(self._groups):
            if not self._router.handlers_for(event_type, group):
                self._mention_unknown(event_type)
                continue
            if room <= 0:
                adopted += 1  # more is there, once there is room
                break
            most = min(room, ADOPT_LIMIT, self._room_here(group, room))
            if most <= 0:
                continue
            taken, leases = await self._store.adopt(worker_id, group, event_type, most)
            self._take(leases)
            adopted += taken
            room -= len(leases)
        if adopted:
            self._adopt_at = monotonic()
        return adopted > 0

    def _mention_unknown(self, event_type: str) -> None:
        """Say once that a type waits: it may be another process's, or a typing error."""
        if event_type not in self._unknown and len(self._unknown) < MAX_UNKNOWN:
            self._unknown.add(event_type)
            logger.warning(
                "Events of type %r are unhandled: no handler of this process knows it. They wait for one that does.",
                event_type,
            )

    async def _clear_flag(self, worker_id: int, now: float) -> None:
        """Under backlog nobody needs to wake this worker, and a NOTIFY costs every publisher."""
        if self._notify != "always" and self._idle_of is not None and now - self._flag_changed >= FLAG_SECONDS:
            self._idle_of = None
            self._flag_changed = now
            if self._notify != "off":
                await self._store.set_idle(worker_id, False)

    async def _release_strays(self, worker_id: int) -> None:
        """Give back what runs in our name and is not held: the answer to its claim, or its outcome, was lost."""
        self._strays_at = monotonic() + STRAYS_SECONDS
        strays = [fence for fence in await self._store.strays(worker_id) if fence not in self._holdings]
        if strays:
            released = await self._store.release(strays)
            if released:
                logger.warning("Deliveries whose claim was not answered, pending again: %d.", len(released))
            self._wakeup.look()
