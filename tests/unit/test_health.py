"""What health says, to a program and to a load balancer."""

from __future__ import annotations

import asyncio
import dataclasses
from time import monotonic
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from pgebus import EventRouter, EventSystem, LoopHealth, Settings, SystemHealth, SystemState
from pgebus._runtime import fitness, listening, maintenance, pulse, quarantine
from pgebus._runtime.pulse import Pulse
from pgebus._runtime.supervision import keep_running
from pgebus.health import asgi_app, liveness, readiness


class Reported:
    """A system that is as it is told to be."""

    def __init__(self, state: SystemState = SystemState.RUNNING, *reasons: str) -> None:
        self.reported = SystemHealth(state, True, (LoopHealth("claim"),), 1, 2, reasons)

    def health(self) -> SystemHealth:
        return self.reported


async def get(app: Any, path: str, method: str = "GET") -> tuple[int, Any]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        response = await client.request(method, path)
        return response.status_code, response.json() if response.content else None


@pytest.mark.parametrize(
    ("state", "reasons", "live", "ready"),
    [
        (SystemState.NEW, ["not started"], 200, 503),
        (SystemState.STARTING, ["starting"], 200, 503),
        (SystemState.RUNNING, [], 200, 200),
        (SystemState.RUNNING, ["deaf"], 200, 503),
        (SystemState.STOPPING, ["stopping"], 200, 503),
        (SystemState.STOPPED, ["ended"], 503, 503),
    ],
)
async def test_only_a_system_that_has_ended_is_not_alive(
    state: SystemState, reasons: list[str], live: int, ready: int
) -> None:
    """A database that is down must not make an orchestrator kill the workers."""
    system = Reported(state, *reasons)
    assert (liveness(system)[0], readiness(system)[0]) == (live, ready)
    assert readiness(system)[1]["reasons"] == reasons
    app = asgi_app(system)
    assert await get(app, "/live") == (live, {"alive": live == 200, "state": state.value})
    status, body = await get(app, "/ready")
    assert (status, body["ready"], body["reasons"], body["held"]) == (ready, ready == 200, reasons, 2)
    assert body["loops"][0]["name"] == "claim"


async def test_it_can_be_mounted() -> None:
    outer = FastAPI()
    outer.mount("/internal/health", asgi_app(Reported()))
    assert (await get(outer, "/internal/health/ready"))[0] == 200
    assert (await get(outer, "/internal/health/live/"))[0] == 200
    assert (await get(outer, "/internal/health/other"))[0] == 404


async def test_what_is_not_asked_for_is_refused() -> None:
    app = asgi_app(Reported())
    assert (await get(app, "/"))[0] == 404
    assert (await get(app, "/ready", "POST"))[0] == 405
    assert await get(app, "/ready", "HEAD") == (200, None)


async def test_it_lives_with_a_server_of_its_own() -> None:
    """A server begins and ends the lifespan of its application; and somebody may try a websocket."""
    sent: list[Any] = []
    received = iter(["lifespan.startup", "lifespan.shutdown"])

    async def receive() -> dict[str, Any]:
        return {"type": next(received)}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    await asgi_app(Reported())({"type": "lifespan"}, receive, send)
    await asgi_app(Reported())({"type": "websocket", "path": "/live"}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete", "websocket.close"]


def test_nobody_can_change_what_was_reported() -> None:
    health = EventSystem(EventRouter(), Settings()).health()
    for each, field in ((health, "state"), (health.loops[0], "ok")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(each, field, None)


def test_a_system_that_was_not_started_says_so() -> None:
    health = EventSystem(EventRouter(), Settings()).health()
    assert (health.alive, health.ready, health.ok) == (True, False, False)
    assert health.reasons == ("The system has not been started.",)


def test_ten_seconds_are_enough_to_notice() -> None:
    """Each way to notice, with the settings of a release: the pause between two looks, and how long one may take."""
    assert listening.BEAT_SECONDS + listening.ANSWER_SECONDS <= 10
    assert quarantine.LOOK_SECONDS + pulse.PATIENCE_SECONDS <= 10
    assert maintenance.LOOK_SECONDS + fitness.ASK_SECONDS <= 10
    assert pulse.SILENT_SECONDS <= 10


def test_a_loop_that_waits_for_an_answer_is_not_well_after_a_while() -> None:
    loop = Pulse("claim", well_at=1.0)
    health = loop.health(now=100.0, waiting_since=100.5 - pulse.PATIENCE_SECONDS)
    assert (health.ok, loop.reasons(health)) == (True, [])
    health = loop.health(now=101.0, waiting_since=100.5 - pulse.PATIENCE_SECONDS)
    assert (health.ok, health.worked_seconds_ago) == (False, 100.0)
    assert loop.reasons(health) == ["The claim loop has been waiting for PostgreSQL for 8 s."]


async def test_a_loop_that_ended_the_system_is_named() -> None:
    loop = Pulse("maintain")

    async def body() -> Any:
        raise KeyError("a bug\nwith more to it")

    with pytest.raises(KeyError):
        await keep_running(body, loop, proven=asyncio.Event())
    assert loop.reasons(loop.health(0.0)) == [
        "The maintain loop fails (1 times so far), the last time with: KeyError: 'a bug\\nwith more to it'"
    ]


def test_loops_that_do_not_come_round_are_blocked_together() -> None:
    """One that has come round lately, or never did yet, is no proof; a loop that waits for work is none either."""

    def reasons(**ages: float | None) -> tuple[str, ...]:
        now = monotonic()
        pulses = [Pulse(name, well_at=None if age is None else now - age) for name, age in ages.items()]
        state = SystemState.RUNNING
        return pulse.report(state, pulses, present=True, waiting_since={}, running=0, held=0).reasons

    assert reasons(listen=20.0, claim=20.0, maintain=1.0, acknowledge=20.0) == ()
    assert reasons(listen=None, claim=None, maintain=None, acknowledge=20.0) == ()
    (said,) = reasons(listen=12.0, claim=20.0, maintain=None, acknowledge=1.0)
    assert said == "No loop has come round for 12 s: something blocks the event loop."
