"""Every order of events of one task: leases, fences, acceptance and lost writes, explored with the store's own script.

Two agents and two orchestrators act on one task. From each state that is reached, each action is tried, up to a number
of actions. States that differ only in absolute times and fences are one state.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from orki.control.v1.attempt_pb2 import TaskState
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.trace import Span
from orki_control.session import AttemptKey
from orki_server._keys import ShardKeys
from orki_server._store import operations, upkeep
from orki_server._store.batcher import shard_script
from orki_server._store.operations import Operation, Recipient
from orki_server._store.replies import ReportStatus
from simulator.contract import contract
from simulator.redis import Error, Server

_METHOD: Final = contract().task.contract
_TASK: Final = operations.known_task_id(0, 1)
_TERMINAL: Final = (*(TaskState.TASK_STATE_SUCCEEDED, TaskState.TASK_STATE_FAILED, TaskState.TASK_STATE_CANCELLED),)
_TIME: Final = re.compile(rb"\d{13,16}")
_NO_ATTEMPT: Final = AttemptKey(_TASK, 0, 0)


class Given(NamedTuple):
    """An offer that was made: its agent and its attempt."""

    agent: str
    attempt: AttemptKey


@dataclass(frozen=True)
class _State:
    data: Any
    now: float
    offers: tuple[Given, ...] = ()
    path: tuple[str, ...] = ()
    saved: Any = None
    accepted: bool = False
    progress: int = 0


class Violation(Exception):
    """A promise that a path breaks."""


class Heart:
    """The exploration.

    Attributes:
        states: Number of states that were found.
        actions: Number of actions that were tried.
    """

    def __init__(self) -> None:
        self.states = self.actions = 0
        self._now = 1_700_000_000.0
        self._server = Server(lambda: self._now)
        self._script = shard_script(3600.0)
        self._server.execute(("SCRIPT", "LOAD", self._script.text))

    def explore(self, depth: int) -> None:
        """Try every path of up to `depth` actions.

        Raises:
            Violation: A path breaks a promise.
        """
        submit = operations.submit(
            task_id=_TASK,
            method=_METHOD,
            request=b"",
            digest="",
            idempotency_key="",
            span=Span("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"),
            actor="me",
        )
        self._apply(submit, "o1")
        first = _State(self._server.snapshot(), self._now)
        seen = {self._mark(first)}
        waiting = deque([first])
        while waiting:
            state = waiting.popleft()
            for following in self._next(state):
                self.actions += 1
                mark = self._mark(following)
                if mark not in seen:
                    seen.add(mark)
                    if len(following.path) < depth:
                        waiting.append(following)
        self.states = len(seen)

    def _next(self, state: _State) -> Iterator[_State]:
        for caller, agent in (("o1", "a1"), ("o2", "a2"), ("o2", "a1")):
            yield self._offer(state, caller, agent)
        for given in state.offers[-3:]:
            for name in ("accept", "succeed", "fail", "abandon", "skip"):
                yield self._report(state, given, name)
        if state.offers:
            agent, attempt = state.offers[-1]
            yield self._report(state, Given("a2" if agent == "a1" else "a1", attempt), "succeed")
        yield self._act(state, "cancel", lambda: self._apply(operations.cancel(_TASK, "", "me"), "o1"))
        for name, callers in (("heard", ("o1", "o2")), ("o1 away", ("o2",)), ("nobody", ())):
            yield self._act(state, f"4 s pass, {name}", lambda callers=callers: self._pass(callers))
        if state.saved is None:
            yield replace(state, saved=(state.data, state.accepted), path=(*state.path, "the server saves"))
        elif state.saved:
            yield self._lose(state)

    # --- Actions. ---

    def _act(self, state: _State, name: str, action: Any, **changes: Any) -> _State:
        self._server.restore(state.data)
        self._now = state.now + 0.01
        path = (*state.path, name)
        before = self._task()
        action()
        after = self._task()
        if before.state in _TERMINAL and (after.state, after.response) != (before.state, before.response):
            raise Violation(f"{path}: a task that had ended changed")
        return replace(state, data=self._server.snapshot(), now=self._now, path=path, **changes)

    def _offer(self, state: _State, caller: str, agent: str) -> _State:
        offers: list[Given] = []

        def act() -> None:
            recipient = Recipient(agent, f"{agent}-x", 1, (_METHOD.full_name,))
            assigned = self._apply(operations.offer(0, 2.0, [recipient]), caller)
            offers.extend(Given(agent, each.attempt) for each in assigned.offers)

        following = self._act(state, f"{caller} offers to {agent}", act)
        for given in offers:
            known = [each.attempt.fence for each in state.offers]
            if known and given.attempt.fence <= max(known):
                raise Violation(f"{following.path}: fence {given.attempt.fence} does not rise above {max(known)}")
        return replace(following, offers=(*state.offers, *offers), progress=0 if offers else state.progress)

    def _report(self, state: _State, given: Given, name: str) -> _State:
        agent, attempt = given
        made: dict[str, Operation[Any]] = {
            "accept": operations.accept(agent, attempt),
            "succeed": operations.succeed(agent, attempt, b"%d" % attempt.fence),
            "fail": operations.fail(agent, attempt, Reason.REASON_HANDLER_FAILED, "it failed", "", True),
            "abandon": operations.fail(agent, attempt, Reason.REASON_ABANDONED, "it stops", "", True),
            "skip": operations.report_progress(agent, attempt, 9, state.progress + 2, b"p", 0),
        }
        replies: list[Any] = []
        number = [each.attempt for each in state.offers].index(attempt) + 1
        self._server.restore(state.data)
        before = self._task()
        holds = (before.agent_id, before.attempt.fence) == (agent, attempt.fence) and before.state not in _TERMINAL
        caller = "o1" if agent == "a1" else "o2"
        following = self._act(
            state, f"{agent}: {name} offer {number}", lambda: replies.append(self._apply(made[name], caller))
        )
        accepted = replies[0].status is ReportStatus.ACCEPTED
        if accepted and (not holds or attempt != state.offers[-1].attempt):
            raise Violation(f"{following.path}: the report of an attempt that the agent does not hold was accepted")
        if accepted and name == "skip":
            raise Violation(f"{following.path}: progress was accepted although one before it is missing")
        if accepted and name == "succeed":
            if state.accepted:
                raise Violation(f"{following.path}: two results were accepted")
            return replace(following, accepted=True)
        return following

    def _pass(self, callers: tuple[str, ...]) -> None:
        for _ in range(8):
            self._now += 0.5
            for caller in callers:
                self._apply(upkeep.sweep(0, 100), caller)
        for caller in callers or ("o1", "o2"):
            self._apply(upkeep.sweep(0, 100), caller)

    def _lose(self, state: _State) -> _State:
        """The server comes back without its newest writes; an orchestrator then checks the fences that it knows."""
        data, accepted = state.saved
        lost = replace(state, data=data)

        def act() -> None:
            if lost.offers:
                self._apply(upkeep.raise_epoch(0, max(each.attempt.fence for each in lost.offers)), "o1")

        return self._act(lost, "the server loses its newest writes", act, saved=(), accepted=accepted)

    # --- The store. ---

    def _apply(self, operation: Operation[Any], caller: str) -> Any:
        prefix, arguments = ShardKeys(0).base, operation.arguments
        command = ("EVALSHA", self._script.digest, 1, prefix, caller, "", operation.op, len(arguments), *arguments)
        reply = self._server.execute(command)
        if isinstance(reply, Error) or reply[0][:1] == [b"error"]:
            raise Violation(f"{operation.op} failed: {reply}")
        return operation.outcome(reply[0])

    def _task(self) -> Any:
        view = self._apply(operations.read_task(_TASK), "o1")
        return view.task

    def _mark(self, state: _State) -> Any:
        """Return what two equal states share: times count from now, and fences by their order."""
        fences = [each.attempt.fence for each in state.offers]

        def relative(found: re.Match[bytes]) -> bytes:
            number = int(found[0])
            if number in fences:
                return b"f%d" % fences.index(number)
            scale = 1e3 if len(found[0]) == 13 else 1e6
            return b"%d" % round((number / scale - state.now) * 4)

        keys, _ = state.data
        rows = []
        for key, value in sorted(keys.items()):
            if isinstance(value, dict):
                rows.append((key, *((name, _TIME.sub(relative, text)) for name, text in sorted(value.items()))))
        agents = tuple(each.agent for each in state.offers)
        return agents, state.accepted, state.progress, state.saved is None, not state.saved, tuple(rows)
