"""Database URLs in the one form that SQLAlchemy's asyncpg dialect takes as it stands.

Pure: it connects to nothing, and resolves no name. No message holds a value of a URL: a password that was not
percent-encoded may turn up in every part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address
from typing import Final

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

DRIVER: Final = "postgresql+asyncpg"
DEFAULT_PORT: Final = 5432

_SCHEMES: Final = frozenset({"postgres", "postgresql", DRIVER})
_SSL_MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_TAKEN: Final = frozenset(
    {
        "gsslib",
        "krbsrvname",
        "passfile",
        "prepared_statement_cache_size",
        "ssl",
        "target_session_attrs",
    }
)
_CERTIFICATES: Final = "give connect_args={'ssl': an ssl.SSLContext}"
_ADVICE: Final = {
    "application_name": "set application_name",
    "connect_timeout": "set connect_timeout_seconds",
    "timeout": "set connect_timeout_seconds",
    "options": "give connect_args={'server_settings': {…}}",
    "channel_binding": "asyncpg has none; leave it out",
    "gssencmode": "asyncpg has none; leave it out",
    "sslcert": _CERTIFICATES,
    "sslkey": _CERTIFICATES,
    "sslrootcert": _CERTIFICATES,
    "sslcrl": _CERTIFICATES,
    "sslpassword": _CERTIFICATES,
    "sslnegotiation": "give connect_args={'direct_tls': True}",
}
_ENCODE: Final = (
    "percent-encode special characters in the password (@ is %40, / is %2F), "
    "and write several hosts as ?host=one,two&port=5432,5433"
)


def storable(text: str) -> bool:
    """Tell whether PostgreSQL can take *text*: no NUL and no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\x00" not in text


def is_host(host: str) -> bool:
    """Tell whether *host* is a name, an address without brackets, or the directory of a unix socket."""
    if not host or not storable(host) or "," in host:
        return False
    if host.startswith("/"):
        return True
    if ":" in host:
        try:
            return ip_address(host).version == 6
        except ValueError:
            return False
    return host.isprintable() and not set(host) & set(" /@?#[]\\")


def make_database_url(
    user: str | None, password: str | None, hosts: Sequence[str], port: int, database: str | None
) -> URL:
    """Return the URL made of these parts; several hosts share the port."""
    url = URL.create(DRIVER, user, password, database=database)
    return _with_hosts(url, hosts, [port] * len(hosts))


def parse_database_url(text: str) -> URL:
    """Return the PostgreSQL URL *text*, libpq's parameters translated for asyncpg.

    Raises:
        ValueError: If it is none, names another driver or has a parameter that would be lost.
    """
    scheme, separator, _ = text.partition("://")
    if not separator or not storable(text):
        raise ValueError("it is no URL; write postgresql://user:password@host:5432/database")
    if scheme not in _SCHEMES:
        if scheme.startswith("postgres"):
            raise ValueError(f"pgebus runs on asyncpg; begin the URL with 'postgresql://' or '{DRIVER}://'")
        raise ValueError("pgebus needs PostgreSQL; write postgresql://user:password@host:5432/database")
    url = _parsed(text)
    if url is None:
        raise ValueError(f"it cannot be parsed; {_ENCODE}")
    url = _parameters_as_parts(url.set(drivername=DRIVER))
    hosts, ports = _hosts_and_ports(url)
    return _with_hosts(url.set(query=_parameters(url)), hosts, ports)


def _parsed(text: str) -> URL | None:
    # What make_url() raises holds the text: it must not even become the context of our error.
    try:
        return make_url(text)
    except (ArgumentError, ValueError):
        return None


def _parameters_as_parts(url: URL) -> URL:
    """Move user, password and database to where SQLAlchemy hides or finds them."""
    user, password, database = url.username, url.password, url.database
    for name in ("user", "password", "database", "dbname"):
        value = url.query.get(name)
        if value is None:
            continue
        given = {"user": user, "password": password}.get(name, database)
        if given or not isinstance(value, str):
            raise ValueError(f"its {name!r} is given twice; keep one")
        if name == "user":
            user = value
        elif name == "password":
            password = value
        else:
            database = value
    return url.set(username=user, password=password, database=database).difference_update_query(
        ["user", "password", "database", "dbname"]
    )


def _parameters(url: URL) -> dict[str, str]:
    """Return the parameters but for host and port, checked, as asyncpg calls them."""
    parameters: dict[str, str] = {}
    for name, value in url.query.items():
        if name in {"host", "port"}:
            continue
        taken = "ssl" if name == "sslmode" else name
        if taken not in _TAKEN:
            advice = _ADVICE.get(name, "asyncpg does not take it from a URL; leave it out, or see connect_args")
            raise ValueError(f"its parameter {name!r} cannot be used: {advice}")
        if taken in parameters or not isinstance(value, str):
            raise ValueError(f"its parameter {name!r} is given twice; keep one")
        parameters[taken] = value
    if parameters.get("ssl", "prefer") not in _SSL_MODES:
        raise ValueError(f"its 'sslmode' must be one of {', '.join(_SSL_MODES)}")
    if not parameters.get("prepared_statement_cache_size", "0").isdecimal():
        raise ValueError("its 'prepared_statement_cache_size' must be a whole number")
    return parameters


def _hosts_and_ports(url: URL) -> tuple[list[str], list[int]]:
    hosts, ports = _listed(url, "host"), _listed(url, "port")
    if url.host and hosts:
        raise ValueError("its host is given twice, before the database and as a parameter; keep one")
    if url.port is not None and ports:
        raise ValueError("its port is given twice, before the database and as a parameter; keep one")
    hosts = hosts or ([url.host] if url.host else [])
    if url.port is not None:
        ports = [str(url.port)]
    elif not ports:
        # host=name:port is SQLAlchemy's own way to write several; an IPv6 address has more than one colon.
        pairs = [host.partition(":") if host.count(":") == 1 else (host, "", "") for host in hosts]
        hosts = [host for host, _, _ in pairs]
        ports = [port if colon else str(DEFAULT_PORT) for _, colon, port in pairs]
    if len(ports) == 1 and hosts:
        ports *= len(hosts)
    if not all(port.isdecimal() and len(port) < 6 and 1 <= int(port) <= 65535 for port in ports):
        raise ValueError("its port must be a number from 1 to 65535")
    if len(ports) != max(len(hosts), len(ports[:1])):
        raise ValueError("it has not as many ports as hosts; write ?host=one,two&port=5432,5433")
    if not all(is_host(host) for host in hosts):
        raise ValueError(f"its host is none; {_ENCODE}")
    return hosts, [int(port) for port in ports]


def _listed(url: URL, name: str) -> list[str]:
    value = url.query.get(name, ())
    return value.split(",") if isinstance(value, str) else list(value)


def _with_hosts(url: URL, hosts: Sequence[str], ports: Sequence[int]) -> URL:
    """Return *url* with its hosts where the dialect finds them: sockets and several hosts as parameters."""
    if len(hosts) == 1 and not hosts[0].startswith("/"):
        return url.set(host=hosts[0], port=ports[0])
    # Without any, asyncpg does as libpq: PGHOST, then the usual directories of sockets.
    parts = {"host": hosts, "port": [str(port) for port in ports]}
    query = {**url.query, **{name: ",".join(part) for name, part in parts.items() if part}}
    return URL.create(url.drivername, url.username, url.password, database=url.database, query=query)
