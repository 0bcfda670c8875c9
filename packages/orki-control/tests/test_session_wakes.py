"""Both machines wake their shells: no public call leaves a message or an earlier timer unannounced."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from typing import Any

import pytest

from orki.control.v1 import session_pb2 as pb
from orki.control.v1.attempt_pb2 import Budget, BudgetBalance, Failure
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import Draining, LocalProtocolError, RemoteProtocolError, StaleFence
from orki_control import session as s
from orki_control.session import AttemptKey

KEY = AttemptKey("t1", 1, 7)
NEXT = AttemptKey("t2", 1, 8)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
HELLO = pb.Hello(agent_id="a", instance_id="i", protocol_min=1, protocol_max=2, slots=4, max_message_bytes=1 << 20)
LONG = 5_000
"""Heartbeat interval in milliseconds. No message may wait for a heartbeat."""


class Watched:
    """A machine whose calls are compared with the wake-ups of its shell."""

    def __init__(self, machine: Any) -> None:
        self.machine = machine
        self.woken = 0
        machine.on_change = self._wake

    def _wake(self) -> None:
        self.woken += 1

    def call(self, call: Callable[[Any], Any]) -> None:
        """Make a call, as a shell that has written everything and has armed the timer."""
        drained(self.machine)
        due, before = self.machine.next_timer(), self.woken
        with suppress(LocalProtocolError, RemoteProtocolError):  # illegal in this stage; a refusal may still be queued
            call(self.machine)
        after = self.machine.next_timer()
        earlier = after is not None and (due is None or after < due)
        if drained(self.machine) or earlier:
            assert self.woken > before, "the shell was not woken"


def drained(machine: Any) -> int:
    count = 0
    while (batch := machine.messages_to_send()) is not None:
        count += len(batch.messages)
    return count


def offer(key: AttemptKey, lease_ms: int = 9000) -> pb.Offer:
    budgets = [BudgetBalance(task_id=key.task_id)]
    return pb.Offer(
        attempt=key.ref(), method="x.Y/Z", request=b"r", lease_ms=lease_ms, accept_timeout_ms=2000, budgets=budgets
    )


def from_orchestrator(**body: Any) -> tuple[pb.OrchestratorMessage]:
    return (pb.OrchestratorMessage(traceparent=TRACE, **body),)


def from_agent(**body: Any) -> tuple[pb.AgentMessage]:
    return (pb.AgentMessage(traceparent=TRACE, **body),)


WELCOME = pb.Welcome(
    protocol=3, orchestrator_id="o", session_epoch=1, heartbeat_interval_ms=LONG, max_message_bytes=1 << 20
)


def agents() -> dict[str, s.AgentSession]:
    """The agent's end in every stage of a session."""
    found = {}
    session = s.AgentSession(s.AgentSessionOptions(agent_id="a", instance_id="i", services=(), slots=4))
    found["new"] = deepcopy(session)
    session.connection_made(0.0)
    found["waits for the welcome"] = deepcopy(session)
    session.receive_batch(from_orchestrator(welcome=WELCOME), 0.0)
    session.handle_timer(0.0)
    found["open"] = deepcopy(session)
    session.receive_batch(from_orchestrator(offer=offer(KEY)), 0.0)
    found["offered"] = deepcopy(session)
    session.accept(KEY, 0.0)
    found["accepted"] = deepcopy(session)
    session.progress(KEY, b"p")
    lost = deepcopy(session)
    lost.connection_lost(0.0)
    found["cut while it runs"] = deepcopy(lost)
    lost.connection_made(0.0)
    found["waits for the second welcome"] = deepcopy(lost)
    blocked = deepcopy(session)
    blocked.report(KEY, b"x", 0.0, still_running=True)
    found["blocked"] = blocked
    session.report(KEY, b"x", 0.0)
    found["reported"] = deepcopy(session)
    session.drain(0.0)
    found["drains"] = session
    return found


