"""One agent's session: its gRPC stream, its state machine and its timer; and the registry of all sessions.

Events of the machine go to a callback. The machine wakes the writer and arms its timer, whoever calls it. The stream
has one reader and one writer for its whole life: gRPC ends the call when one of them is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import grpc

from orki.control.v1.attempt_pb2 import AttemptRef, Budget
from orki.control.v1.session_pb2 import ConnectRequest, ConnectResponse
from orki.control.v1.task_pb2 import AgentSnapshot
from orki_contract.errors import NotDirectable, OrkiError, Overloaded, RemoteProtocolError
from orki_control.session import (
    AttemptKey,
    AttemptState,
    DirectiveAnswer,
    HeartbeatArrived,
    OrchestratorEvent,
    OrchestratorSession,
    OrchestratorSessionOptions,
    OrchestratorState,
)
from orki_control.transport import LaterCall
from orki_server._requests import Undecodable

StreamContext: TypeAlias = grpc.aio.ServicerContext[ConnectRequest, ConnectResponse]

_LATER: Final = 0.01
"""Maximum time for which the acknowledgement of a result waits for another message."""
_FLUSH_TIMEOUT: Final = 2.0
"""Maximum time for writing the remaining messages when a stream ends."""
_WRITE_TIMEOUT: Final = 20.0
"""Maximum time for one write: an agent that does not read must not fill the memory."""
_DIRECTIVES: Final = 1_000
"""Maximum number of directives that wait for the agent's answer."""
_IDLE_HEARTBEATS: Final = 200
"""Number of heartbeats in a second above which agents without attempts send fewer."""
_LONGEST_IDLE: Final = 2.5
"""Maximum number of intervals between two of them. Other orchestrators miss an agent after a little more than three."""
_log = logging.getLogger("orki.server.sessions")


@dataclass(slots=True)
class ChargedTo:
    """The budgets that an attempt is charged to.

    Attributes:
        accounts: The tasks whose budgets they are, the topmost first.
        total: The usage of the attempt that was charged last.
    """

    accounts: tuple[str, ...]
    total: Budget = field(default_factory=Budget)


