"""The shop does what its README says, from an empty database to the last order, in processes of its own."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shlex
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest
from sqlalchemy import make_url
from tests.conftest import Server
from tests.examples.application import EXAMPLES, SOON, Application
from tests.examples.walk import Step, steps
from tests.postgres.hosts import HEAD
from tests.system.waiting import until

from pgebus import DatabaseSettings
from pgebus.drift import find_drift

README = steps(EXAMPLES / "shop" / "README.md")

WORKER = "python -m shop.worker"
API = "uvicorn shop.api:app"
# pip would install what is missing; here it finds out that nothing is. Its own warnings are no concern of ours.
CHECK_ONLY = {"PIP_DRY_RUN": "1", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONWARNINGS": "ignore"}
RECEIPT = re.compile(r"receipt-(\d+) to \w+: order (\d+)")


@pytest.fixture
async def shop(empty_database: DatabaseSettings, server: Server, tmp_path: Path) -> AsyncIterator[Application]:
    """The shop, with an empty database."""
    url = empty_database.sqlalchemy_url()
    sql = await server.connect(url.database)
    application = Application(
        "shop",
        tmp_path,
        sql,
        PGEBUS_DATABASE__URL=url.render_as_string(hide_password=False),
        PGEBUS_EVENT_SYSTEM__POLL_INTERVAL_SECONDS="0.5",
    )
    yield application
    await application.end()
    await sql.close()


async def tables(shop: Application) -> set[str]:
    rows = await shop.sql.fetch(
        "SELECT schemaname || '.' || tablename AS name FROM pg_tables"
        " WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
    )
    return {row["name"] for row in rows}


async def requested(client: httpx.AsyncClient, command: str) -> httpx.Response:
    """Do what a `curl` of the README does."""
    _, address, *options = shlex.split(command)
    host, _, path = address.partition("/")
    assert host == "localhost:8000"  # the port that uvicorn takes by itself
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert given.keys() <= {"-X", "--json"}
    method = given.get("-X", "POST" if "--json" in given else "GET")
    return await client.request(
        method, f"/{path}", content=given.get("--json"), headers={"Content-Type": "application/json"}
    )


async def answered(client: httpx.AsyncClient, step: Step) -> None:
    """Get what the README says; what the worker changes may take it a moment."""
    seen: list[str] = []

    async def look() -> bool:
        seen.append((await requested(client, step.command)).text)
        return seen[-1] == step.output

    if " --json " in step.command:
        assert await look(), seen
        return
    try:
        await until(look, SOON)
    except AssertionError:
        raise AssertionError(f"{step.command} says {seen[-1]!r}, not {step.output!r}") from None


async def selected(shop: Application, step: Step) -> None:
    """Read the rows that the README shows."""
    seen: list[str] = []

    async def look() -> bool:
        rows = await shop.sql.fetch(step.command)
        seen.append("\n".join(" | ".join(map(str, row)) for row in rows))
        return seen[-1] == step.output

    try:
        await until(look, SOON)
    except AssertionError:
        raise AssertionError(f"{step.command} gives {seen[-1]!r}, not {step.output!r}") from None


async def test_the_readme_is_true_from_the_first_line_to_the_last(shop: Application) -> None:
    """Each of its commands is run, in its order, and says what it is said to say."""
    async with AsyncExitStack() as stack:
        client: httpx.AsyncClient | None = None
        for step in README:
            match step.language, step.command.split():
                case "console", ["python", "-m", "pip", *_]:
                    await shop.run(step.command, **CHECK_ONLY)
                case "console", ["export", variable]:
                    name, _, value = variable.partition("=")
                    assert name == "PGEBUS_DATABASE__URL"
                    assert make_url(value).database == "shop"
                case "console", ["alembic", "downgrade", *_]:
                    assert await shop.stop(signal.SIGINT) == {WORKER: 0, f"{API} --host 127.0.0.1 --port 0": 0}
                    assert await history(shop) == AFTER_THE_WALK
                    await shop.run(step.command)
                case "console", ["alembic", *_]:
                    assert await shop.run(step.command) == step.output
                case "console", ["python", *_]:
                    assert step.command == WORKER
                    await shop.start(step.command)
                case "console", ["uvicorn", *_]:
                    assert step.command == API
                    client = await stack.enter_async_context(await shop.serve(step.command))
                case "console", ["curl", *_]:
                    assert client is not None
                    await answered(client, step)
                case "text", _:
                    await shop.programs[0].prints(re.compile(f"^{re.escape(step.output)}$", re.MULTILINE))
                case "sql", ["SELECT", *_]:
                    await selected(shop, step)
                case "sql", ["UPDATE", *_]:
                    assert await shop.sql.execute(step.command) == "UPDATE 1"
                case unknown:
                    raise AssertionError(f"no test has done this: {unknown}")
    assert await tables(shop) == {"public.alembic_version"}


# Order 2 was refused when its event had been published: there is no trace of either.
AFTER_THE_WALK = [
    ("order.placed", 1, "completed"),
    ("stock.reserved", None, "completed"),
    ("order.placed", 3, "completed"),
    ("stock.reserved", None, "completed"),
]


async def history(shop: Application) -> list[tuple[str, int | None, str]]:
    rows = await shop.sql.fetch(
        "SELECT e.type, e.order_id, d.status FROM pgebus.events e JOIN pgebus.deliveries d ON d.event_id = e.id"
        " ORDER BY e.id"
    )
    return [(row["type"], row["order_id"], row["status"]) for row in rows]


async def test_its_migrations_go_up_and_down_and_up_again(shop: Application, empty_database: DatabaseSettings) -> None:
    await shop.run("alembic upgrade head")
    made = await tables(shop)
    assert {"public.orders", "public.stock", "pgebus.events", "pgebus.deliveries"} <= made
    assert (await shop.run("alembic heads")).splitlines() == ["shop_0003 (pgebus) (head)"]
    assert await find_drift(empty_database) == []
    await shop.run("alembic downgrade base")
    assert await tables(shop) == {"public.alembic_version"}
    assert await shop.sql.fetchval("SELECT to_regnamespace('pgebus')") is None
    await shop.run("alembic upgrade head")
    assert await tables(shop) == made
    await shop.run("alembic check")


async def test_alembic_writes_its_history_as_the_readme_says(shop: Application) -> None:
    """Without what was made by commands, the commands make it again."""
    versions = shop.folder / "migrations" / "versions"
    for number in ("0002", "0003"):
        (made,) = versions.glob(f"{number}_*.py")
        made.unlink()
    text = (shop.folder / "README.md").read_text(encoding="utf-8")
    commands = "alembic revision --autogenerate --head shop_0001", "alembic merge shop_0002 pgebus@head"
    assert all(f"`{command}`" in text for command in commands)
    await shop.run("alembic upgrade heads")
    await shop.run(f"{commands[0]} --rev-id shop_0002 -m events")
    written = (versions / "shop_0002_events.py").read_text(encoding="utf-8")
    assert "\ndown_revision = 'shop_0001'\n" in written
    assert f"\ndepends_on = '{HEAD}'\n" in written
    await shop.run(f"{commands[1]} --rev-id shop_0003 -m merged")
    assert (await shop.run("alembic heads")).splitlines() == ["shop_0003 (pgebus) (head)"]
    await shop.run("alembic upgrade head")
    await shop.run("alembic check")


async def test_its_migrations_can_be_written_down(shop: Application) -> None:
    """What `--sql` writes makes the same tables."""
    await shop.sql.execute(await shop.run("alembic upgrade head --sql"))
    await shop.run("alembic check")


async def test_its_worker_tells_an_orchestrator_how_it_is(shop: Application) -> None:
    """While it runs; and a signal ends both the worker and the server."""
    await shop.run("alembic upgrade head")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    worker = await shop.start(WORKER, SHOP_HEALTH_PORT=str(port))
    await worker.prints(re.compile("Handling channel"))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:

        async def ready() -> bool:
            with contextlib.suppress(httpx.ConnectError):
                return (await client.get("/ready")).status_code == 200
            return False

        await until(ready, SOON)
        assert (await client.get("/live")).json() == {"alive": True, "state": "running"}
    assert await shop.stop(signal.SIGTERM) == {WORKER: 0}


async def test_many_customers_and_two_workers_share_the_stock(shop: Application) -> None:
    """Each order is reserved once or ends dead, and nothing is reserved that is not there."""
    await shop.run("alembic upgrade head")
    workers = [await shop.start(WORKER), await shop.start(WORKER)]
    async with await shop.serve(API) as client:
        assert (await client.put("/stock/tea", json={"available": 7})).is_success
        placed = await asyncio.gather(
            *(
                client.post("/orders", json={"customer": f"c{number}", "item": "tea", "quantity": 1})
                for number in range(10)
            )
        )
        assert {response.status_code for response in placed} == {201}

        async def settled() -> bool:
            return Counter((kind, status) for kind, _, status in await history(shop)) == {
                ("order.placed", "completed"): 7,
                ("order.placed", "dead"): 3,
                ("stock.reserved", "completed"): 7,
            }

        await until(settled, SOON)
        assert (await client.get("/stock/tea")).json() == {"available": 0}
        orders = [(await client.get(f"/orders/{response.json()['id']}")).json() for response in placed]
    reserved = [order["id"] for order in orders if order["state"] == "reserved"]
    assert len(reserved) == 7
    receipts = [match for worker in workers for match in RECEIPT.findall(worker.printed())]
    assert sorted(int(order_id) for _, order_id in receipts) == sorted(reserved)
    assert len({event_id for event_id, _ in receipts}) == 7
    errors = await shop.sql.fetch("SELECT errors -> -1 ->> 'message' AS text FROM pgebus.deliveries WHERE attempt = 1")
    assert len([row for row in errors if row["text"] and row["text"].startswith("not enough tea")]) == 3


async def test_it_says_what_is_not_there(shop: Application) -> None:
    await shop.run("alembic upgrade head")
    async with await shop.serve(API) as client:
        wanted = {"customer": "ada", "item": "tea", "quantity": 1}
        assert (await client.post("/orders", json=wanted)).status_code == 404
        assert (await client.post("/orders", json={**wanted, "quantity": 0})).status_code == 422
        assert (await client.get("/orders/1")).status_code == 404
        assert (await client.get("/stock/tea")).status_code == 404
    assert await history(shop) == []


async def test_it_stops_when_it_is_told(shop: Application) -> None:
    """As a service manager does it; uvicorn ends by the signal that it was sent, when it has closed everything."""
    await shop.run("alembic upgrade head")
    worker = await shop.start(WORKER)
    await worker.prints(re.compile("Handling channel 'events'"))
    async with await shop.serve(API) as client:
        assert (await client.get("/orders/1")).status_code == 404
    api = shop.programs[-1]
    codes = await shop.stop(signal.SIGTERM)
    assert codes == {WORKER: 0, api.command: -signal.SIGTERM}
    assert "Application shutdown complete" in api.printed()
    assert await shop.sql.fetchval("SELECT count(*) FROM pgebus.workers WHERE ended_at IS NULL") == 0