AGENT_CALLS: dict[str, list[Callable[[s.AgentSession], Any]]] = {
    "connection_made": [lambda m: m.connection_made(1.0)],
    "connection_lost": [lambda m: m.connection_lost(1.0)],
    "receive_batch": [
        lambda m, body=body: m.receive_batch(from_orchestrator(**body), 1.0)
        for body in (
            {"welcome": WELCOME},
            {
                "welcome": pb.Welcome.FromString(
                    WELCOME.SerializeToString() + pb.Welcome(keep=[KEY.ref()]).SerializeToString()
                )
            },
            {"offer": offer(NEXT)},
            {"offer": offer(NEXT, lease_ms=10)},
            {"cancel": pb.Cancel(attempt=KEY.ref(), grace_ms=1)},
            {"cancel": pb.Cancel(attempt=NEXT.ref(), grace_ms=1)},
            {"directive": pb.Directive(attempt=KEY.ref())},
            {"progress_acknowledged": pb.ProgressAcknowledged(attempt=KEY.ref())},
            {"progress_acknowledged": pb.ProgressAcknowledged(attempt=KEY.ref(), replay=True)},
            {"directive": pb.Directive(attempt=KEY.ref(), number=1)},
            {"checkpoint_acknowledged": pb.CheckpointAcknowledged(attempt=KEY.ref())},
            {"budget_update": pb.BudgetUpdate(attempt=KEY.ref())},
            {"chunk": pb.Chunk(transfer=1, attempt=KEY.ref(), total=2, data=b"a")},
            {"heartbeat_echo": pb.HeartbeatEcho(number=1)},
            {"result_acknowledged": pb.ResultAcknowledged(attempt=KEY.ref())},
            {"drain": pb.OrchestratorDrain(grace_ms=1)},
            {"refused": pb.Refused(attempt=KEY.ref(), failure=Failure(reason=Reason.REASON_STALE_FENCE))},
            {"refused": pb.Refused(failure=Failure(reason=Reason.REASON_DRAINING))},
            {"replaced": pb.Replaced(successor_instance_id="j")},
        )
    ],
    "accept": [lambda m: m.accept(KEY, 1.0)],
    "decline": [lambda m: m.decline(KEY, Draining("no"))],
    "progress": [lambda m: m.progress(KEY, b"p")],
    "save_checkpoint": [lambda m: m.save_checkpoint(KEY, b"c")],
    "report": [lambda m: m.report(KEY, b"r", 1.0), lambda m: m.report(KEY, b"r", 1.0, still_running=True)],
    "release": [lambda m: m.release(KEY)],
    "use": [lambda m: m.use(KEY, Budget(tokens=1))],
    "drain": [lambda m: m.drain(1.0)],
    "stop": [lambda m: m.stop()],
    "send_acceptances": [lambda m: m.send_acceptances()],
    "set_load": [lambda m: m.set_load(loop_lag_us=1, memory_bytes=1)],
    "handle_timer": [lambda m, at=at: m.handle_timer(at) for at in (0.1, 4.9, 6.0, 9.0, 60.0)],
    "unstored": [lambda m: m.unstored(KEY)],
}


def orchestrators() -> dict[str, s.OrchestratorSession]:
    """The orchestrator's end in every stage of a session."""
    found = {}
    options = s.OrchestratorSessionOptions(orchestrator_id="o", heartbeat_interval=LONG / 1000)
    session = s.OrchestratorSession(options, 0.0)
    found["new"] = deepcopy(session)
    session.receive_batch(from_agent(hello=HELLO), 0.0)
    found["checks the hello"] = deepcopy(session)
    session.welcome(session_epoch=1, now=0.0)
    found["open"] = deepcopy(session)
    session.offer(offer(KEY), TRACE, 0.0)
    found["offered"] = deepcopy(session)
    drained(session)
    session.receive_batch(from_agent(accepted=pb.Accepted(attempt=KEY.ref())), 0.0)
    session.receive_batch(from_agent(heartbeat=pb.Heartbeat(number=1, running=[KEY.ref()], free_slots=3)), 0.0)
    found["accepted"] = deepcopy(session)
    session.receive_batch(from_agent(result=pb.Result(attempt=KEY.ref(), response=b"r")), 0.0)
    found["reported"] = session
    return found


