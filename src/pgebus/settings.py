"""What a user can set, from arguments, the environment, the file `.env` and a TOML file.

Nothing is read before a class is instantiated, and nothing connects.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)
from sqlalchemy import URL

from pgebus._sources import CONFIG_FILE, PREFIX, our_variables, read_toml
from pgebus._urls import DEFAULT_PORT, is_host, make_database_url, parse_database_url, storable
from pgebus.errors import ConfigurationError
from pgebus.groups import check_group_name
from pgebus.names import MAX_IDENTIFIER_BYTES, check_channel, check_schema
from pgebus.patterns import check_pattern

__all__ = ["DatabaseSettings", "EventSystemSettings", "Settings"]

_DAY: Final = 24 * 3600.0
_TEN_YEARS: Final = 3650 * _DAY


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is no number")
    return value


def _none_as_text(value: object) -> object:
    """Let `none` be written where there is no null: in the environment and in TOML."""
    return None if isinstance(value, str) and value.strip().lower() == "none" else value


def _check_name(value: str) -> str:
    if not value or not storable(value):
        raise ValueError(f"{value!r} is empty or holds characters that PostgreSQL cannot take")
    return value


def _check_application_name(value: str) -> str:
    size = len(_check_name(value).encode())
    if size > MAX_IDENTIFIER_BYTES:  # PostgreSQL would cut it without an error
        raise ValueError(f"it has {size} bytes in UTF-8; at most {MAX_IDENTIFIER_BYTES} are allowed")
    return value


def _check_password(value: SecretStr) -> SecretStr:
    if not storable(value.get_secret_value()):
        raise ValueError("it holds NUL or a lone surrogate, which PostgreSQL cannot take")
    return value


def _check_host(value: object) -> str | list[str]:
    """Return one host or a list of them; commas separate hosts, as they do for libpq."""
    hosts = value.split(",") if isinstance(value, str) else value
    if (
        not isinstance(hosts, (list, tuple))
        or not hosts
        or not all(isinstance(host, str) and is_host(host) for host in hosts)
    ):
        raise ValueError(
            "it must be a name, an IP address without brackets, the absolute directory of a unix socket, "
            "or a list of these; the port has a setting of its own"
        )
    return hosts[0] if len(hosts) == 1 else list(hosts)


def _url_text(value: object) -> object:
    return value.render_as_string(hide_password=False) if isinstance(value, URL) else value


def _check_url(value: SecretStr) -> SecretStr:
    parse_database_url(value.get_secret_value())
    return value


def _check_connect_args(value: dict[str, Any]) -> dict[str, Any]:
    """Refuse what has a setting of its own: a decision has one place, and a password is a SecretStr."""
    own = {"timeout": "connect_timeout_seconds", "dsn": "url"}
    for name in ("host", "port", "user", "password", "database", *own):
        if name in value:
            raise ValueError(f"{name!r} has a setting of its own; set {own.get(name, name)} instead")
    server_settings = value.get("server_settings", {})
    if not isinstance(server_settings, dict) or not all(
        isinstance(text, str) for item in server_settings.items() for text in item
    ):
        raise ValueError("'server_settings' must be a dict of texts")
    if "application_name" in server_settings:
        raise ValueError("'application_name' has a setting of its own; set application_name instead")
    return value


Whole = Annotated[int, BeforeValidator(_no_bool)]
Seconds = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Kept = Annotated[
    Annotated[Seconds, Field(ge=0, le=_TEN_YEARS)] | None,
    BeforeValidator(_none_as_text),
]
Secret = Annotated[SecretStr, AfterValidator(_check_password)]
SecretURL = Annotated[SecretStr, AfterValidator(_check_url), BeforeValidator(_url_text)]
Name = Annotated[str, AfterValidator(_check_name)]


class _Frozen(BaseModel):
    if not TYPE_CHECKING:  # a type checker knows what is frozen, and would take any name to be writable

        def __setattr__(self, name: str, value: object) -> None:
            # pydantic's own refusal shows the value, whatever hide_input_in_errors says.
            super().__setattr__(name, None if name in type(self).model_fields else value)


class _Section(_Frozen):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, populate_by_name=True)

    @classmethod
    def _without_input(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Validate, and take the input out of the error, whose errors() and json() would hold a password."""
        try:
            return handler(data)
        except ValidationError as error:
            problems = error.errors(include_url=False, include_context=False)
        details: list[InitErrorDetails] = [
            {
                "type": PydanticCustomError(problem["type"], problem["msg"].removeprefix("Value error, ")),
                "loc": problem["loc"],
                "input": None,
            }
            for problem in problems
        ]
        raise ValidationError.from_exception_data(cls.__name__, details, hide_input=True)


