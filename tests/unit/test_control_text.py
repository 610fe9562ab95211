"""Which statements count as transaction control, whatever surrounds their words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgebus._control_text import find_control, sets_marker

CONTROL = {
    "ABORT": "ABORT",
    "BEGIN": "BEGIN",
    "BEGIN ISOLATION LEVEL SERIALIZABLE": "BEGIN",
    "COMMIT": "COMMIT",
    "COMMIT AND CHAIN": "COMMIT",
    "COMMIT PREPARED 'a'": "COMMIT",
    "COMMIT WORK": "COMMIT",
    "DISCARD ALL": "DISCARD",
    "END": "END",
    "END TRANSACTION": "END",
    "PREPARE TRANSACTION 'a'": "PREPARE TRANSACTION",
    "RELEASE SAVEPOINT a": "RELEASE",
    "RELEASE a": "RELEASE",
    "RESET ALL": "RESET ALL",
    "RESET pgebus.tx": "RESET PGEBUS",
    "ROLLBACK": "ROLLBACK",
    "ROLLBACK PREPARED 'a'": "ROLLBACK",
    "ROLLBACK TO SAVEPOINT a": "ROLLBACK",
    "SAVEPOINT a": "SAVEPOINT",
    'SET "pgebus.tx" = 1': 'SET "PGEBUS.TX"',
    "SET LOCAL pgebus.tx = ''": "SET LOCAL PGEBUS",
    'SET LOCAL "pgebus".tx TO x': 'SET LOCAL "PGEBUS"',
    "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY": "SET SESSION CHARACTERISTICS",
    "SET SESSION pgebus.tx = 1": "SET SESSION PGEBUS",
    "SET TRANSACTION READ ONLY": "SET TRANSACTION",
    "SET LOCAL TRANSACTION ISOLATION LEVEL SERIALIZABLE": "SET LOCAL TRANSACTION",
    "SET TRANSACTION SNAPSHOT 'a'": "SET TRANSACTION",
    "SET transaction_isolation = serializable": "SET TRANSACTION_ISOLATION",
    "SET LOCAL transaction_read_only = on": "SET LOCAL TRANSACTION_READ_ONLY",
    "START TRANSACTION": "START",
}
ORDINARY = [
    "",
    " ; ",
    "-- commit",
    "-- commit\nSELECT 1",
    "/* commit */ SELECT 1",
    "/* /* commit */ commit */ SELECT 1",
    "/* unfinished commit",
    "SELECT 'commit'",
    "SELECT 1 /* ; commit */",
    'INSERT INTO begin VALUES (1) RETURNING "end"',
    "INSERT INTO t SELECT 1; -- commit",
    "WITH rollback AS (SELECT 1) SELECT * FROM rollback",
    "UPDATE savepoints SET release = 1",
    "(SELECT 1) UNION (SELECT 2)",
    '"commit"',
    "'commit'",
    "committed",
    "commit_all()",
    "begin2",
    "PREPARE plan AS SELECT 1",
    "PREPARE",
    "SET",
    "SET LOCAL",
    "SET LOCAL statement_timeout = 1",
    "SET LOCAL transaction_timeout = '5s'",
    "SET search_path = pgebus",
    "SET CONSTRAINTS ALL DEFERRED",
    "SET SESSION AUTHORIZATION DEFAULT",
    "SET TIME ZONE 'UTC'",
    "RESET statement_timeout",
    "SELECT set_config('app.user', 'a', true)",
    "COPY begin FROM STDIN",
    "DO $$ BEGIN PERFORM 1; END $$",
    "CALL start()",
    "LOCK TABLE release",
]


@pytest.mark.parametrize(("statement", "words"), CONTROL.items())
def test_control_is_found(statement: str, words: str) -> None:
    assert find_control(statement) == words


@pytest.mark.parametrize("statement", ORDINARY)
def test_an_ordinary_statement_is_none(statement: str) -> None:
    assert find_control(statement) is None


# Text that must not look like the beginning or the end of a comment, nor end one.
_inside = st.text(alphabet=st.sampled_from("abc commit;'\"$\t-"), max_size=12)
_block_comment = st.recursive(
    _inside.map(lambda text: f"/*{text}*/"),
    lambda inner: st.tuples(_inside, inner, _inside).map(lambda parts: f"/*{parts[0]} {parts[1]} {parts[2]}*/"),
    max_leaves=4,
)
_line_comment = st.tuples(_inside, st.sampled_from(["\n", "\r", "\r\n"])).map(lambda parts: f"--{parts[0]}{parts[1]}")
_white_space = st.text(alphabet=" \t\n\r\f\v", min_size=1, max_size=4)
_blank = _block_comment | _line_comment | _white_space
_blanks = st.lists(_blank, max_size=4).map("".join)
_some_blanks = st.lists(_blank, min_size=1, max_size=4).map("".join)
_lead = st.lists(_blank | st.sampled_from([";", "\ufeff"]), max_size=5).map("".join)


@st.composite
def _disguised(draw: st.DrawFn, statement: str) -> str:
    """Draw *statement* in any case, with anything that PostgreSQL skips before, between and after its words."""
    words = [
        "".join(draw(st.sampled_from([letter.lower(), letter.upper()])) for letter in word)
        for word in statement.split()
    ]
    text = draw(_lead) + words[0]
    for word in words[1:]:
        text += draw(_some_blanks) + word
    return text + draw(_blanks | st.just(";"))


@given(st.data())
def test_control_is_found_in_any_disguise(data: st.DataObject) -> None:
    statement = data.draw(st.sampled_from(sorted(CONTROL)))
    disguised = data.draw(_disguised(statement))
    assert find_control(disguised) == CONTROL[statement]


@given(st.data())
def test_an_ordinary_statement_stays_ordinary_in_any_disguise(data: st.DataObject) -> None:
    statement = data.draw(
        st.sampled_from(
            ["SELECT 1", "INSERT INTO commit VALUES (1)", "WITH begin AS (SELECT 1) SELECT 2", "SET LOCAL a = b"]
        )
    )
    assert find_control(data.draw(_disguised(statement))) is None


@given(st.text())
def test_any_text_is_judged(text: str) -> None:
    find_control(text)
    sets_marker(text, None)


def test_long_comments_take_no_long_time() -> None:
    assert find_control("/*" * 100_000) is None
    assert find_control("--x\n" * 100_000 + "commit") == "COMMIT"


@pytest.mark.parametrize(
    ("statement", "parameters"),
    [
        ("SELECT set_config('pgebus.tx', '', true)", ()),
        ("SELECT pg_catalog.SET_CONFIG('Pgebus.Tx', '', true)", ()),
        ("SELECT set_config($1, $2, $3)", ("pgebus.tx", "", True)),
        ("SELECT set_config($1, $2, $3)", [("PGEBUS.tx", "", True)]),
    ],
)
def test_the_marker_cannot_be_set_by_function(statement: str, parameters: object) -> None:
    assert sets_marker(statement, parameters)


@pytest.mark.parametrize(
    ("statement", "parameters"),
    [
        ("SELECT set_config('app.user', 'a', true)", ()),
        ("SELECT current_setting('pgebus.tx')", ()),
        ("INSERT INTO pgebus.events (type) VALUES ($1)", ("pgebus.tx",)),
    ],
)
def test_other_settings_are_free(statement: str, parameters: object) -> None:
    assert not sets_marker(statement, parameters)