ORCHESTRATOR_CALLS: dict[str, list[Callable[[s.OrchestratorSession], Any]]] = {
    "receive_batch": [
        lambda m, body=body: m.receive_batch(from_agent(**body), 1.0)
        for body in (
            {"hello": HELLO},
            {"hello": pb.Hello(agent_id="a", instance_id="i", protocol_min=90, protocol_max=91, slots=1)},
            {"accepted": pb.Accepted(attempt=KEY.ref())},
            {"declined": pb.Declined(attempt=KEY.ref())},
            {"progress": pb.Progress(attempt=KEY.ref(), index=1)},
            {"result": pb.Result(attempt=KEY.ref(), response=b"r")},
            {"result": pb.Result(attempt=NEXT.ref(), response=b"r")},
            {"progress": pb.Progress(attempt=KEY.ref(), index=2, missing=1)},
            {"directive_acknowledged": pb.DirectiveAcknowledged(attempt=KEY.ref(), number=1)},
            {"checkpoint": pb.Checkpoint(attempt=KEY.ref(), number=1)},
            {"usage": pb.Usage(attempt=KEY.ref(), total=Budget(tokens=1))},
            {"checkpoint": pb.Checkpoint(attempt=KEY.ref(), number=1, payload=bytes(1 << 20))},
            {"chunk": pb.Chunk(transfer=1, attempt=KEY.ref(), total=2, data=b"a")},
            {"chunk": pb.Chunk(transfer=1, attempt=KEY.ref(), total=1 << 40, data=b"a")},
            {"cancel_acknowledged": pb.CancelAcknowledged(attempt=KEY.ref())},
            {"heartbeat": pb.Heartbeat(number=2, running=[NEXT.ref()])},
            {"drain": pb.AgentDrain()},
        )
    ],
    "connection_lost": [lambda m: m.connection_lost(1.0)],
    "welcome": [lambda m: m.welcome(session_epoch=2, now=1.0)],
    "refuse_session": [lambda m: m.refuse_session(Draining("no"))],
    "replace": [lambda m: m.replace("j")],
    "offer": [lambda m: m.offer(offer(NEXT), TRACE, 1.0)],
    "cancel": [lambda m: m.cancel(KEY, grace_ms=1)],
    "direct": [lambda m: m.direct(KEY, b"d")],
    "acknowledge": [lambda m: m.acknowledge(KEY)],
    "update_budgets": [lambda m: m.update_budgets(KEY, (), Budget())],
    "acknowledge_progress": [lambda m: m.acknowledge_progress(KEY, 1)],
    "replay_progress": [lambda m: m.replay_progress(KEY), lambda m: m.replay_progress(KEY, 3)],
    "acknowledge_checkpoint": [lambda m: m.acknowledge_checkpoint(KEY, 1)],
    "refuse": [lambda m: m.refuse(KEY, StaleFence("no"))],
    "echo": [lambda m: m.echo(1)],
    "drain": [lambda m: m.drain(1)],
    "handle_timer": [lambda m, at=at: m.handle_timer(at) for at in (0.1, 2.5, 60.0)],
}

QUERIES = {"messages_to_send", "next_timer"}
"""The shell's own calls: it makes them because it was woken."""


@pytest.mark.parametrize(
    ("machine", "calls"), [(s.AgentSession, AGENT_CALLS), (s.OrchestratorSession, ORCHESTRATOR_CALLS)]
)
def test_the_table_holds_every_public_method(machine: type, calls: dict[str, Any]) -> None:
    public = {name for name, _ in inspect.getmembers(machine, inspect.isfunction) if not name.startswith("_")}
    assert public == set(calls) | QUERIES


@pytest.mark.parametrize("name", sorted(AGENT_CALLS))
@pytest.mark.parametrize("stage", sorted(agents()))
def test_every_call_of_the_agents_end_wakes_its_shell(stage: str, name: str) -> None:
    for call in AGENT_CALLS[name]:
        Watched(agents()[stage]).call(call)


@pytest.mark.parametrize("name", sorted(ORCHESTRATOR_CALLS))
@pytest.mark.parametrize("stage", sorted(orchestrators()))
def test_every_call_of_the_orchestrators_end_wakes_its_shell(stage: str, name: str) -> None:
    for call in ORCHESTRATOR_CALLS[name]:
        Watched(orchestrators()[stage]).call(call)


