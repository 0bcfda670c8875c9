"""Who calls, and what the caller may do.

`Gate` finds the caller of each call before its servicer runs. Servicers get the caller with `caller()`, from any task
of the call: it is a context variable. A task that the caller may not see and one that does not exist give the same
error.
"""

from __future__ import annotations

import contextvars
import hashlib
import hmac
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from orki_contract.errors import InvalidSetting, PeerRefused, UnknownMethod, UnknownTask
from orki_control.credentials import read_secret
from orki_server._files import WatchedFiles

ACTOR_KEY: Final = "orki-actor"
"""Metadata key with the caller's name for the audit, where callers prove no identity."""
_ACTOR: Final = re.compile(r"[A-Za-z0-9_.@:/-]{1,128}\Z")
_SPIFFE: Final = re.compile(r"spiffe://[a-z0-9._-]{1,255}(/[A-Za-z0-9._-]{1,128}){1,16}\Z")
TOKEN_NAME: Final = re.compile(r"(agent|submitter)/[A-Za-z0-9_.-]{1,128}\Z")
_AGENT: Final = re.compile(r"(?:.*/)?agent/(?P<id>[^/]+)\Z")
_TOKEN: Final = re.compile(r"(?P<id>[A-Za-z0-9]{8,64})\.(?P<secret>[A-Za-z0-9_-]{32,256})\Z")
_HASH: Final = re.compile(r"sha256:[0-9a-f]{64}\Z")
_PATTERN: Final = re.compile(r"[A-Za-z0-9_.:/*-]{1,512}\Z")
_NO_HASH: Final = "sha256:" + 64 * "0"


class Action(StrEnum):
    """What a policy allows for a service."""

    SERVE = "serve"
    SUBMIT = "submit"
    READ = "read"
    CANCEL = "cancel"
    DIRECT = "direct"
    PAUSE = "pause"
    LIMIT = "limit"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of a policy: these callers may do these things with these services.

    Attributes:
        callers: Patterns of callers' names; `*` stands for any characters.
        actions: The actions.
        services: Patterns of full names of services.
    """

    callers: re.Pattern[str]
    actions: frozenset[Action]
    services: re.Pattern[str]


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a call.

    Attributes:
        name: The verified name: a SPIFFE name, or the name of a token; for a caller without identity, what it claims.
        rules: Rules of the policy that apply; None allows everything, also any agent id.
    """

    name: str
    rules: tuple[Rule, ...] | None = None

    def may(self, action: Action, method: str) -> bool:
        """Return whether the caller may do this with a method or a service, given by its full name."""
        if self.rules is None:
            return True
        service = method.partition("/")[0]
        return any(action in rule.actions and rule.services.match(service) for rule in self.rules)

    def check_submit(self, method: str) -> None:
        """Raise UnknownMethod, as for a method that does not exist, if the caller may not submit to it."""
        if not self.may(Action.SUBMIT, method):
            raise unknown_method(method)

    def check_task(self, action: Action, task_id: str, method: str) -> None:
        """Raise UnknownTask, as for a task that does not exist, if the caller may not do this with the task."""
        if not self.may(action, method):
            raise UnknownTask(f"there is no task {task_id}")

    def check_limits(self) -> None:
        """Raise PeerRefused if the caller may not read and declare limits. Limits belong to no service."""
        if self.rules is not None and not any(Action.LIMIT in rule.actions for rule in self.rules):
            raise PeerRefused(f"the policy does not allow {self.name} to read or declare limits")

    def check_agent(self, agent_id: str, services: Iterable[str]) -> None:
        """Raise PeerRefused if the caller may not open the session of an agent that serves these services.

        A name that ends in `agent/NAME` may be the agent NAME and its replicas NAME.SUFFIX.
        """
        if self.rules is None:
            return
        match = _AGENT.match(self.name)
        own = match["id"] if match else ""
        if not own or (agent_id != own and not agent_id.startswith(own + ".")):
            whose = f"agent {own} and its replicas {own}.SUFFIX" if own else "no agent"
            raise PeerRefused(f"{self.name} is the identity of {whose}, not of agent {agent_id}; see --agent-id")
        for service in services:
            if not self.may(Action.SERVE, service):
                raise PeerRefused(f"the policy does not allow {self.name} to serve {service}")


