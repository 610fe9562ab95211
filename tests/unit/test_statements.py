from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgebus._runtime.statements import Statements
from pgebus.names import quote_identifier

PLAIN = Statements("pgebus")


def texts(statements: Statements) -> dict[str, str]:
    return {name: text for name, text in vars(statements).items() if name != "schema"}


def flat(text: str) -> str:
    """Return *text* with single spaces, so that a line break is no difference."""
    return " ".join(text.split())


every_statement = pytest.mark.parametrize("name", texts(PLAIN))

# What finishes a running delivery, or gives it back, in the name of the worker that claimed it.
ONE_AT_A_TIME = ("reschedule", "bury", "unhandle")
IN_BATCHES = ("complete", "complete_keyed", "forget", "forget_keyed", "release")
FORGETTING = ("forget", "forget_keyed")


@every_statement
def test_no_statement_has_a_percent_sign(name: str) -> None:
    """Text that goes through a driver with %-parameters one day would be cut at it."""
    assert "%" not in texts(PLAIN)[name]


@every_statement
def test_parameters_are_numbered_without_a_gap(name: str) -> None:
    """PostgreSQL can't tell the type of a parameter that no statement mentions."""
    numbers = {int(number) for number in re.findall(r"\$(\d+)", texts(PLAIN)[name])}
    assert numbers == set(range(1, len(numbers) + 1))


@every_statement
def test_every_statement_is_one_statement(name: str) -> None:
    assert ";" not in texts(PLAIN)[name]


def common_tables(text: str) -> dict[str, tuple[str, str]]:
    """Return what stands between AS and the parenthesis, and in the parentheses, of each CTE of *text*."""
    found = {}
    for match in re.finditer(r"(\w+) AS ((?:NOT )?(?:MATERIALIZED )?)\(", text):
        depth, end = 1, match.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        found[match[1]] = match[2].strip(), text[match.end() : end - 1].strip()
    return found


@every_statement
def test_what_locks_or_tells_somebody_is_done_once(name: str) -> None:
    """A CTE that PostgreSQL may inline may be run once for each row of another table, or not at all."""
    effects = re.compile(r"\bFOR (?:NO KEY )?UPDATE|\bFOR (?:KEY )?SHARE|pg_notify\(|pg_try_advisory")
    for cte, (how, body) in common_tables(flat(texts(PLAIN)[name])).items():
        if not body.startswith(("UPDATE", "DELETE", "INSERT")) and effects.search(body):
            assert how == "MATERIALIZED", cte


# The fence


@pytest.mark.parametrize("name", ONE_AT_A_TIME)
def test_a_write_on_one_delivery_carries_the_fence(name: str) -> None:
    text = flat(texts(PLAIN)[name])
    fence = (
        "WHERE d.ctid = ( "
        'SELECT f.ctid FROM "pgebus".deliveries f '
        "WHERE f.event_id = $1::bigint AND f.consumer_group = $2::text AND f.claim_seq = $3::integer "
        "AND f.worker_id = $4::bigint AND f.status = 'running' FOR UPDATE SKIP LOCKED) RETURNING"
    )
    assert text.count(fence) == 1
    assert text.count('UPDATE "pgebus".deliveries d ') == 1


@pytest.mark.parametrize("name", IN_BATCHES)
def test_a_write_on_many_deliveries_carries_the_fence_of_each(name: str) -> None:
    text = flat(texts(PLAIN)[name])
    assert "unnest($1::bigint[], $2::text[], $3::integer[]) u(event_id, consumer_group, claim_seq)" in text
    fence = (
        "WHERE d.event_id = u.event_id AND d.consumer_group = u.consumer_group AND d.claim_seq = u.claim_seq "
        "AND d.worker_id = $4::bigint AND d.status = 'running'"
    )
    assert text.count(fence) == 1
    # What is written is what was found under the fence, and locked; a row that others have locked is passed over.
    assert text.count("FOR UPDATE SKIP LOCKED) h") == 1
    assert text.count('UPDATE "pgebus".deliveries d ') == 1
    deletion = 'DELETE FROM "pgebus".deliveries d USING judged WHERE d.ctid = judged.place AND judged.forgettable RET'
    assert text.count('DELETE FROM "pgebus".deliveries') == text.count(deletion) == int(name in FORGETTING)
    if name in FORGETTING:  # each of them is either deleted or kept
        assert text.count("FROM judged WHERE d.ctid = judged.place AND NOT judged.forgettable RETURNING") == 1
        assert "SELECT h.place, (" in text
        assert "IS TRUE AS forgettable FROM held h )" in text
    else:
        assert text.count("FROM held WHERE d.ctid = held.place") == 1


