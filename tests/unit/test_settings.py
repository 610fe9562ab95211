from __future__ import annotations

import json
import logging
import os
import pickle
import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError
from sqlalchemy import URL, make_url
from sqlalchemy.dialects.postgresql.asyncpg import dialect as asyncpg_dialect

from pgebus.errors import ConfigurationError
from pgebus.settings import DatabaseSettings, EventSystemSettings, Settings

CANARY = "c4nary-s3cret"
NASTY = "@:/?#% &+=[]{}\\ ' \" ü€😀 %40 ${HOME} ;--"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of ours, and an empty working directory."""
    for name in os.environ:
        if name.upper().startswith("PGEBUS_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def database(**values: Any) -> DatabaseSettings:
    return DatabaseSettings.model_validate(values)


def connect_arguments(url: URL) -> dict[str, Any]:
    """What SQLAlchemy hands to asyncpg."""
    dialect: Any = asyncpg_dialect
    return dict(dialect().create_connect_args(url)[1])


# --- sources


def test_without_any_source_the_defaults_stand() -> None:
    settings = Settings()
    assert settings.database == DatabaseSettings()
    assert settings.event_system == EventSystemSettings()
    assert (settings.database.host, settings.database.port) == ("localhost", 5432)
    assert (settings.event_system.channel, settings.event_system.n_workers) == ("events", 5)


def test_dicts_are_taken_as_sections() -> None:
    settings = Settings(
        database={
            "host": "db",
            "port": 5432,
            "user": "u",
            "password": CANARY,
            "database": "d",
            "application_name": "pgebus",
            "schema": "pgebus",
        },
        event_system={"channel": "events", "n_workers": 5},
    )
    assert connect_arguments(settings.database.sqlalchemy_url()) == {
        "host": "db",
        "port": 5432,
        "user": "u",
        "password": CANARY,
        "database": "d",
    }


def test_sections_are_taken_as_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGEBUS_DATABASE__HOST", "elsewhere")
    given = DatabaseSettings(host="here", schema="x")
    assert Settings(database=given).database == given


def test_the_retention_of_event_types_comes_from_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The pattern of an earlier source wins, and the others are there beside it."""
    toml = tmp_path / "pgebus.toml"
    toml.write_text(
        "[event_system]\ndead_retention_seconds = 60\n"
        '[event_system.retention]\n"audit.#" = 31536000\n"noise.*" = 60\n"law.#" = "none"\n'
    )
    monkeypatch.setenv("PGEBUS_CONFIG_FILE", str(toml))
    monkeypatch.setenv("PGEBUS_EVENT_SYSTEM__RETENTION", '{"noise.*": 0, "Audit.Login": null}')
    settings = Settings().event_system
    assert settings.retention == {"audit.#": 31536000, "noise.*": 0, "law.#": None, "Audit.Login": None}
    assert settings.dead_retention_seconds == 60
    assert settings.unhandled_retention_seconds == 365 * 24 * 3600
    assert EventSystemSettings().dead_retention_seconds is None


def test_an_earlier_source_wins_and_the_others_fill_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    toml = tmp_path / "pgebus.toml"
    toml.write_text(
        "[database]\nhost='toml'\nport=1\nuser='toml'\npassword='toml'\ndatabase='toml'\n"
        "[event_system]\nn_workers=7\nretention_seconds='none'\n"
    )
    monkeypatch.setenv("PGEBUS_CONFIG_FILE", str(toml))
    Path(".env").write_text("PGEBUS_DATABASE__HOST=dotenv\nPGEBUS_DATABASE__PORT=2\nPGEBUS_DATABASE__USER=dotenv\n")
    monkeypatch.setenv("PGEBUS_DATABASE__HOST", "environment")
    monkeypatch.setenv("pgebus_database__port", "3")
    settings = Settings(database={"host": "argument"})
    assert settings.database.host == "argument"
    assert settings.database.port == 3
    assert settings.database.user == "dotenv"
    assert settings.database.password == SecretStr("toml")
    assert settings.event_system.n_workers == 7
    assert settings.event_system.retention_seconds is None


