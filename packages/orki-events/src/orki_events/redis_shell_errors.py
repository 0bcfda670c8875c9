"""From what Redis and its client say to orki's typed errors: by the error's code, in one table."""

from __future__ import annotations

__all__ = ["GroupExists", "GroupMissing", "ScriptMissing", "refusal", "unavailable"]

from typing import Final

from redis.exceptions import (
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    BusyLoadingError,
    ConnectionError,
    RedisError,
    ResponseError,
)

from orki_contract.errors import (
    EventsLoading,
    EventsNotPersisting,
    EventsOutOfMemory,
    EventsReadOnly,
    EventsRefused,
    EventsUnavailable,
    OrkiError,
)


class GroupMissing(EventsRefused):
    """The stream, or its group, is not on the server: flushed, rolled back, evicted or destroyed."""


class GroupExists(EventsRefused):
    """The group was there already."""


class ScriptMissing(EventsRefused):
    """The server does not have the script in its cache."""


_HINTS: Final[dict[str, tuple[type[OrkiError], str]]] = {
    "OOM": (
        EventsOutOfMemory,
        "the event server is out of memory; raise maxmemory or keep less (orki streams tune)",
    ),
    "READONLY": (EventsReadOnly, "the event server is a replica; point the URL at the primary"),
    "MASTERDOWN": (EventsReadOnly, "the event server is a replica that lost its primary"),
    "NOREPLICAS": (EventsReadOnly, "the event server lost the replicas that min-replicas-to-write asks for"),
    "MISCONF": (EventsNotPersisting, "the event server cannot write to its disk; look at its log and free space"),
    "LOADING": (EventsLoading, "the event server still loads its data; wait"),
    "CLUSTERDOWN": (EventsUnavailable, "the cluster does not serve this key's slot"),
    "TRYAGAIN": (EventsUnavailable, "the cluster moves this key's slot"),
    "BUSY": (EventsUnavailable, "the event server runs a long script"),
    "NOGROUP": (GroupMissing, "the stream or its group is not on the event server"),
    "UNBLOCKED": (GroupMissing, "the stream vanished while a read waited on it"),
    "BUSYGROUP": (GroupExists, "the group exists already"),
    "NOSCRIPT": (ScriptMissing, "the event server does not have the script"),
    "NOAUTH": (EventsRefused, "the event server asks for a password"),
    "WRONGPASS": (EventsRefused, "the event server refuses this user and password"),
    "NOPERM": (EventsRefused, "the user lacks the permission for this command or key"),
    "WRONGTYPE": (EventsRefused, "the key holds something else than a stream; use another database or remove it"),
    "MOVED": (EventsRefused, "the event server is a cluster, which this version does not follow"),
    "ASK": (EventsRefused, "the event server is a cluster, which this version does not follow"),
    "CROSSSLOT": (EventsRefused, "the keys of one command lie in different slots of the cluster"),
}


def refusal(error: RedisError, where: str) -> OrkiError:
    """The typed error for an error reply.

    Args:
        error: As the client raised it.
        where: The server, for the message.
    """
    text = str(error)
    first = text.partition(" ")[0]
    code = error.status_code or (first if first.isupper() else "ERR")
    if isinstance(error, BusyLoadingError):
        code = "LOADING"
    elif isinstance(error, AuthenticationError | AuthenticationWrongNumberOfArgsError) and code not in _HINTS:
        code = "WRONGPASS"
    elif isinstance(error, ConnectionError) and code not in _HINTS:
        # Such as `ERR max number of clients reached`: an answer, yet of a server that takes no commands now.
        return unavailable(error, where)
    elif not isinstance(error, ResponseError | ConnectionError) and code not in _HINTS:
        return EventsUnavailable(f"{where} sent what is no answer: {text}")
    kind, hint = _HINTS.get(code, (EventsRefused, "the event server refused the command"))
    return kind(f"{where}: {hint} ({code}: {text.removeprefix(code).strip()})")


def unavailable(error: BaseException, where: str) -> EventsUnavailable:
    """The typed error for a connection that cannot be opened or broke."""
    text = str(error) or type(error).__name__
    return EventsUnavailable(f"{where} does not answer: {text}")