class AgentSession:
    """One stream of one agent.

    Attributes:
        machine: The session's state machine.
        agent_id: The agent; empty before its hello.
        instance_id: The agent's process; empty before its hello.
        epoch: Number of the session among the agent's; 0 before the welcome.
        methods: Full names of the tasks that the agent serves; empty before the welcome.
        cause: Why the stream ended; empty while it is open.
        refusal: The error with which the stream ends; None for a stream that ends well.
        left: Whether the agent ended it after it had drained.
        budgets: Running attempts that are charged to budgets.
        postponed: Attempts whose progress was set aside while the store was overloaded; the agent sends it again.
        skipped: Index of the last progress that was dropped, of each attempt of an agent that cannot send it again.
    """

    def __init__(
        self,
        options: OrchestratorSessionOptions,
        handle: Callable[[AgentSession, Sequence[OrchestratorEvent]], None],
    ) -> None:
        self.machine = OrchestratorSession(options, time.monotonic())
        self.agent_id = self.instance_id = ""
        self.epoch = 0
        self.methods: tuple[str, ...] = ()
        self.cause = ""
        self.refusal: OrkiError | None = None
        self.left = False
        self._orchestrator_id = options.orchestrator_id
        self._handle = handle
        self._loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        self._writable = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._heartbeat: HeartbeatArrived | None = None
        self._last_heartbeat_us = 0
        self.budgets: dict[AttemptKey, ChargedTo] = {}
        self.postponed: set[AttemptKey] = set()
        self.skipped: dict[AttemptKey, int] = {}
        self._directives: dict[tuple[AttemptKey, int], asyncio.Future[bool]] = {}
        self._arming = False
        self._later = LaterCall(self._loop, _LATER, self._writable.set)
        self.machine.on_change = self._changed
        self.machine.on_later = self._later.request
        self._arm()

    @property
    def over(self) -> bool:
        """Whether the stream has ended or is about to end."""
        return self._over.is_set()

    @property
    def digests(self) -> dict[str, str]:
        """Digest of the contract under which the agent serves each service."""
        hello = self.machine.hello
        return {each.service: each.digest for each in hello.services} if hello else {}

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the agent, as `name=value`."""
        hello = self.machine.hello
        return tuple(f"{name}={value}" for name, value in hello.labels.items()) if hello else ()

    def snapshot(self) -> AgentSnapshot:
        hello, machine = self.machine.hello, self.machine
        assert hello is not None
        beat = self._heartbeat
        held = (key for key, state in machine.attempts.items() if state is not AttemptState.REPORTED)
        return AgentSnapshot(
            agent_id=hello.agent_id,
            instance_id=hello.instance_id,
            connected=not self.over and machine.state is not OrchestratorState.ENDED,
            orchestrator_id=self._orchestrator_id,
            slots=hello.slots,
            labels=hello.labels,
            attempts=[AttemptRef(task_id=key.task_id, attempt=key.attempt, fence=key.fence) for key in held],
            services=sorted(each.service for each in hello.services),
            last_heartbeat_us=self._last_heartbeat_us,
            loop_lag_us=beat.loop_lag_us if beat else 0,
            memory_bytes=beat.memory_bytes if beat else 0,
            draining=self.left or machine.state is OrchestratorState.AGENT_DRAINING,
        )

    def record_heartbeat(self, heartbeat: HeartbeatArrived | None = None) -> None:
        """Record that the agent is alive."""
        self._last_heartbeat_us = time.time_ns() // 1000
        self._heartbeat = heartbeat or self._heartbeat

    def direct(self, attempt: AttemptKey, payload: bytes) -> asyncio.Future[bool] | None:
        """Send a directive to a running attempt.

        Returns:
            The agent's answer: whether the handler receives it. NotDirectable if the session ends before. None if this
            session does not hold the attempt.

        Raises:
            Overloaded: The agent does not read its directives fast enough.
            LocalProtocolError: The attempt is not accepted yet.
            TooLarge: The agent takes no message of that size.
        """
        if len(self._directives) >= _DIRECTIVES:
            raise Overloaded(
                f"{_DIRECTIVES} directives wait for agent {self.agent_id}; send more once it has read them"
            )
        number = self.machine.direct(attempt, payload)
        if not number:
            return None
        answer: asyncio.Future[bool] = self._loop.create_future()
        if self.machine.acknowledges:
            self._directives[attempt, number] = answer
        else:
            answer.set_result(True)
        return answer

    def directive_acknowledged(self, answers: Iterable[DirectiveAnswer]) -> None:
        for attempt, number, delivered in answers:
            answer = self._directives.pop((attempt, number), None)
            if answer is not None and not answer.done():
                answer.set_result(delivered)

    def _give_up_directives(self) -> None:
        for (attempt, _), answer in self._directives.items():
            if not answer.done():
                text = f"the session of agent {self.agent_id} ended before it acknowledged the directive to {attempt}"
                answer.set_exception(NotDirectable(f"{text}; it may have arrived"))
                answer.exception()  # The caller may have gone.
        self._directives.clear()

    def refuse(self, error: OrkiError) -> None:
        if self.machine.state in (OrchestratorState.AWAITING_HELLO, OrchestratorState.CHECKING_HELLO):
            self.machine.refuse_session(error)
        self.end(error.message)

    def replace(self, successor_instance_id: str) -> None:
        """End the session because a newer one began. Another instance is notified, the same one needs no message."""
        if successor_instance_id == self.instance_id:
            self._emit(self.machine.connection_lost(time.monotonic()))
        else:
            self._emit(self.machine.replace(successor_instance_id))
        self.end(f"instance {successor_instance_id} has the session")

    def end(self, cause: str) -> None:
        """End the stream after the remaining messages are written."""
        self.cause = self.cause or cause
        self._over.set()
        self._changed()

    async def run(self, context: StreamContext) -> None:
        reader = asyncio.create_task(self._read(context), name="orki session reader")
        writer = asyncio.create_task(self._write(context), name="orki session writer")
        try:
            await self._over.wait()
            self._writable.set()
            await asyncio.wait([writer], timeout=_FLUSH_TIMEOUT)
        finally:
            self._over.set()
            self._later.cancel()
            if self._timer is not None:
                self._timer.cancel()
            reader.cancel()
            writer.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)
            self.cause = self.cause or "the stream ended"
            self._give_up_directives()
            if self.machine.state is not OrchestratorState.ENDED:
                self._detect_leave()
                self._emit(self.machine.connection_lost(time.monotonic()))

    def _detect_leave(self) -> None:
        """Set `left` if the agent announced that it drains and runs nothing any more."""
        running = (AttemptState.RUNNING, AttemptState.CANCELLING)
        if self.machine.state is OrchestratorState.AGENT_DRAINING:
            self.left = not any(state in running for state in self.machine.attempts.values())
        if self.left:
            self.cause = "it left after draining"

    async def _read(self, context: StreamContext) -> None:
        try:
            while not self._over.is_set():
                request: Any = await context.read()
                if request is grpc.aio.EOF:
                    self.end("the agent ended the stream")
                    return
                if isinstance(request, Undecodable):
                    self.refusal = request.error
                    self.end(request.error.message)
                    return
                self._receive(request)
        except (grpc.RpcError, grpc.aio.BaseError) as error:
            self.end(f"the stream broke: {error}")
        except asyncio.CancelledError:
            raise
        except Exception:
            _log.exception("agent %s: a defect while its messages were handled", self.agent_id)
            self.end("a defect of the orchestrator")

    def _receive(self, request: ConnectRequest) -> None:
        try:
            events = self.machine.receive_batch(request.messages, time.monotonic())
        except RemoteProtocolError as error:
            _log.warning("agent %s violated the session protocol: %s", self.agent_id or "(unknown)", error.message)
            self.end(error.message)
            return
        if self.machine.hello is not None:
            self.agent_id, self.instance_id = self.machine.hello.agent_id, self.machine.hello.instance_id
        if events:
            self._handle(self, events)

    async def _write(self, context: StreamContext) -> None:
        try:
            while True:
                batch = self.machine.messages_to_send()
                if batch is None:
                    if self._over.is_set():
                        return
                    self._writable.clear()
                    await self._writable.wait()
                    continue
                self._later.cancel()
                timeout = self._loop.call_later(_WRITE_TIMEOUT, self._write_timed_out)
                try:
                    await context.write(batch)
                finally:
                    timeout.cancel()
        except (grpc.RpcError, grpc.aio.BaseError) as error:
            self.end(f"the stream broke: {error}")

    def _write_timed_out(self) -> None:
        error = Overloaded(f"agent {self.agent_id} has not read for {_WRITE_TIMEOUT:g} s")
        _log.warning("%s; its stream is ended", error.message)
        self.end(error.message)

    def _changed(self) -> None:
        """Wake the writer, and arm the timer once for all changes of this turn of the loop."""
        self._writable.set()
        if not self._arming:
            self._arming = True
            self._loop.call_soon(self._arm)

    def _arm(self) -> None:
        self._arming = False
        due = None if self._over.is_set() else self.machine.next_timer()
        if self._timer is not None:
            if due is not None and due >= self._due:
                return  # It fires early and is armed again.
            self._timer.cancel()
        self._due = due or 0.0
        # The loop's clock and the machine's are the same monotonic clock.
        self._timer = None if due is None else self._loop.call_at(due, self._timer_fired)

    def _timer_fired(self) -> None:
        self._timer = None
        self._emit(self.machine.handle_timer(time.monotonic()))
        self._arm()

    def _emit(self, events: Sequence[OrchestratorEvent]) -> None:
        if events:
            self._handle(self, events)


class SessionRegistry(dict[str, AgentSession]):
    """The newest session of each agent, by agent id."""

    def remove(self, session: AgentSession) -> bool:
        """Remove a session. Returns False, and changes nothing, if the agent has a newer one."""
        if self.get(session.agent_id) is not session:
            return False
        del self[session.agent_id]
        return True


def idle_interval(sessions: int, interval: float) -> float:
    """Return the time between heartbeats of agents without attempts, so that their number in a second is bounded.

    Args:
        sessions: Number of sessions.
        interval: Time between heartbeats of agents with attempts.
    """
    return min(max(interval, sessions / _IDLE_HEARTBEATS), _LONGEST_IDLE * interval)
