"""Reading Redis URLs, and the one table that classifies Redis errors by their code."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Final, Literal
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from orki_contract import errors

Role = Literal["event server", "store"]
"""What orki uses a server for; decides the wording and the classes of errors."""

_DEFAULT_PORT: Final = 6379
_CERT_REQS: Final = ("none", "optional", "required")
_BOOLEANS: Final = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_OPTIONS: Final = ("db", "ssl_ca_certs", "ssl_cert_reqs", "ssl_certfile", "ssl_check_hostname", "ssl_keyfile")


class GroupMissing(errors.EventsRefused):
    """The stream or its group does not exist: it was never created, or the server lost or destroyed it."""


class GroupExists(errors.EventsRefused):
    """The group exists already."""


class ScriptMissing(errors.LocalProtocolError):
    """The server does not have the script in its cache."""


class _Condition(Enum):
    """A kind of error; its value is the class for an event server and the class for a store."""

    UNAVAILABLE = errors.EventsUnavailable, errors.StoreUnavailable
    OUT_OF_MEMORY = errors.EventsOutOfMemory, errors.StoreFull
    READ_ONLY = errors.EventsReadOnly, errors.StoreUnavailable
    NOT_PERSISTING = errors.EventsNotPersisting, errors.StoreUnavailable
    LOADING = errors.EventsLoading, errors.StoreUnavailable
    FORBIDDEN = errors.EventsRefused, errors.StoreUnavailable
    WRONG_COMMAND = errors.EventsRefused, errors.LocalProtocolError
    SCRIPT_MISSING = ScriptMissing, ScriptMissing
    GROUP_MISSING = GroupMissing, GroupMissing
    GROUP_EXISTS = GroupExists, GroupExists

    def error(self, role: Role, message: str) -> errors.OrkiError:
        events, store = self.value
        kind: type[errors.OrkiError] = events if role == "event server" else store
        return kind(message)


_KEEP_LESS: Final[dict[Role, str]] = {
    "event server": "keep fewer events (orki streams tune)",
    "store": "shorten the retention of finished tasks",
}

# Error codes of Redis; `{less}` is the role's way to need less memory.
_CODES: Final[dict[str, tuple[_Condition, str]]] = {
    "OOM": (_Condition.OUT_OF_MEMORY, "is out of memory; raise maxmemory, or {less}"),
    "READONLY": (_Condition.READ_ONLY, "is a replica and takes no writes; use the URL of the primary"),
    "MASTERDOWN": (_Condition.READ_ONLY, "is a replica that lost its primary"),
    "NOREPLICAS": (_Condition.READ_ONLY, "has fewer replicas than min-replicas-to-write requires"),
    "MISCONF": (_Condition.NOT_PERSISTING, "cannot write to its disk; check its log and the free space"),
    "LOADING": (_Condition.LOADING, "is still loading its data; wait"),
    "CLUSTERDOWN": (_Condition.UNAVAILABLE, "is part of a cluster that does not serve this key's slot"),
    "TRYAGAIN": (_Condition.UNAVAILABLE, "is moving this key's slot; wait"),
    "BUSY": (_Condition.UNAVAILABLE, "is running a long script; wait, or stop it with SCRIPT KILL"),
    "NOAUTH": (_Condition.FORBIDDEN, "requires a password"),
    "WRONGPASS": (_Condition.FORBIDDEN, "rejects this user and password"),
    "NOPERM": (_Condition.FORBIDDEN, "denies this user the command or the key; extend the user's ACL"),
    "NOGROUP": (_Condition.GROUP_MISSING, "does not have the stream or its group"),
    "UNBLOCKED": (_Condition.GROUP_MISSING, "lost the stream while a read waited on it"),
    "BUSYGROUP": (_Condition.GROUP_EXISTS, "has this group already"),
    "NOSCRIPT": (_Condition.SCRIPT_MISSING, "does not have the script"),
    "WRONGTYPE": (
        _Condition.WRONG_COMMAND,
        "holds a value of another type under this key; use another database or delete the key",
    ),
    "MOVED": (_Condition.FORBIDDEN, "is part of a cluster (redis+cluster://…) whose other node has this key"),
    "ASK": (_Condition.FORBIDDEN, "is part of a cluster that is moving this key's slot; wait"),
    "CROSSSLOT": (_Condition.WRONG_COMMAND, "is part of a cluster and has the command's keys in different slots"),
}
# Before Redis 7, an error inside a script is an ERR reply that quotes the error of the failed command.
_IN_SCRIPT: Final = re.compile(r"@user_script: ?\d+: -?([A-Z]+) ")


@dataclass(frozen=True, slots=True)
class Address:
    """A Redis server and the credentials to use.

    Attributes:
        role: What orki uses the server for.
        location: `HOST:PORT`, or the path of the Unix socket.
        url: The URL without user, password and TLS options.
        settings: Arguments for redis-py's connection; hidden from `repr` since they hold the password.
        tls: Whether the connection is encrypted.
        seeds: Host and port of each known node of a cluster, or of each sentinel; empty for a single server.
        service: Name under which the sentinels watch the server; empty for a cluster and a single server.
    """

    role: Role
    location: str
    url: str
    settings: dict[str, Any] = field(repr=False)
    tls: bool = False
    seeds: tuple[tuple[str, int], ...] = ()
    service: str = ""

    @property
    def is_cluster(self) -> bool:
        return bool(self.seeds) and not self.service

    def at(self, host: str, port: int) -> Address:
        """Return the address of one server of several, with the same credentials."""
        location = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        settings = {**self.settings, "host": host, "port": port}
        return replace(self, location=location, settings=settings, seeds=(), service="")

    @property
    def shown(self) -> str:
        """Description of the server for messages, such as `the store at 127.0.0.1:6379`."""
        return f"the {self.role} at {self.location}"

    def error(self, text: str) -> errors.OrkiError:
        """Return the error for an error reply of the server.

        Args:
            text: The reply with its code, such as `OOM command not allowed …`. A script may have returned it as data.
        """
        inside = _IN_SCRIPT.search(text)
        code = inside[1] if inside else text.partition(" ")[0]
        if code not in _CODES and "max number of clients" in text:
            return self.unavailable("it has no free connection (maxclients)")
        condition, sentence = _CODES.get(code, (_Condition.WRONG_COMMAND, "refused a command"))
        message = f"{self.shown} {sentence.format(less=_KEEP_LESS[self.role])} ({text.strip()})"
        return condition.error(self.role, message)

    def unavailable(self, cause: str) -> errors.OrkiError:
        """Return the error for a connection that cannot be opened, broke or timed out."""
        return _Condition.UNAVAILABLE.error(self.role, f"{self.shown} does not answer: {cause}")


def parse_address(
    url: str, *, role: Role = "event server", username: str | None = None, password: str | None = None
) -> Address:
    """Read `redis://[USER:PASSWORD@]HOST[:PORT][/DB]`, `rediss://…` (TLS) or `unix://[USER:PASSWORD@]/PATH`.

    Several servers are read as `redis+cluster://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]…]`, some nodes of a cluster (a
    store only), and `redis+sentinel://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]…]/SERVICE[/DB]`, sentinels, which are
    asked without a password; or with `rediss+…`.

    Options after `?`: `db`, and with `rediss://` `ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile` (paths),
    `ssl_cert_reqs` (none, optional or required) and `ssl_check_hostname` (true or false).

    Args:
        url: The URL. Error messages do not repeat it, because a malformed one may expose its password.
        role: What orki uses the server for.
        username: The user, if the URL does not contain it.
        password: The password, if the URL does not contain it.

    Raises:
        InvalidSetting: The URL is malformed or has an unknown option.
    """
    subject = f"the {role}'s URL"
    if several := re.fullmatch(r"(rediss?)\+(cluster|sentinel)://(?:(.*)@)?([^@/?]*)/?([^?]*)(\?.*)?", url):
        return _parse_several(subject, role, several.groups(default=""), username, password)
    split, host = _split(subject, url)
    settings = _options(subject, split)
    if split.scheme == "unix":
        location = unquote(split.path)
        if split.netloc.rpartition("@")[2] or len(location) < 2 or "\0" in location:
            raise errors.InvalidSetting(f"{subject} must have the form unix:///PATH")
        settings["path"] = location
        public = f"unix://{split.path}" + (f"?db={settings['db']}" if "db" in settings else "")
    else:
        _read_database(subject, split, settings)
        settings["host"], settings["port"] = host or "localhost", split.port or _DEFAULT_PORT
        location = f"[{host}]:{settings['port']}" if ":" in host else f"{settings['host']}:{settings['port']}"
        public = f"{split.scheme}://{location}" + (f"/{settings['db']}" if "db" in settings else "")
    settings["username"] = username if username is not None else unquote(split.username or "") or None
    settings["password"] = password if password is not None else unquote(split.password or "") or None
    return Address(role, location, public, settings, split.scheme == "rediss")


def _split(subject: str, url: str) -> tuple[SplitResult, str]:
    """Return the parts of a URL of one server, and its host without percent-encoding."""
    if not url.startswith(("redis://", "rediss://", "unix://")):
        raise errors.InvalidSetting(
            f"{subject} must begin with redis://, rediss:// or unix:// (as in redis://127.0.0.1:6379/0), or with "
            "redis+cluster:// or redis+sentinel:// for several servers"
        )
    if re.search(r"[\x00-\x20\x7f]", url):
        raise errors.InvalidSetting(f"{subject} contains a space or a control character; percent-encode it")
    malformed = errors.InvalidSetting(
        f"{subject} cannot be read: the host or the port is invalid, there is a fragment (#…), an option has no =, or "
        "a special character in the user, password or path is not percent-encoded"
    )
    try:
        split = urlsplit(url)
        host = unquote(split.hostname or "").lower()
        host.encode("idna")
        invalid = split.port == 0
        if split.query:
            parse_qsl(split.query, keep_blank_values=True, strict_parsing=True)
    except ValueError:
        # `from None`: the message of urllib quotes a part of the URL that may be the password.
        raise malformed from None
    # An `@` after the host belongs to a user or password with an unencoded `/`, `?` or `#`.
    if invalid or split.fragment or "@" in split.path + split.query or re.search(r"[^\w.:-]", host):
        raise malformed
    return split, host


def _parse_several(
    subject: str, role: Role, parts: tuple[str | Any, ...], username: str | None, password: str | None
) -> Address:
    """Return the address of a cluster or of the server behind sentinels, from the parts of its URL."""
    scheme, kind, user, hosts, path, options = parts
    service, database = "", path
    if kind == "sentinel":
        service, _, database = path.partition("/")
        if not re.fullmatch(r"[\w.-]+", service):
            raise errors.InvalidSetting(f"{subject} must name the service, as in redis+sentinel://HOST:26379/SERVICE")
    elif role != "store":
        raise errors.InvalidSetting(
            f"{subject} names a cluster, and the event plane needs a single server: give it one with --events or "
            "ORKI_EVENTS_URL"
        )
    default = "26379" if service else str(_DEFAULT_PORT)
    members = [
        parse_address(f"{scheme}://{host if re.search(r':[0-9]+$', host) else f'{host}:{default}'}", role=role)
        for host in hosts.split(",")
    ]
    login = f"{user}@" if user else ""
    place = f"{scheme}://{login}{members[0].location}/{database}{options}"
    first = parse_address(place, role=role, username=username, password=password)
    if first.settings.get("db", 0) and not service:
        raise errors.InvalidSetting(f"{subject} names a database, and a cluster has only database 0")
    location = ",".join(member.location for member in members)
    public = f"{scheme}+{kind}://{location}" + (f"/{service}" if service else "")
    public += f"/{first.settings['db']}" if service and "db" in first.settings else ""
    return replace(
        first,
        location=f"{service}@{location}" if service else location,
        url=public,
        seeds=tuple((member.settings["host"], member.settings["port"]) for member in members),
        service=service,
    )


def _options(subject: str, split: SplitResult) -> dict[str, Any]:
    pairs = parse_qsl(split.query, keep_blank_values=True)
    query = dict(pairs)
    if len(query) < len(pairs):
        raise errors.InvalidSetting(f"{subject} has an option twice")
    settings: dict[str, Any] = {}
    for name, value in query.items():
        if name not in _OPTIONS:
            # Another text may be a part of a password with an unencoded `?`.
            shown = f' "{name}"' if re.fullmatch(r"[a-z_]+", name) else ""
            raise errors.InvalidSetting(f"{subject} has an unknown option{shown} (known: {', '.join(_OPTIONS)})")
        if name.startswith("ssl_") and split.scheme != "rediss":
            raise errors.InvalidSetting(f"{subject} has the option {name}, which requires rediss://")
        if name == "db":
            settings["db"] = _database(subject, value)
        elif name == "ssl_check_hostname":
            if value.lower() not in _BOOLEANS:
                raise errors.InvalidSetting(f"{subject} has an invalid ssl_check_hostname; it must be true or false")
            settings[name] = _BOOLEANS[value.lower()]
        elif name == "ssl_cert_reqs":
            if value not in _CERT_REQS:
                raise errors.InvalidSetting(
                    f"{subject} has an invalid ssl_cert_reqs; it must be one of {', '.join(_CERT_REQS)}"
                )
            settings[name] = value
        elif not value or "\0" in value:
            raise errors.InvalidSetting(f"{subject} has the option {name} without a path")
        else:
            settings[name] = value
    return settings


def _read_database(subject: str, split: SplitResult, settings: dict[str, Any]) -> None:
    path = unquote(split.path).strip("/")
    if path:
        database = _database(subject, path)
        if settings.setdefault("db", database) != database:
            raise errors.InvalidSetting(f"{subject} names two databases")


def _database(subject: str, value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise errors.InvalidSetting(f"{subject} must end in the number of a database, as in redis://127.0.0.1:6379/0")
    return int(value)
