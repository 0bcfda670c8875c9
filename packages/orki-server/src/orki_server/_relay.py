"""Cancels and directives for agents whose session is at another orchestrator.

They go through the store: into the other orchestrator's mailbox on the task's shard. Mail that is lost with an
orchestrator costs little: the agent's next orchestrator finds the cancel at the hello or at a heartbeat, and the sender
of a directive gets an error.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from functools import partial
from typing import Final

from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import LocalProtocolError, NotDirectable, OrkiError, Overloaded, error_for
from orki_control.session import AttemptKey
from orki_server._registry import ContractRegistry
from orki_server._session import SessionRegistry
from orki_server._store import operations
from orki_server._store.mail import Mail, MailKind, Posted, Received, is_live, post, read_mail
from orki_server._store.operations import shard_of
from orki_server._store.replies import TaskView
from orki_server._store.store import Store

_CHECK: Final = 1.0
"""Wait for another orchestrator's answer after which it is checked whether the orchestrator is still there."""
_ANSWER: Final = 10.0
"""Maximum wait for the answer."""
_log = logging.getLogger("orki.server.relay")


class Relay:
    """Sends mail to other orchestrators, and carries out theirs."""

    def __init__(self, store: Store, sessions: SessionRegistry, registry: ContractRegistry) -> None:
        self._store = store
        self._sessions = sessions
        self._registry = registry
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[None]] = {}
        self._reading: set[int] = set()
        self._unread: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def direct(self, view: TaskView, payload: bytes, actor: str) -> AttemptKey:
        """Send a directive to the attempt of a running task, through the orchestrator that has the agent's session.

        Raises:
            NotDirectable: The attempt does not get it.
            Overloaded: The agent, or the other orchestrator, does not read fast enough.
            StoreUnavailable: The store is down.
        """
        task = view.task
        key = AttemptKey.of(task.attempt)
        if task.agent_id in self._sessions or view.host in ("", self._store.caller):
            await self._direct_here(key, task.agent_id, task.method, payload, actor)
        else:
            await self._direct_there(view.host, key, task.agent_id, task.method, payload, actor)
        return key

    async def _direct_here(self, key: AttemptKey, agent_id: str, method: str, payload: bytes, actor: str) -> None:
        session = self._sessions.get(agent_id)
        if session is None:
            raise NotDirectable(f"agent {agent_id!r} has no session now; try again once it has connected")
        # The agent may serve an older contract than the one that declares the directive.
        service = method.partition("/")[0]
        served = self._registry.methods_of(service, session.digests.get(service, ""))
        if any(each.full_name == method and not each.directive for each in served):
            raise NotDirectable(f"agent {agent_id} serves {method} by a contract that declares no directive")
        reply = await self._store.apply(operations.direct(key, len(payload), actor))
        if reply.status != "running":
            raise NotDirectable(f"task {key.task_id} no longer runs attempt {key.attempt}")
        try:
            answer = session.direct(key, payload)
        except LocalProtocolError:
            answer = None
        if answer is None:
            raise NotDirectable(f"agent {agent_id} does not hold {key} now; try again in a moment")
        if not await answer:
            raise NotDirectable(f"{key} had ended when the directive arrived")

    async def _direct_there(
        self, host: str, attempt: AttemptKey, agent_id: str, method: str, payload: bytes, actor: str
    ) -> None:
        """Send a directive through the orchestrator that heard the agent last, and wait for its answer."""
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        mail = Mail(
            kind=MailKind.DIRECT,
            attempt=attempt,
            agent_id=agent_id,
            method=method,
            sender=self._store.caller,
            number=number,
            text=actor,
            payload=payload,
        )
        try:
            posted = await self._store.apply(post(host, mail))
            if posted is Posted.FULL:
                raise Overloaded(f"orchestrator {host} does not read its mail fast enough; try again in a moment")
            if posted is Posted.ABSENT:
                raise NotDirectable(
                    f"orchestrator {host}, which had the session of agent {agent_id}, is gone; "
                    "try again once the agent has connected to another one"
                )
            await self._answer(answer, host, attempt, agent_id)
        finally:
            del self._answers[number]

    async def _answer(self, answer: asyncio.Future[None], host: str, attempt: AttemptKey, agent_id: str) -> None:
        """Wait for the answer as long as the other orchestrator is there."""
        deadline = time.monotonic() + _ANSWER
        live = True
        while live and time.monotonic() < deadline:
            await asyncio.wait([answer], timeout=_CHECK)
            if answer.done():
                return answer.result()
            live = await self._store.apply(is_live(shard_of(attempt.task_id), host))
        problem = f"did not answer within {_ANSWER:g} s" if live else "is gone and did not answer"
        raise NotDirectable(
            f"orchestrator {host}, which had the session of agent {agent_id}, {problem}; the directive may have arrived"
        )

    # --- Incoming mail. ---

    def has_mail(self, shard: int) -> None:
        """There is mail on a shard."""
        if shard in self._reading:
            self._unread.add(shard)
            return
        try:
            received = self._store.apply(read_mail(shard))
        except OrkiError:
            return  # The store is down. The next sweep finds the mail.
        self._reading.add(shard)
        received.add_done_callback(partial(self._was_read, shard))

    def _was_read(self, shard: int, received: asyncio.Future[Received]) -> None:
        self._reading.discard(shard)
        again = shard in self._unread
        self._unread.discard(shard)
        if received.cancelled():
            return
        error = received.exception()
        if error is not None:
            _log.warning("the mail of shard %d could not be read: %s", shard, error)
            return
        for mail in received.result().mail:
            self._handle(mail)
        if again or received.result().more:
            self.has_mail(shard)

    def _handle(self, mail: Mail) -> None:
        match mail.kind:
            case MailKind.CANCEL:
                session = self._sessions.get(mail.agent_id)
                if session is not None:
                    session.machine.cancel(mail.attempt, grace_ms=mail.number, message=mail.text)
            case MailKind.DIRECT:
                task = asyncio.get_running_loop().create_task(self._direct(mail), name="orki relayed directive")
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case MailKind.ANSWER:
                self._answered(mail)

    def _answered(self, mail: Mail) -> None:
        answer = self._answers.get(mail.number)
        if answer is None or answer.done():
            return
        if mail.reason:
            answer.set_exception(error_for(mail.reason, mail.text))
        else:
            answer.set_result(None)

    async def _direct(self, mail: Mail) -> None:
        reason, text = Reason.REASON_UNSPECIFIED, ""
        try:
            await self._direct_here(mail.attempt, mail.agent_id, mail.method, mail.payload, mail.text)
        except OrkiError as error:
            reason, text = error.reason, error.message
        except Exception:
            _log.exception("a directive of another orchestrator failed: a defect")
            reason, text = LocalProtocolError.reason, "the orchestrator failed; see its log"
        answer = Mail(
            kind=MailKind.ANSWER,
            attempt=mail.attempt,
            agent_id=mail.agent_id,
            number=mail.number,
            reason=reason,
            text=text,
        )
        try:
            await self._store.apply(post(mail.sender, answer))
        except OrkiError as error:
            _log.warning("the answer to a directive for %s was not sent: %s", mail.attempt, error.message)

    async def close(self) -> None:
        """End the directives under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
