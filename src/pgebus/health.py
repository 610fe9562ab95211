"""How a running system is doing, as plain data, and as answers to a load balancer.

Asks nobody: what is here was last seen by the loops themselves, so it is cheap and raises nothing.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, Final, Protocol

__all__ = ["LoopHealth", "SystemHealth", "SystemState", "asgi_app", "liveness", "readiness"]


class SystemState(Enum):
    """Where a system is in its one life."""

    NEW = "new"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class LoopHealth:
    """How one loop is doing.

    Attributes:
        name: Which loop: listen (or beat), claim, acknowledge, maintain or schedule.
        ok: False from a failure until the loop works again, and while the database does not answer it.
        failures: How often it has failed since the start.
        last_error: Type and message of the last failure.
        worked_seconds_ago: Seconds since it last did its work; None when it never did. The acknowledge loop works only
            when there is something to write.
        waiting_seconds: Seconds that it has been waiting for the database's answer; 0 when it waits for none.
    """

    name: str
    ok: bool = True
    failures: int = 0
    last_error: str | None = None
    worked_seconds_ago: float | None = None
    waiting_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class SystemHealth:
    """How a system is doing.

    Attributes:
        state: Where it is in its life.
        present: Whether PostgreSQL sees it alive; while it does not, nothing is claimed.
        loops: One entry for each loop.
        running: Deliveries whose handlers run now.
        held: Deliveries that are claimed and not finished, the running ones included.
        reasons: Why it is not ready, in sentences; empty when it is.
        warnings: What else is wrong, in sentences: events are handled, but something beside that fails, such as pruning
            or a schedule.
    """

    state: SystemState
    present: bool
    loops: tuple[LoopHealth, ...]
    running: int
    held: int
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether events are being handled; the same as `ready`."""
        return self.ready

    @property
    def ready(self) -> bool:
        """Whether events are being handled: it runs, and nothing known to it keeps it from claiming.

        An empty queue and paused groups are nothing of the kind.
        """
        return self.state is SystemState.RUNNING and not self.reasons

    @property
    def alive(self) -> bool:
        """Whether it has not ended. Only then does starting the process anew help: all else it repairs itself."""
        return self.state is not SystemState.STOPPED


class _Reports(Protocol):
    def health(self) -> SystemHealth: ...


_OK: Final = 200
_UNAVAILABLE: Final = 503


def liveness(system: _Reports) -> tuple[int, dict[str, Any]]:
    """Return an HTTP status and a body for JSON: 200 until the system has ended, and its process is to be replaced."""
    health = system.health()
    return _OK if health.alive else _UNAVAILABLE, {"alive": health.alive, "state": health.state.value}


def readiness(system: _Reports) -> tuple[int, dict[str, Any]]:
    """Return an HTTP status and a body for JSON: 200 while events are being handled, else 503 with the reasons.

    The reasons hold messages of PostgreSQL: names of hosts, roles and tables, never a password or a payload.
    """
    health = system.health()
    return _OK if health.ready else _UNAVAILABLE, {
        "ready": health.ready,
        "state": health.state.value,
        "reasons": list(health.reasons),
        "warnings": list(health.warnings),
        "running": health.running,
        "held": health.held,
        "loops": [asdict(loop) for loop in health.loops],
    }


_Message = MutableMapping[str, Any]
_App = Callable[[_Message, Callable[[], Awaitable[_Message]], Callable[[_Message], Awaitable[None]]], Awaitable[None]]
_PATHS: Final = {"live": liveness, "ready": readiness}


def asgi_app(system: _Reports) -> _App:
    """Return an ASGI application that answers GET on paths that end in `/live` and `/ready`.

    For a server of its own, or to be mounted in FastAPI or Starlette. It has no access control.

    Args:
        system: The system, started or not.
    """

    async def app(
        scope: _Message, receive: Callable[[], Awaitable[_Message]], send: Callable[[_Message], Awaitable[None]]
    ) -> None:
        if scope["type"] == "lifespan":
            while (await receive())["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        status, body = _answer(system, scope["method"], scope["path"])
        content = json.dumps(body).encode()
        headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
        headers.append((b"content-length", str(len(content)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else content})

    return app


def _answer(system: _Reports, method: str, path: str) -> tuple[int, dict[str, Any]]:
    # Mounted, the path may come with its prefix or without.
    ask = _PATHS.get(path.rstrip("/").rpartition("/")[2])
    if ask is None:
        return 404, {"error": "There are /live and /ready."}
    return ask(system) if method in ("GET", "HEAD") else (405, {"error": "Use GET."})