# Outside a call nothing is allowed, so that code that loses its caller fails closed.
_NOBODY: Final = Caller("nobody", ())
_caller: contextvars.ContextVar[Caller] = contextvars.ContextVar("orki_caller", default=_NOBODY)


def act_as(name: str) -> None:
    """Let the current asyncio task act for the orchestrator itself, which may do anything."""
    _caller.set(Caller(name))


def caller() -> Caller:
    """Return the caller of the current call."""
    return _caller.get()


def unknown_method(method: str, detail: str = "") -> UnknownMethod:
    """Return the error for a method that is not registered, or that the caller may not use.

    Args:
        method: Full name of the method.
        detail: The message for callers without a policy. Others get the same message in both cases.
    """
    if detail and caller().rules is None:
        return UnknownMethod(detail)
    return UnknownMethod(f"no contract with {method} is registered, or the policy does not allow you to submit to it")


class Policy:
    """Rules of a policy file.

    Raises:
        InvalidSetting: The file cannot be read or is malformed; the message names the entry.
    """

    def __init__(self, content: bytes, where: str) -> None:
        try:
            parsed = tomllib.loads(content.decode())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InvalidSetting(f"{where} is not TOML: {error}") from error
        if unknown := sorted(set(parsed) - {"allow"}):
            raise InvalidSetting(f"{where} has an unknown entry {unknown[0]!r}; known: [[allow]]")
        entries = parsed.get("allow", [])
        if not isinstance(entries, list):
            raise InvalidSetting(f"{where}: allow must be a list of tables, [[allow]]")
        self._rules = tuple(_rule(entry, f"{where}: [[allow]] {number}") for number, entry in enumerate(entries, 1))

    def caller(self, name: str) -> Caller:
        """Return the caller with this verified name."""
        return Caller(name, tuple(rule for rule in self._rules if rule.callers.match(name)))


def _rule(entry: object, where: str) -> Rule:
    if not isinstance(entry, dict) or set(entry) != {"callers", "actions", "services"}:
        raise InvalidSetting(f"{where} must have exactly callers, actions and services")
    for name, values in entry.items():
        if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
            raise InvalidSetting(f"{where}: {name} must be a list of texts")
    if unknown := sorted(set(entry["actions"]) - set(Action)):
        raise InvalidSetting(f"{where}: unknown action {unknown[0]!r}; known: {', '.join(Action)}")
    actions = frozenset(map(Action, entry["actions"]))
    return Rule(_patterns(entry["callers"], where), actions, _patterns(entry["services"], where))


def _patterns(patterns: list[str], where: str) -> re.Pattern[str]:
    for each in patterns:
        if not _PATTERN.match(each):
            raise InvalidSetting(f"{where}: {each[:80]!r} is not a pattern: a name, in which `*` is any characters")
    return re.compile("(?:" + "|".join(re.escape(each).replace(r"\*", ".*") for each in patterns) + r")\Z")


class Tokens:
    """Hashes of bearer tokens, from a file with a line `NAME ID sha256:HASH` for each.

    Raises:
        InvalidSetting: A line is malformed.
    """

    def __init__(self, content: bytes, where: str) -> None:
        self._known: dict[str, tuple[str, str]] = {}
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) != 3 or not TOKEN_NAME.match(words[0]) or not _HASH.match(words[2]):
                raise InvalidSetting(
                    f"{where}, line {number}: use NAME ID sha256:HASH, with agent/ID or submitter/NAME as NAME; "
                    "`orki token NAME` prints such a line"
                )
            if words[1] in self._known:
                raise InvalidSetting(f"{where}, line {number}: the token {words[1]} appears twice")
            self._known[words[1]] = (words[0], words[2])

    def name(self, token: str) -> str | None:
        """Return the name to which a token is bound; None if it is unknown. The time does not depend on the secret."""
        match = _TOKEN.match(token)
        name, expected = self._known.get(match["id"] if match else "", ("", _NO_HASH))
        matches = hmac.compare_digest(token_hash(match["secret"] if match else ""), expected)
        return name if matches and name else None