class DatabaseSettings(_Section):
    """How to reach PostgreSQL: a URL or its parts, the schema, and the pool.

    Raises:
        pydantic.ValidationError: A ValueError, when a value cannot be used; it holds no input.
    """

    url: SecretURL | None = None
    """`postgresql://…`, instead of host, port, user, password and database; `?sslmode=` and `?host=` work."""
    host: Annotated[str | list[str], BeforeValidator(_check_host)] = "localhost"
    """A name, an address, the directory of a unix socket (`/…`), or several: the first that answers."""
    port: Whole = Field(default=DEFAULT_PORT, ge=1, le=65535)
    """The port of every host."""
    user: Name | None = None
    """The role; None leaves it to asyncpg (PGUSER, then the user of the operating system)."""
    password: Secret | None = None
    """The password; None leaves it to asyncpg (PGPASSWORD, then `~/.pgpass`)."""
    database: Name | None = None
    """The database; None leaves it to asyncpg (PGDATABASE, then the name of the user)."""
    application_name: Annotated[str, AfterValidator(_check_application_name)] = "pgebus"
    """What `pg_stat_activity` shows; at most 63 bytes."""
    schema_name: Annotated[str, BeforeValidator(check_schema)] = Field(default="pgebus", alias="schema")
    """The schema of the tables, given as `schema`."""
    pool_size: Whole = Field(default=5, ge=1, le=10_000)
    """Connections that the pool keeps."""
    max_overflow: Whole = Field(default=10, ge=0, le=10_000)
    """Connections that it opens beyond these, and closes when they come back."""
    pool_timeout_seconds: Seconds = Field(default=30.0, ge=0, le=_DAY)
    """Seconds to wait for a connection of the pool."""
    pool_recycle_seconds: Annotated[Seconds | None, BeforeValidator(_none_as_text)] = Field(
        default=None, ge=1, le=_TEN_YEARS
    )
    """Seconds after which a connection is replaced at its next use; None (or `none`): never."""
    connect_timeout_seconds: Seconds = Field(default=10.0, gt=0, le=3600)
    """Seconds that opening one connection may take."""
    connect_args: Annotated[dict[str, Any], AfterValidator(_check_connect_args)] = Field(default={}, repr=False)
    """More arguments for `asyncpg.connect`, for example `{"ssl": context, "server_settings": {…}}`."""
    listen_url: SecretURL | None = None
    """A URL that reaches PostgreSQL directly, for LISTEN, when the pool goes through PgBouncer. A worker whose
    `liveness` is `beat` does not use it."""

    @model_validator(mode="before")
    @classmethod
    def _one_schema(cls, data: object) -> object:
        if isinstance(data, Mapping) and "schema" in data and "schema_name" in data:
            raise ValueError("'schema' and 'schema_name' are the same setting; give one of them")
        return data

    @model_validator(mode="after")
    def _url_or_parts(self) -> DatabaseSettings:
        parts = ("host", "port", "user", "password", "database")
        given = [name for name in parts if name in self.model_fields_set and getattr(self, name) is not None]
        if self.url is not None and given:
            raise ValueError(f"'url' is given together with {', '.join(given)}; give the URL or its parts")
        return self

    # The last one, so that it is around the others.
    @model_validator(mode="wrap")
    @classmethod
    def _hide_input(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        return cls._without_input(data, handler)

    def sqlalchemy_url(self) -> URL:
        """Return the URL of the database for SQLAlchemy's asyncpg dialect; its repr hides the password."""
        if self.url is not None:
            return parse_database_url(self.url.get_secret_value())
        password = self.password.get_secret_value() if self.password is not None else None
        hosts = [self.host] if isinstance(self.host, str) else self.host
        return make_database_url(self.user, password, hosts, self.port, self.database)

    def listen_sqlalchemy_url(self) -> URL:
        """Return the URL of the connection that listens: `listen_url`, else the database's own."""
        if self.listen_url is None:
            return self.sqlalchemy_url()
        return parse_database_url(self.listen_url.get_secret_value())


class EventSystemSettings(_Section):
    """How events are handled: the channel, how many at once, retries, and the clocks of the machinery.

    Raises:
        pydantic.ValidationError: A ValueError, when a value cannot be used; it holds no input.
    """

    channel: Annotated[str, BeforeValidator(check_channel)] = "events"
    """The queue that is worked on; at most 63 bytes."""
    groups: Annotated[tuple[str, ...] | None, BeforeValidator(_none_as_text)] = None
    """The consumer groups that this process serves; None: all that its handlers are in."""
    n_workers: Whole = Field(default=5, ge=1, le=1000)
    """How many deliveries this process handles at once."""
    max_attempts: Whole = Field(default=10, ge=1, le=1000)
    """Executions, counted from 1, after which a delivery is a dead letter."""
    backoff_first_seconds: Seconds = Field(default=1.0, ge=0, le=_TEN_YEARS)
    """Seconds: the largest delay after the first failure; it doubles with each one that follows."""
    backoff_ceiling_seconds: Seconds = Field(default=900.0, ge=0, le=_TEN_YEARS)
    """Seconds: the largest delay of all; not less than `backoff_first_seconds`."""
    poll_interval_seconds: Seconds = Field(default=5.0, ge=0.01, le=3600)
    """Seconds after which a worker that was not woken looks by itself."""
    notify: Literal["auto", "always", "off"] = "auto"
    """When a publisher wakes this worker: `auto`, while it sleeps; `always`; or `off`, never, so that it only polls."""
    liveness: Literal["lock", "beat"] = "lock"
    """How others see that this worker lives: by a session-level advisory `lock`, gone milliseconds after its process;
    or by a `beat`, written each second and absent after 15: for a worker that reaches PostgreSQL only through a
    transaction pooler. Such a worker cannot LISTEN either: it only polls."""
    shutdown_timeout_seconds: Seconds = Field(default=30.0, ge=0, le=_DAY)
    """Seconds that the end of `async with` waits for what runs before it cancels; `stop()` has its own argument."""
    retention_seconds: Kept = 7 * _DAY
    """Seconds after which what is finished is deleted, completed or cancelled; None (or `none`): it is kept."""
    retention: dict[Annotated[str, AfterValidator(check_pattern)], Kept] = Field(default_factory=dict)
    """The same for some event types: patterns and their seconds, like `{"audit.#": 31536000}`. Of several that match a
    type the most specific one counts: the type itself, else word by word a word before `*` before `#`."""
    dead_retention_seconds: Kept = None
    """Seconds after which dead letters are deleted; None (or `none`): they are kept until somebody decides."""
    unhandled_retention_seconds: Kept = 365 * _DAY
    """Seconds after which events are deleted that no handler has taken, since they were due; None (or `none`): they
    are kept. This is the one case in which an event is lost without a handler, a used-up budget or a person."""
    recovery_grace_seconds: Seconds = Field(default=2.0, ge=0.01, le=3600)
    """Seconds that a worker may be gone before its deliveries are given to others."""
    isolation_level: Literal["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"] = "READ COMMITTED"
    """Of the handlers' transaction."""

    @field_validator("groups")
    @classmethod
    def _groups_are_named(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and not value:
            raise ValueError("names no group; leave it out to serve all of them")
        return None if value is None else tuple(dict.fromkeys(check_group_name(name) for name in value))

    @model_validator(mode="after")
    def _who_beats_only_polls(self) -> EventSystemSettings:
        if self.liveness == "beat" and self.notify == "always":
            raise ValueError("liveness='beat' means that this worker only polls; notify='always' would wake nobody")
        return self

    @model_validator(mode="after")
    def _backoff_grows(self) -> EventSystemSettings:
        if self.backoff_ceiling_seconds < self.backoff_first_seconds:
            raise ValueError(
                f"backoff_ceiling_seconds ({self.backoff_ceiling_seconds!r}) is less than "
                f"backoff_first_seconds ({self.backoff_first_seconds!r}); raise the ceiling"
            )
        return self

    # The last one, so that it is around the others.
    @model_validator(mode="wrap")
    @classmethod
    def _hide_input(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        return cls._without_input(data, handler)


class Settings(_Frozen, BaseSettings):
    """Everything that can be set, from several sources.

    Each value is taken from the first of: the arguments, the environment (`PGEBUS_DATABASE__HOST`), the file
    `.env` in the working directory, the TOML file that PGEBUS_CONFIG_FILE names (tables `[database]` and
    `[event_system]`), the defaults. So the host may come from the file and the password from the environment.
    An empty variable counts as not set; a list or a dict is written as JSON. An argument that is
    no dict but a finished `DatabaseSettings` or `EventSystemSettings` stands as it is.

    Args:
        database: A `DatabaseSettings`, or its fields as a dict.
        event_system: An `EventSystemSettings`, or its fields as a dict.

    Raises:
        ConfigurationError: If a value cannot be used, a name of ours is not known, or a file cannot be read.
            The text says where, and holds no password.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        env_file=".env",
        env_file_encoding="utf-8",
        env_ignore_empty=True,
    )

    database: DatabaseSettings = Field(default_factory=lambda: DatabaseSettings())
    event_system: EventSystemSettings = Field(default_factory=lambda: EventSystemSettings())

    def __init__(
        self,
        *,
        database: DatabaseSettings | Mapping[str, Any] | None = None,
        event_system: EventSystemSettings | Mapping[str, Any] | None = None,
    ) -> None:
        given = {"database": database, "event_system": event_system}
        values: dict[str, Any] = {
            name: dict(value) if isinstance(value, Mapping) else value
            for name, value in given.items()
            if value is not None
        }
        try:
            super().__init__(**values)
        except ValidationError as error:
            problem = _listed(error)
        except UnicodeDecodeError:
            problem = "The file .env is not UTF-8. Save it as UTF-8."
        except OSError as error:
            problem = f"The file {error.filename!r} cannot be read: {error.strerror}."
        except SettingsError as error:
            problem = f"The environment cannot be read: {error}."
        else:
            return
        # Outside of the handlers: the errors above hold the input, and would be the context of ours.
        raise ConfigurationError(problem)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the signature is pydantic's
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources; the first one that has a value wins."""
        sources = [init_settings, env_settings, dotenv_settings]
        path = os.environ.get(CONFIG_FILE)
        for source in (env_settings, dotenv_settings):
            assert isinstance(source, EnvSettingsSource)  # noqa: S101 - for the type checker
            path = path or source.env_vars.get(CONFIG_FILE.lower())
            source.env_vars = our_variables(source.env_vars, tuple(cls.model_fields))
        if path:
            sources.append(InitSettingsSource(settings_cls, init_kwargs=read_toml(Path(path))))
        return tuple(sources)


def _listed(error: ValidationError) -> str:
    problems = [
        f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].rstrip('.')}"
        for problem in error.errors(include_input=False, include_url=False, include_context=False)
    ]
    return "The settings are not valid. " + "; ".join(problems) + "."