def waits(machine: Any, call: Callable[[Any], Any]) -> tuple[bool, bool]:
    """Make a call. Return whether its messages leave at once, and whether they may wait for others."""
    drained(machine)
    now: list[str] = []
    machine.on_change = lambda: now.append("now")
    machine.on_later = lambda: now.append("later")
    call(machine)
    return "now" in now, "later" in now


def test_the_acknowledgement_of_a_result_may_wait_for_another_message() -> None:
    assert waits(orchestrators()["reported"], lambda m: m.acknowledge(KEY)) == (False, True)


def test_the_acceptance_of_an_offer_may_wait_for_its_result() -> None:
    machine = agents()["offered"]
    _, later = waits(machine, lambda m: m.accept(KEY, 0.0))
    assert later
    assert drained(machine) == 0


@pytest.mark.parametrize(
    ("machine", "call"),
    [
        (agents()["accepted"], lambda m: m.report(KEY, b"r", 0.0)),
        (agents()["offered"], lambda m: m.decline(KEY, Draining("no"))),
        (agents()["accepted"], lambda m: m.progress(KEY, b"p")),
        (orchestrators()["open"], lambda m: m.offer(offer(KEY), TRACE, 0.0)),
        (orchestrators()["accepted"], lambda m: m.cancel(KEY, grace_ms=1)),
        (orchestrators()["accepted"], lambda m: m.refuse(KEY, StaleFence("no"))),
    ],
)
def test_other_messages_do_not_wait(machine: Any, call: Any) -> None:
    assert waits(deepcopy(machine), call) == (True, False)


def delaying(stage: str = "offered") -> s.AgentSession:
    machine = agents()[stage]
    drained(machine)
    machine.on_later = lambda: None
    return machine


def bodies(machine: s.AgentSession) -> list[str | None]:
    batch = machine.messages_to_send()
    return [each.WhichOneof("body") for each in batch.messages] if batch else []


@pytest.mark.parametrize(
    ("report", "kind"),
    [
        (lambda m: m.report(KEY, b"r", 0.0), "result"),
        (lambda m: m.progress(KEY, b"p"), "progress"),
        (lambda m: m.save_checkpoint(KEY, b"c"), "checkpoint"),
    ],
)
def test_an_acceptance_leaves_with_the_first_report_of_its_attempt(report: Any, kind: str) -> None:
    machine = delaying()
    machine.accept(KEY, 0.0)
    assert machine.delays
    machine.receive_batch(from_orchestrator(offer=offer(NEXT)), 0.0)
    machine.decline(NEXT, Draining("no"))
    assert bodies(machine) == ["declined"]
    report(machine)
    assert bodies(machine) == ["accepted", kind]
    assert not machine.delays


def test_an_acceptance_waits_only_for_a_moment() -> None:
    machine = delaying()
    machine.accept(KEY, 0.0)
    assert bodies(machine) == []
    machine.send_acceptances()
    assert bodies(machine) == ["accepted"]


def test_an_acceptance_that_waits_is_lost_with_its_stream() -> None:
    machine = delaying()
    machine.accept(KEY, 0.0)
    machine.connection_lost(0.0)
    machine.connection_made(0.0)
    machine.send_acceptances()
    machine.receive_batch(from_orchestrator(welcome=pb.Welcome.FromString(WELCOME.SerializeToString())), 0.0)
    assert bodies(machine) == ["hello"]


def test_acceptances_wait_only_while_handlers_are_quick() -> None:
    machine = delaying("open")
    fence = 10

    def run(took: float) -> bool:
        nonlocal fence
        fence += 1
        key = AttemptKey(f"t{fence}", 1, fence)
        machine.receive_batch(from_orchestrator(offer=offer(key)), 0.0)
        machine.accept(key, 0.0)
        waited = machine.delays
        machine.report(key, b"r", took)
        drained(machine)
        machine.receive_batch(from_orchestrator(result_acknowledged=pb.ResultAcknowledged(attempt=key.ref())), 0.0)
        return waited

    assert all(run(0.001) for _ in range(20))
    slow = [run(1.0) for _ in range(20)]
    assert slow.count(True) <= 8
    assert not slow[-1]
    assert [run(0.001) for _ in range(3)] == [False, True, True]