@every_statement
def test_nothing_else_writes_on_a_running_delivery(name: str) -> None:
    """Whoever adds a write on deliveries has to say here what keeps it off those that others run."""
    text = flat(texts(PLAIN)[name])
    allowed = {
        "claim": "d.status = 'pending'",
        "claim_on": "d.status = 'pending'",
        "claim_suspect": "d.status = 'pending'",
        "claim_lost_once": "d.status = 'pending'",
        "claim_limited": "d.status = 'pending'",
        "claim_limited_suspect": "d.status = 'pending'",
        "adopt": "d.status = 'unhandled'",
        "sweep": "d.consumer_group = h.consumer_group AND d.status = 'blocked'",
        "recover": "pg_try_advisory_xact_lock(w)",
        "backfill": "WHERE d.ctid = p.place AND d.status = 'cancelled'",
        "let_go": "d.status = 'unhandled' AND d.holds_key",
        "configure_groups": "d.status = 'dead' AND d.holds_key",
    }
    if 'UPDATE "pgebus".deliveries' in text and name not in ONE_AT_A_TIME + IN_BATCHES:
        assert allowed[name] in text
    deletes = {
        "backfill": "WHERE d.ctid = x.place AND d.status = 'unhandled'",
        "delete_ripe": "USING locked WHERE locked.event IS NULL AND d.ctid = locked.place",
    }
    if 'DELETE FROM "pgebus".deliveries' in text and name not in FORGETTING:
        assert text.count('DELETE FROM "pgebus".deliveries') == text.count(deletes[name]) == 1


@pytest.mark.parametrize("name", ["bury", "complete_keyed", "forget_keyed", "unhandle"])
def test_whoever_leaves_the_head_of_a_key_lets_only_a_waiting_one_in(name: str) -> None:
    text = flat(texts(PLAIN)[name])
    heir = (
        "n.consumer_group = nx.consumer_group AND n.status = 'blocked' "
        "ORDER BY n.event_id LIMIT 1 FOR UPDATE SKIP LOCKED"
    )
    assert text.count(heir) == 1
    # The first that waits, locked or not: passing over it to the second would be another order.
    assert "ORDER BY b.event_id LIMIT 1) nx" in text
    assert text.count("SET status = 'pending' FROM heir WHERE n.ctid = heir.place") == 1


def test_an_attempt_is_given_back_only_where_no_handler_failed() -> None:
    uncounted = {name for name, text in texts(PLAIN).items() if "attempt = greatest(d.attempt - 1, 0)" in text}
    assert uncounted == {"release", "unhandle"}
    assert "attempt = greatest(d.attempt - $7::integer, 0)" in PLAIN.reschedule


@every_statement
def test_no_attempt_is_ever_counted_below_zero(name: str) -> None:
    """Whoever sets it back to zero by hand while the delivery runs must not keep its outcome from being written."""
    text = texts(PLAIN)[name]
    assert text.count("d.attempt - ") == text.count("greatest(d.attempt - ")


# Deliveries in whose hands a worker died


def test_what_a_worker_died_with_is_claimed_apart() -> None:
    """The two claims are one statement but for that: together they find everything, and nothing is found by both."""
    assert PLAIN.claim.count("AND d.lost = 0") == 1
    assert PLAIN.claim_suspect.count("AND d.lost > 0") == 1
    assert PLAIN.claim.replace("d.lost = 0", "d.lost > 0") == PLAIN.claim_suspect
    assert PLAIN.claim.replace("d.lost = 0", "d.lost = 1") == PLAIN.claim_lost_once
    assert PLAIN.claim_limited.replace("d.lost = 0", "d.lost > 0") == PLAIN.claim_limited_suspect


def test_a_limited_group_is_claimed_under_its_lock_alone() -> None:
    assert PLAIN.claim.replace(" AND g.max_running IS NULL", "") == PLAIN.claim_limited
    assert PLAIN.claim != PLAIN.claim_limited


def test_what_a_worker_died_with_is_adopted_but_not_started() -> None:
    assert "WHEN d.due_at > now() OR d.lost > 0 OR g.waits THEN 'pending'" in flat(PLAIN.adopt)


def test_only_what_could_be_claimed_counts_as_a_suspect() -> None:
    """A worker that stops for one that it can't get would stop for nothing."""
    text = flat(PLAIN.suspects)
    for condition in ("d.status = 'pending'", "d.lost > 0", "d.due_at <= now()", "g.paused_at IS NULL"):
        assert condition in text
        assert condition.removeprefix("d.").removeprefix("g.") in flat(PLAIN.claim_suspect)


def test_who_asks_what_is_still_held_locks_nothing() -> None:
    """It is asked because somebody else has a lock."""
    assert "FOR UPDATE" not in PLAIN.still_held
    fence = (
        "d.event_id = u.event_id AND d.consumer_group = u.consumer_group AND d.claim_seq = u.claim_seq "
        "WHERE d.worker_id = $4::bigint AND d.status = 'running'"
    )
    assert fence in flat(PLAIN.still_held)


