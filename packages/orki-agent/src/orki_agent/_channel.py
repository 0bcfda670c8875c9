"""The session over gRPC: connect, read, write, arm the machine's timer, and connect again after every loss.

This module moves messages and maps errors; the session machine interprets them. One task reads and one writes. A
cancelled read or write of grpc.aio ends the whole call, so neither has a timeout, and only `call.cancel()` ends a call.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import grpc

from orki.control.v1.attempt_pb2 import Failure
from orki.control.v1.session_pb2 import ConnectRequest, ConnectResponse, OrchestratorMessage, Refused
from orki.control.v1.session_pb2_grpc import SessionServiceStub
from orki_agent._settings import RunSettings
from orki_contract.backoff import Jitter
from orki_contract.errors import InvalidSetting, OrkiError, PeerRefused, RemoteProtocolError
from orki_control.session import AgentEvent, AgentSession, AgentState, SessionClosed, SessionLost
from orki_control.transport import Addresses, LaterCall, Peer, check_targets, error_from, open_channel

_log = logging.getLogger("orki.agent.session")

_FAILURES_OF_A_CHANNEL: Final = 3
"""Number of failed streams after which a new channel is opened."""
_LOG_EVERY: Final = 20
"""One of this many consecutive failures is logged as a warning."""
_LATER: Final = 0.003
"""Maximum time for which the acceptance of an offer waits for the result of its handler, in seconds."""
_HALF_CLOSED: Final = 0.5
"""Seconds for the orchestrator to end the stream after the agent has."""

if TYPE_CHECKING:
    _Call = grpc.aio.StreamStreamCall[ConnectRequest, ConnectResponse]


class SessionChannel:
    """The agent's streams to its orchestrators, one after another. Belongs to the I/O loop.

    Args:
        session: The session machine.
        settings: Settings of the run.
        on_timer: Called before the machine's timer is handled, to update the reported load.

    Attributes:
        on_events: Receives the machine's events, in batches. Set it before `run`.
        on_sent: Called after messages were written. Set it before `run`.
    """

    on_events: Callable[[Sequence[AgentEvent]], None]
    on_sent: Callable[[], None]

    def __init__(
        self,
        session: AgentSession,
        settings: RunSettings,
        on_timer: Callable[[], None],
    ) -> None:
        self._session = session
        self._settings = settings
        self._on_timer = on_timer
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._arming = False
        self._to_write = asyncio.Event()
        self._over: asyncio.Future[SessionLost] | None = None
        self._stopping = asyncio.Event()
        self._peer = Peer("", "")
        self._later = LaterCall(self._loop, _LATER, session.send_acceptances)
        session.on_change = self._changed
        session.on_later = self._later.request

    async def run(self) -> None:
        """Keep a session until `stop` is called or the machine closes it for good."""
        settings = self._settings
        addresses = Addresses(self._targets())
        self._peer = await addresses.next()
        jitter = Jitter(settings.backoff)
        channel: grpc.aio.Channel | None = None
        failures = 0
        try:
            while not self._done():
                connected_at = self._loop.time()
                try:
                    channel = channel or open_channel(
                        self._peer.target,
                        settings.max_message_bytes,
                        authority=self._peer.name,
                        credentials=settings.credentials,
                    )
                    lost = await self._one_stream(channel)
                except InvalidSetting as error:
                    # A file of the credentials is being replaced.
                    lost = SessionLost(error.message, silent=False)
                if self._done():
                    break
                lasted = self._loop.time() - connected_at
                failures = 0 if lasted > settings.backoff.stable else failures + 1
                wait = jitter.failed(lasted)
                before, self._peer = self._peer, await addresses.next()
                reopen = lost.silent or failures >= _FAILURES_OF_A_CHANNEL or self._peer != before
                if channel is not None and reopen:
                    await channel.close()
                    channel, failures = None, 0
                level = logging.WARNING if jitter.failures % _LOG_EVERY == 1 else logging.DEBUG
                _log.log(level, "no session: %s; connecting to %s in %.2f s", lost.cause, self._peer, wait)
                await self._pause(wait)
        finally:
            self._later.cancel()
            if self._timer is not None:
                self._timer.cancel()
            if channel is not None:
                await channel.close()
            await asyncio.sleep(0)  # Deliver the last events.

    def _targets(self) -> tuple[str, ...]:
        settings = self._settings
        return check_targets(settings.orchestrator, insecure=settings.insecure, credentials=settings.credentials)

    def take(self, events: Sequence[AgentEvent]) -> None:
        """Deliver the machine's events."""
        for event in events:
            if isinstance(event, SessionLost):
                self._end_stream(event)
            elif isinstance(event, SessionClosed):
                self._end_stream(SessionLost(event.error.message, silent=False))
        if events:
            # The machine has woken the writer before, so an acknowledgement is sent before its event is handled.
            self._loop.call_soon(self.on_events, events)

    def stop(self) -> None:
        """End the stream after the queued messages were sent."""
        self._stopping.set()
        self._to_write.set()

    # --- One stream. ---

    async def _one_stream(self, channel: grpc.aio.Channel) -> SessionLost:
        over: asyncio.Future[SessionLost] = self._loop.create_future()
        self._over = over
        call = SessionServiceStub(channel).Connect()
        self._session.connection_made(self._loop.time())
        tasks = [
            self._loop.create_task(self._read(call), name="orki session reader"),
            self._loop.create_task(self._write(call, over), name="orki session writer"),
        ]
        try:
            return await over
        finally:
            call.cancel()
            # Neither task is cancelled: the reader ends with the call, the writer when it wakes.
            self._lose("the agent ends")
            self._to_write.set()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.take(self._session.connection_lost(self._loop.time()))

    async def _read(self, call: _Call) -> None:
        try:
            while True:
                response = await call.read()
                if response is grpc.aio.EOF:
                    return self._lose("the orchestrator ended the stream")
                assert isinstance(response, ConnectResponse)
                self.take(self._session.receive_batch(response.messages, self._loop.time()))
        except RemoteProtocolError as error:
            _log.error("the orchestrator broke the protocol: %s", error.message)
            self._lose(f"protocol violation: {error.message}")
        except (grpc.RpcError, asyncio.CancelledError, asyncio.InvalidStateError) as error:
            self._close_if_refused(error)
            self._lose(self._cause(error))
        except Exception as error:
            _log.exception("reading the session failed: this is a defect")
            self._lose(f"{type(error).__name__}: {error}")

    async def _write(self, call: _Call, over: asyncio.Future[SessionLost]) -> None:
        try:
            while not over.done():
                while (request := self._session.messages_to_send()) is not None:
                    if not self._session.delays:
                        self._later.cancel()
                    await call.write(request)
                    self.on_sent()
                if self._stopping.is_set():
                    await call.done_writing()
                    self._loop.call_later(_HALF_CLOSED, self._lose, "the agent has stopped")
                    return
                self._to_write.clear()
                await self._to_write.wait()
        except (grpc.RpcError, asyncio.CancelledError, asyncio.InvalidStateError) as error:
            self._lose(self._cause(error))
        except Exception as error:
            _log.exception("writing the session failed: this is a defect")
            self._lose(f"{type(error).__name__}: {error}")

    def _cause(self, error: BaseException) -> str:
        if isinstance(error, grpc.aio.AioRpcError):
            return error_from(error, str(self._peer)).message
        return f"{self._peer}: the call was ended ({type(error).__name__})"

    def _close_if_refused(self, error: BaseException) -> None:
        """Close the session for good if the orchestrator refused the first call: it would refuse the next ones too."""
        if self._session.session_epoch or not isinstance(error, grpc.aio.AioRpcError):
            return
        refused = error_from(error, str(self._peer))
        if isinstance(refused, PeerRefused):
            failure = Failure(reason=refused.reason, message=refused.message)
            message = OrchestratorMessage(refused=Refused(failure=failure))
            self.take(self._session.receive_batch([message], self._loop.time()))

    def _lose(self, cause: str) -> None:
        self._end_stream(SessionLost(cause, silent=False))

    def _end_stream(self, lost: SessionLost) -> None:
        if self._over is not None and not self._over.done():
            self._over.set_result(lost)

    # --- The machine's wake-ups and its timer. ---

    def _changed(self) -> None:
        """Wake the writer, and arm the timer once for all changes of this turn of the loop."""
        self._to_write.set()
        if not self._arming:
            self._arming = True
            self._loop.call_soon(self._arm)

    def _arm(self) -> None:
        self._arming = False
        due = self._session.next_timer()
        if self._timer is not None:
            if due is not None and due >= self._timer_at:
                return  # It fires early and is armed again.
            self._timer.cancel()
        self._timer_at = due or 0.0
        self._timer = None if due is None else self._loop.call_at(due, self._timer_fired)

    def _timer_fired(self) -> None:
        self._timer = None
        self._on_timer()
        try:
            self.take(self._session.handle_timer(self._loop.time()))
        except OrkiError:
            _log.exception("the session's timer failed: this is a defect")
        self._arm()

    async def _pause(self, delay: float) -> None:
        try:
            async with asyncio.timeout(delay):
                await self._stopping.wait()
        except TimeoutError:
            pass

    def _done(self) -> bool:
        return self._stopping.is_set() or self._session.state is AgentState.ENDED