def token_hash(secret: str) -> str:
    """Return the hash of a token's secret as the tokens file holds it."""
    # A fast hash is enough: the secret has 256 random bits.
    return "sha256:" + hashlib.sha256(secret.encode()).hexdigest()


class Gate:
    """Finds the callers of calls.

    Args:
        certificates: Whether callers have certificates.
        tokens_file: File with hashes of tokens; empty if callers have no tokens.
        policy_file: File with the policy; empty if callers have no identity.
        on_caller: Called with the peer of each call whose caller is known.

    Raises:
        InvalidSetting: A file cannot be read or is malformed.
    """

    def __init__(
        self, *, certificates: bool, tokens_file: str, policy_file: str, on_caller: Callable[[str], None]
    ) -> None:
        self._certificates = certificates
        self._on_caller = on_caller
        self._tokens: WatchedFiles[Tokens] | None = None
        self._policy: WatchedFiles[Policy] | None = None
        if tokens_file:
            where = f"tokens_file {tokens_file}"
            self._tokens = WatchedFiles([tokens_file], lambda: Tokens(read_secret(tokens_file, "tokens_file"), where))
        if policy_file:
            self._policy = WatchedFiles([policy_file], lambda: Policy(_read(policy_file), f"policy_file {policy_file}"))

    @property
    def files(self) -> list[WatchedFiles[Any]]:
        """The files to watch."""
        return [each for each in (self._tokens, self._policy) if each is not None]

    def enter(self, context: Any) -> None:
        """Set the caller of the current call.

        Raises:
            PeerRefused: The caller proves no identity.
        """
        if self._certificates:
            name = _certificate_name(context.auth_context())
        elif self._tokens is not None:
            name = self._token_name(context.invocation_metadata(), self._tokens.value)
        else:
            _caller.set(Caller(_claimed_name(context.invocation_metadata())))
            self._on_caller(context.peer())
            return
        assert self._policy is not None
        _caller.set(self._policy.value.caller(name))
        self._on_caller(context.peer())

    def _token_name(self, metadata: Iterable[tuple[str, str | bytes]] | None, tokens: Tokens) -> str:
        for key, value in metadata or ():
            if key == "authorization" and isinstance(value, str):
                kind, _, token = value.partition(" ")
                name = tokens.name(token.strip()) if kind.lower() == "bearer" else None
                if name is None:
                    raise PeerRefused("the bearer token is unknown; check ORKI_TOKEN_FILE")
                return name
        raise PeerRefused("this orchestrator requires a bearer token; set ORKI_TOKEN_FILE")


def _certificate_name(properties: Mapping[str, Iterable[bytes]]) -> str:
    names = [value.decode("ascii", "replace") for value in properties.get("peer_uri", ())]
    if len(names) != 1 or not _SPIFFE.match(names[0]):
        raise PeerRefused(
            "the certificate must have exactly one URI name, of the form spiffe://DOMAIN/PATH; "
            f"it has {', '.join(name[:100] for name in names) or 'none'}"
        )
    return names[0]


def _claimed_name(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    for key, value in metadata or ():
        if key == ACTOR_KEY and isinstance(value, str) and _ACTOR.match(value):
            return value
    return "anonymous"


def _read(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise InvalidSetting(f"policy_file {file}: the file cannot be read: {error.strerror}") from error