CLAIMS = ["claim", "claim_on", "claim_suspect", "claim_lost_once", "claim_limited", "claim_limited_suspect", "adopt"]


@pytest.mark.parametrize("name", CLAIMS)
def test_further_columns_are_returned_by_every_claim(name: str) -> None:
    selected = Statements("pgebus", ", e.tenant")
    assert texts(selected)[name] == texts(PLAIN)[name] + ", e.tenant"


@every_statement
def test_further_columns_are_returned_by_nothing_else(name: str) -> None:
    if name not in CLAIMS:
        assert texts(Statements("pgebus", ", e.tenant"))[name] == texts(PLAIN)[name]


# Names


ODD_SCHEMAS = ['Ev"ents', "events; DROP SCHEMA public", "o'brien", "a.b", "{s}", "$1", "e\\v", "ereignisse-ä", '"']


@pytest.mark.parametrize("schema", ODD_SCHEMAS)
def test_a_schema_is_quoted_wherever_it_stands(schema: str) -> None:
    quoted = quote_identifier(schema)
    expected = {name: text.replace('"pgebus".', f"{quoted}.") for name, text in texts(PLAIN).items()}
    assert texts(Statements(schema)) == expected


@every_statement
def test_no_table_of_ours_is_found_by_the_search_path(name: str) -> None:
    found = re.findall(
        r'(?<!\.)(?<!")\b(?:FROM|JOIN|UPDATE|INTO)\s+(?:pgebus\.)?'
        r"(events|deliveries|workers|subscriptions|consumer_groups)\b",
        texts(PLAIN)[name],
    )
    assert found == []


# The messages of the simple protocol, which knows no parameters


def literal(text: str) -> str:
    """Return what PostgreSQL reads in a string literal; fail when *text* is anything but one."""
    escaped = text.startswith(" E'")
    body = text[3:-1] if escaped else text[1:-1]
    assert text.endswith("'")
    assert escaped or text.startswith("'")
    assert re.fullmatch(r"(?:[^'\\]|''|\\\\)*" if escaped else r"(?:[^'\\]|'')*", body)
    return body.replace("''", "'").replace("\\\\", "\\") if escaped else body.replace("''", "'")


storable = st.text(st.characters(codec="utf-8", exclude_characters="\x00"))
spiteful = st.text("'\\; \"E$a\n", max_size=12)


@given(storable | spiteful)
def test_begin_quotes_its_marker(marker: str) -> None:
    message = Statements.begin("REPEATABLE READ", marker)
    head = "BEGIN ISOLATION LEVEL REPEATABLE READ READ WRITE; SET LOCAL pgebus.tx = "
    assert message.startswith(head)
    assert literal(message.removeprefix(head)) == marker


@given(st.sampled_from(["pgebus", *ODD_SCHEMAS]), storable | spiteful)
def test_end_quotes_everything(schema: str, text: str) -> None:
    statements = Statements(schema)
    for of_group, (group, marker) in [(True, (text, "m")), (False, ("g", text))]:
        message = statements.end(12, group, 3, 45, marker)
        # Of five arguments, where there is nothing to forget.
        assert statements.end(12, group, 3, 45, marker, forget=True) == message[: -len("); COMMIT")] + ", true); COMMIT"
        # A handler may have taken another role; the completion is the worker's.
        head, tail = f"RESET ROLE; SELECT {quote_identifier(schema)}.complete(12, ", "); COMMIT"
        assert message.startswith(head)
        assert message.endswith(tail)
        inner = message.removeprefix(head).removesuffix(tail)
        if of_group:
            assert inner.endswith(", 3, 45, 'm'")
            assert literal(inner.removesuffix(", 3, 45, 'm'")) == text
        else:
            assert inner.startswith("'g', 3, 45, ")
            assert literal(inner.removeprefix("'g', 3, 45, ")) == text


def test_cleaning_up_is_a_transaction_of_its_own() -> None:
    """In the handlers' transaction, a ROLLBACK would bring back what was reset."""
    statements = [statement.strip() for statement in Statements.CLEAN.split(";")]
    assert statements[0] == "BEGIN"
    assert statements[-2:] == ["COMMIT", ""]
    assert {
        "RESET SESSION AUTHORIZATION",
        "RESET ROLE",
        "RESET ALL",
        "SELECT pg_catalog.pg_advisory_unlock_all()",
    } == set(statements[1:-2])


@pytest.mark.parametrize("place", [0, 2, 3])
def test_end_takes_numbers_for_numbers(place: int) -> None:
    arguments: list[object] = [12, "g", 3, 45, "m"]
    arguments[place] = "1); DROP SCHEMA public"
    with pytest.raises(ValueError, match="format code 'd'"):
        PLAIN.end(*arguments)  # type: ignore[arg-type]  # that is what the test is about