def test_the_file_may_be_named_in_dotenv(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[database]\nhost='toml'\n")
    Path(".env").write_text("PGEBUS_CONFIG_FILE=a.toml\n")
    assert Settings().database.host == "toml"


def test_whole_sections_may_be_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGEBUS_DATABASE", json.dumps({"host": ["a", "b"], "schema": "s"}))
    monkeypatch.setenv("PGEBUS_DATABASE__CONNECT_ARGS", json.dumps({"statement_cache_size": 0}))
    settings = Settings().database
    assert (settings.host, settings.schema_name) == (["a", "b"], "s")
    assert settings.connect_args == {"statement_cache_size": 0}


@pytest.mark.parametrize("password", ["123", "null", "none", "true", '{"a": 1}', "[1]", NASTY, " "])
def test_a_password_in_the_environment_is_taken_literally(monkeypatch: pytest.MonkeyPatch, password: str) -> None:
    monkeypatch.setenv("PGEBUS_DATABASE__PASSWORD", password)
    assert Settings().database.password == SecretStr(password)


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGEBUS_DATABASE__PASSWORD", "")
    monkeypatch.setenv("PGEBUS_EVENT_SYSTEM__N_WORKERS", "")
    assert Settings() == Settings(database={}, event_system={})
    assert Settings().database.password is None


def test_variables_of_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("SECRET_KEY=x\nDATABASE__HOST=x\nHOST=x\nPGEBUS=1\nPGEBUS_TEST_URL=x\nexport A=1\n")
    monkeypatch.setenv("DATABASE", "not json")
    monkeypatch.setenv("DATABASE__HOST", "x")
    monkeypatch.setenv("PGEBUS_TEST_URL", "x")
    monkeypatch.setenv("PGEBUSES__X", "x")
    assert Settings() == Settings(database=DatabaseSettings(), event_system=EventSystemSettings())


def test_a_directory_called_dotenv_is_no_file() -> None:
    Path(".env").mkdir()
    assert Settings().database.host == "localhost"


@pytest.mark.parametrize(
    "name",
    [
        "PGEBUS_DATABASE__HOTS", "PGEBUS_DATABASE_HOST", "PGEBUS_EVENT_SYSTEM_CHANNEL",
        "PGEBUS_DATABSE__HOST",
        "PGEBUS_EVENT_SYSTEM__WORKERS", "PGEBUS__HOST", "PGEBUS_DATABASE__", "PGEBUS_DATABASE__HOST__X",
        "PGEBUS_DATABASE___HOST",
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["environment", ".env"])
def test_a_mistyped_variable_of_ours_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, where: str) -> None:
    if where == "environment":
        monkeypatch.setenv(name, CANARY)
    else:
        Path(".env").write_text(f"{name}={CANARY}\n")
    with pytest.raises(ConfigurationError) as caught:
        Settings()
    assert CANARY not in str(caught.value)


def test_nothing_is_read_before_instantiation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGEBUS_DATABASE__HOST", "one")
    assert Settings().database.host == "one"
    monkeypatch.setenv("PGEBUS_DATABASE__HOST", "two")
    assert Settings().database.host == "two"
    assert DatabaseSettings().host == "localhost"


@pytest.mark.parametrize(
    "content",
    [
        b"[database", b"host=", b"\xff\xfe", b"[database]\nhost='a'\nhost='b'", b"x=" + b"[" * 100_000,
        b"#" * (1024 * 1024 + 1), b"[database]\nhots='a'", b"[databse]\nhost='a'",
        b"database='x'", b"host='a'",
        b"[event_system]\nn_workers=nan", b"[event_system]\npoll_interval_seconds=inf",
        b"[event_system]\nn_workers=true", b"[event_system]\nn_workers=2026-01-01",
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pgebus.toml"
    path.write_bytes(content)
    monkeypatch.setenv("PGEBUS_CONFIG_FILE", str(path))
    with pytest.raises(ConfigurationError):
        Settings()


def test_a_file_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("[")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing.toml", "broken.toml", "loop", "pipe", "."):
        monkeypatch.setenv("PGEBUS_CONFIG_FILE", str(tmp_path / name))
        with pytest.raises(ConfigurationError) as caught:
            Settings()
        assert repr(str(tmp_path / name)) in str(caught.value)


def test_a_byte_order_mark_and_a_symlink_are_harmless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbf[database]\nhost='toml'\n")
    (tmp_path / "link").symlink_to("a.toml")
    monkeypatch.setenv("PGEBUS_CONFIG_FILE", str(tmp_path / "link"))
    assert Settings().database.host == "toml"


def test_a_dotenv_that_is_no_text_is_refused() -> None:
    Path(".env").write_bytes(b"A=\xff\n")
    with pytest.raises(ConfigurationError, match=r"\.env"):
        Settings()


def test_broken_json_is_refused_without_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGEBUS_DATABASE", '{"password": "' + CANARY)
    with pytest.raises(ConfigurationError) as caught:
        Settings()
    assert CANARY not in _everything_said(caught.value)


# --- values


BAD_DATABASES: list[dict[str, Any]] = [
    {"host": ""}, {"host": None}, {"host": 1}, {"host": []}, {"host": [""]}, {"host": ["a", None]},
    {"host": b"a"},
    {"host": "a b"}, {"host": "a:5432"}, {"host": "[::1]"}, {"host": "u@h"}, {"host": "a/b"},
    {"host": "a\x00"},
    {"host": "/sockets/\x00"}, {"host": "a\n"}, {"host": "\ud800"}, {"host": "a,"},
    {"host": "h?sslmode=disable"},
    {"host": ["a,b"]}, {"host": "::zz"}, {"host": "postgresql://h/d"},
    {"port": 0}, {"port": -1}, {"port": 65536}, {"port": True}, {"port": 1.5}, {"port": "x"}, {"port": None},
    {"port": 2**63}, {"port": float("nan")}, {"port": ""}, {"port": [5432]},
    {"user": ""}, {"user": 1}, {"user": "a\x00"}, {"user": "\ud800"},
    {"password": 1}, {"password": "a\x00"}, {"password": "\ud800"},
    {"database": ""}, {"database": "a\x00"}, {"database": ["d"]},
    {"application_name": ""}, {"application_name": "x" * 64}, {"application_name": "é" * 32},
    {"application_name": "a\x00"}, {"application_name": None},
    {"schema": ""}, {"schema": "pg_x"}, {"schema": "x" * 64}, {"schema": None}, {"schema": 1},
    {"schema": "a\x00"},
    {"schema": "a", "schema_name": "a"},
    {"pool_size": 0}, {"pool_size": -1}, {"pool_size": True}, {"pool_size": 2**31}, {"pool_size": "many"},
    {"max_overflow": -1}, {"max_overflow": 1.5}, {"max_overflow": None},
    {"pool_timeout_seconds": -1}, {"pool_timeout_seconds": float("nan")}, {"pool_timeout_seconds": True},
    {"pool_recycle_seconds": -1}, {"pool_recycle_seconds": 0}, {"pool_recycle_seconds": float("inf")},
    {"pool_recycle_seconds": True},
    {"connect_timeout_seconds": 0}, {"connect_timeout_seconds": float("inf")},
    {"connect_timeout_seconds": 1e18},
    {"connect_args": None}, {"connect_args": []}, {"connect_args": {1: 2}}, {"connect_args": {"timeout": 3}},
    {"connect_args": {"password": "x"}}, {"connect_args": {"host": "x"}}, {"connect_args": {"dsn": "x"}},
    {"connect_args": {"server_settings": "x"}}, {"connect_args": {"server_settings": {"a": 1}}},
    {"connect_args": {"server_settings": {"application_name": "x"}}},
    {"url": "postgresql://h/d", "host": "h"}, {"url": "postgresql://h/d", "password": "p"},
    {"url": "postgresql://h/d", "port": 5432}, {"listen_url": "mysql://h"}, {"listen_url": ""},
    {"hots": "x"}, {"": 1},
]  # fmt: skip

BAD_URLS: list[Any] = [
    "", " ", "x", "h/d", "localhost:5432", "://", "postgresql:/h/d", 1, None.__class__,
    "mysql://h/d", "sqlite://", "sqlite+aiosqlite:///x", "http://h/d", "postgresql+psycopg://h/d",
    "postgresql+psycopg2://h/d", "postgres+asyncpg://h/d", "POSTGRESQL://h/d", " postgresql://h/d",
    "postgresql://h:x/d", "postgresql://h:0/d", "postgresql://h:99999/d", "postgresql://h:1,2/d",
    "postgresql://h1:1,h2:2/d", "postgresql://u:p@ss@h/d", "postgresql://h/d\x00", "postgresql://h/\ud800",
    "postgresql://h/d?sslmode=maybe", "postgresql://h/d?sslmode=require&ssl=require", "postgresql://h/d?ssl=true",
    "postgresql://h/d?sslmode=require&sslmode=disable", "postgresql://h/d?sslrootcert=x",
    "postgresql://h/d?options=-csearch_path%3Dx", "postgresql://h/d?application_name=x",
    "postgresql://h/d?connect_timeout=3", "postgresql://h/d?channel_binding=require", "postgresql://h/d?hots=x",
    "postgresql://h/d?statement_cache_size=0", "postgresql://h/d?prepared_statement_cache_size=x",
    "postgresql://h/d?host=x", "postgresql://h:1/d?port=2", "postgresql:///d?host=a,b&port=1,2,3",
    "postgresql:///d?host=a,b,c&port=1,2", "postgresql:///d?port=1,2", "postgresql:///d?host=a&port=x",
    "postgresql:///d?host=a&port=0", "postgresql:///d?host=a,&port=1", "postgresql:///d?host=a b",
    "postgresql:///d?host=a:x", "postgresql:///d?host=a:1&port=2", "postgresql://u@h/d?user=v",
    "postgresql://h/d?dbname=e", "postgresql://u:p@h/d?password=q",
]  # fmt: skip

NO_COUNT: list[Any] = [
    0,
    -1,
    1001,
    2**15,
    2**31,
    2**63,
    True,
    1.5,
    float("nan"),
    float("inf"),
    "x",
    None,
    [],
    b"",
]
NO_SECONDS: list[Any] = [
    -1, -0.5, float("nan"), float("inf"), float("-inf"), 1e18, 2**63, True, False, "x", "nan", []
]  # fmt: skip
BAD_SYSTEMS: list[dict[str, Any]] = [
    {"channel": ""}, {"channel": "x" * 64}, {"channel": "é" * 32}, {"channel": None}, {"channel": 1},
    {"channel": "a\x00"}, {"channel": "\ud800"},
    *({name: value} for name in ("n_workers", "max_attempts") for value in NO_COUNT),
    *(
        {name: value}
        for name in (
            "backoff_first_seconds", "backoff_ceiling_seconds", "poll_interval_seconds",
            "shutdown_timeout_seconds", "retention_seconds", "recovery_grace_seconds", "dead_retention_seconds",
            "unhandled_retention_seconds",
        )
        for value in NO_SECONDS
    ),
    *({"retention": {"audit.#": value}} for value in NO_SECONDS), {"retention": None}, {"retention": 60},
    *({"retention": {pattern: 60}} for pattern in ("", "audit.", "audit.a*", "a b", "x" * 256, "é", 1)),
    {"poll_interval_seconds": 0}, {"poll_interval_seconds": None}, {"recovery_grace_seconds": 0},
    {"shutdown_timeout_seconds": None}, {"backoff_first_seconds": 1000}, {"backoff_ceiling_seconds": 0.5},
    {"isolation_level": "AUTOCOMMIT"}, {"isolation_level": "READ UNCOMMITTED"}, {"isolation_level": None},
    {"workers": 1},
]  # fmt: skip


@pytest.mark.parametrize("bad", [*BAD_DATABASES, *({"url": url} for url in BAD_URLS)], ids=ascii)
def test_a_database_that_cannot_be_meant_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        database(**bad)
    with pytest.raises(ConfigurationError, match=r"^The settings are not valid\. database"):
        Settings(database=bad)


@pytest.mark.parametrize("bad", BAD_SYSTEMS, ids=ascii)
def test_an_event_system_that_cannot_be_meant_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EventSystemSettings(**bad)
    with pytest.raises(ConfigurationError, match=r"^The settings are not valid\. event_system"):
        Settings(event_system=bad)


@pytest.mark.parametrize("bad", ["x", 1, [], ("host", "h"), EventSystemSettings()])
def test_a_section_is_a_dict_or_its_own_class(bad: Any) -> None:
    with pytest.raises(ConfigurationError):
        Settings(database=bad)


def test_a_message_says_what_to_write() -> None:
    with pytest.raises(ConfigurationError, match=r"database\.url: .*'postgresql://' or 'postgresql\+asyncpg://'"):
        Settings(database={"url": "postgresql+psycopg://h/d"})
    with pytest.raises(ConfigurationError, match=r"connect_timeout_seconds"):
        Settings(database={"url": "postgresql://h/d?connect_timeout=5"})
    with pytest.raises(ConfigurationError, match=r"event_system\.channel: Channel '' has 0 bytes"):
        Settings(event_system={"channel": ""})


@pytest.mark.parametrize(
    ("good", "value"),
    [
        ({"retention_seconds": None}, None), ({"retention_seconds": "None"}, None),
        ({"retention_seconds": 0}, 0),
        ({"retention": {"audit.#": "none", "order.*": "60"}}, {"audit.#": None, "order.*": 60}),
        ({"dead_retention_seconds": 60}, 60), ({"unhandled_retention_seconds": "none"}, None),
        ({"n_workers": "7"}, 7), ({"backoff_first_seconds": 0, "backoff_ceiling_seconds": 0}, 0),
        ({"channel": "Größe"}, "Größe"), ({"isolation_level": "SERIALIZABLE"}, "SERIALIZABLE"),
    ],
)  # fmt: skip
def test_what_can_be_meant_is_taken(good: dict[str, Any], value: object) -> None:
    settings = EventSystemSettings(**good)
    assert getattr(settings, next(iter(good))) == value
    assert database(pool_recycle_seconds="none").pool_recycle_seconds is None
    assert database(pool_recycle_seconds=None).pool_recycle_seconds is None


def test_settings_cannot_be_changed() -> None:
    settings = Settings()
    for section, name in (
        (settings, "database"),
        (settings.database, "host"),
        (settings.event_system, "channel"),
    ):
        with pytest.raises(ValidationError):
            setattr(section, name, "x")


# --- URLs


@pytest.mark.parametrize(
    ("url", "arguments"),
    [
        ("postgres://h", {"host": "h", "port": 5432}),
        ("postgresql+asyncpg://u:p@h:1/d",
         {"host": "h", "port": 1, "user": "u", "password": "p", "database": "d"}),
        ("postgresql://[::1]:1/d", {"host": "::1", "port": 1, "database": "d"}),
        ("postgresql://[fe80::1%eth0]/d", {"host": "fe80::1%eth0", "port": 5432, "database": "d"}),
        ("postgresql://h/d?sslmode=require", {"host": "h", "port": 5432, "database": "d", "ssl": "require"}),
        ("postgresql://h/?port=7", {"host": "h", "port": 7, "database": ""}),
        ("postgresql://:7/d", {"port": 7, "database": "d"}),
        ("postgresql:///d", {"database": "d"}),
        ("postgresql:///d?host=/sockets/x&port=7", {"host": "/sockets/x", "port": 7, "database": "d"}),
        ("postgresql:///d?host=%2Fsockets%2Fx", {"host": "/sockets/x", "port": 5432, "database": "d"}),
        ("postgresql://:7/d?host=/sockets/x", {"host": "/sockets/x", "port": 7, "database": "d"}),
        ("postgresql:///d?host=a,b&port=1,2", {"host": ["a", "b"], "port": [1, 2], "database": "d"}),
        ("postgresql:///d?host=a,b&port=1", {"host": ["a", "b"], "port": [1, 1], "database": "d"}),
        ("postgresql:///d?host=a:1&host=b:2", {"host": ["a", "b"], "port": [1, 2], "database": "d"}),
        ("postgresql:///d?host=a,/sockets/x", {"host": ["a", "/sockets/x"], "port": [5432, 5432], "database": "d"}),
        ("postgresql:///?host=::1&port=1&user=u&dbname=d&password=p",
         {"host": "::1", "port": 1, "user": "u", "password": "p", "database": "d"}),
        ("postgresql://h/d?prepared_statement_cache_size=0&target_session_attrs=primary",
         {"host": "h", "port": 5432, "database": "d", "prepared_statement_cache_size": 0,
          "target_session_attrs": "primary"}),
    ],
)  # fmt: skip
def test_a_url_reaches_the_driver_as_it_was_meant(url: str, arguments: dict[str, Any]) -> None:
    for settings in (database(url=url), database(url=SecretStr(url)), database(listen_url=url)):
        given = settings.listen_sqlalchemy_url()
        assert given.drivername == "postgresql+asyncpg"
        assert connect_arguments(given) == {name: value for name, value in arguments.items() if value != ""}


@pytest.mark.parametrize(
    ("host", "arguments"),
    [
        ("::1", {"host": "::1", "port": 7}), ("10.0.0.1", {"host": "10.0.0.1", "port": 7}),
        ("/sockets/a dir", {"host": "/sockets/a dir", "port": 7}), (["a"], {"host": "a", "port": 7}),
        (["a", "b"], {"host": ["a", "b"], "port": [7, 7]}),
        ("a,b", {"host": ["a", "b"], "port": [7, 7]}),
        (["/sockets/x", "::1"], {"host": ["/sockets/x", "::1"], "port": [7, 7]}),
    ],
)  # fmt: skip
def test_a_host_reaches_the_driver_as_it_was_meant(host: Any, arguments: dict[str, Any]) -> None:
    assert connect_arguments(database(host=host, port=7).sqlalchemy_url()) == arguments


passwords = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1)


@given(passwords)
def test_any_password_comes_through_parts_and_url(password: str) -> None:
    parts = database(user="u", password=password, host="h", database="d").sqlalchemy_url()
    url = URL.create("postgresql", "u", password, "h", 1, "d")
    for given_url in (
        parts,
        make_url(parts.render_as_string(hide_password=False)),
        database(url=url.render_as_string(hide_password=False)).sqlalchemy_url(),
        database(url=url).sqlalchemy_url(),
    ):
        assert connect_arguments(given_url)["password"] == password


def test_listening_goes_the_usual_way_unless_it_is_told_another() -> None:
    assert database(host="h").listen_sqlalchemy_url().host == "h"
    both = database(url="postgresql://pool/d", listen_url="postgresql://direct/d")
    assert (both.sqlalchemy_url().host, both.listen_sqlalchemy_url().host) == ("pool", "direct")


# --- secrets


def _everything_said(error: BaseException) -> str:
    """All that a log or a report could show of *error*, but for the source lines of the test itself."""
    said = ["".join(traceback.format_exception_only(error))]
    link: BaseException | None = error
    while link is not None:
        said += [str(link), repr(link), repr(link.args), str(vars(link))]
        if isinstance(link, ValidationError):
            said += [str(link.errors()), link.json()]
        link = link.__cause__ or link.__context__
    return "\n".join(said)


@pytest.mark.parametrize(
    "values",
    [
        {"host": "h", "user": "u", "password": CANARY},
        {"url": f"postgresql://u:{CANARY}@h/d"},
        {"url": f"postgresql:///d?host=h&user=u&password={CANARY}"},
        {"listen_url": f"postgresql://u:{CANARY}@h/d"},
    ],
)
def test_settings_never_show_a_secret(values: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings(database=values)
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("test").debug("%s %r", settings, settings.database)
    urls = [settings.database.sqlalchemy_url(), settings.database.listen_sqlalchemy_url()]
    shown = [
        repr(settings), str(settings), str(settings.model_dump()), settings.model_dump_json(), caplog.text,
        str(settings.database.model_dump(mode="json")), str(urls), str(Settings.model_json_schema()),
    ]  # fmt: skip
    assert [text for text in shown if CANARY in text] == []
    assert any(url.password == CANARY for url in urls)


@pytest.mark.parametrize(
    "bad",
    [
        {"password": CANARY + "\x00"},
        {"password": CANARY, "port": "x"},
        {"password": [CANARY]},
        {"password": CANARY, "url": "postgresql://h/d"},
        {"url": f"postgresql+psycopg://u:{CANARY}@h/d"},
        {"url": f"postgresql://u:{CANARY}@h:{CANARY}/d"},
        {"url": f"postgresql://u:x@{CANARY}@h/d"},
        {"url": f"postgresql://u:{CANARY}@h/d?sslmode={CANARY}"},
        {"url": f"u:{CANARY}@h"},
        {"url": f"postgresql://u:{CANARY}@h/d?password=x"},
        {"connect_args": {"password": CANARY}},
        {"connect_args": CANARY},
        {"passwort": CANARY},
        {"schema": "", "password": CANARY},
    ],
)
def test_errors_never_show_a_secret(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        database(**bad)
    assert CANARY not in _everything_said(refused.value)
    with pytest.raises(ConfigurationError) as caught:
        Settings(database=bad)
    assert CANARY not in _everything_said(caught.value)


def test_a_refused_change_never_shows_a_secret() -> None:
    settings = DatabaseSettings()
    with pytest.raises(ValidationError) as caught:
        setattr(settings, "url", f"postgresql://u:{CANARY}@h/d")  # noqa: B010 - a type checker would refuse it
    assert CANARY not in _everything_said(caught.value)
    whole = Settings()
    with pytest.raises(ValidationError) as caught:
        setattr(whole, "database", {"password": CANARY})  # noqa: B010 - as above
    assert CANARY not in _everything_said(caught.value)


def test_connect_args_are_not_in_the_repr() -> None:
    assert CANARY not in repr(Settings(database={"connect_args": {"server_settings": {"app.key": CANARY}}}))


def test_settings_survive_pickle() -> None:
    settings = Settings(database={"password": CANARY, "schema": "x"})
    assert pickle.loads(pickle.dumps(settings)) == settings  # noqa: S301 - our own bytes


def test_who_beats_cannot_be_woken() -> None:
    assert EventSystemSettings(liveness="beat").notify == "auto"
    with pytest.raises(ValidationError, match="only polls"):
        EventSystemSettings(liveness="beat", notify="always")
