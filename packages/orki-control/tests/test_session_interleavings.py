"""A model of both ends of a session with a store, handlers and an unreliable connection.

Streams break at any point and are noticed late, old streams go on beside new ones, the two directions run at their own
speed, time jumps, and cancels race results. Whatever the order, the laws of `session.proto` must hold, and neither end
may report a protocol error of the other.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orki.control.v1 import session_pb2 as pb
from orki.control.v1.attempt_pb2 import Failure
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import HandlerRejected, StaleFence
from orki_control import session as s
from orki_control.session import AttemptKey, AttemptState

LEASE = 8.0
ACCEPT = 2.0
HEARTBEAT = 2.0
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
ENDS = ("succeeded", "failed", "cancelled")
AT_WORK = (AttemptState.RUNNING, AttemptState.CANCELLING)


@dataclass
class Work:
    """A task in the store."""

    state: str = "queued"
    fence: int = 0
    attempt: int = 0
    deadline: float = 0.0
    cancel: bool = False
    endings: list[tuple[int, str]] = field(default_factory=list)


class Process:
    """An agent process: its machine, its handlers, and its current stream."""

    def __init__(self, instance: str, slots: int) -> None:
        options = s.AgentSessionOptions(
            agent_id="a", instance_id=instance, services=(), slots=slots, bounds=s.BatchBounds(count=3, size=2000)
        )
        self.session = s.AgentSession(options)
        self.instance = instance
        self.slots = slots
        self.stream: Stream | None = None
        self.running: set[AttemptKey] = set()
        self.given_up: set[AttemptKey] = set()
        self.started: set[AttemptKey] = set()
        self.unacknowledged: set[AttemptKey] = set()
        self.closed = False


class Stream:
    """Two queues of gRPC messages, and whether each end still considers the stream open."""

    def __init__(self, process: Process, now: float) -> None:
        self.process = process
        options = s.OrchestratorSessionOptions(
            orchestrator_id="o", heartbeat_interval=HEARTBEAT, bounds=s.BatchBounds(count=3, size=2000)
        )
        self.server = s.OrchestratorSession(options, now)
        self.up: deque[pb.ConnectRequest] = deque()
        self.down: deque[pb.ConnectResponse] = deque()
        self.broken = False
        self.server_gone = False
        self.last_fence: dict[str, int] = {}


class Fleet(RuleBasedStateMachine):
    """One agent id, one orchestrator, one store, one clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.tasks: dict[str, Work] = {}
        self.fences = 0
        self.epoch = 0
        self.processes: list[Process] = []
        self.streams: list[Stream] = []
        self.current: Stream | None = None

    @initialize(slots=st.integers(1, 3))
    def begin(self, slots: int) -> None:
        self.slots = slots
        self.start_process()
        self.dial()
        self.settle()
        for _ in range(3):
            self.submit()
        self.dispatch(1)

    def start_process(self) -> None:
        self.processes.append(Process(f"i{len(self.processes) + 1}", self.slots))

    @precondition(lambda self: len(self.processes) < 3)
    @rule()
    def new_instance(self) -> None:
        """Start the agent again; the old process may still run."""
        self.start_process()

    @precondition(lambda self: any(p.stream is None and not p.closed for p in self.processes))
    @rule()
    def dial(self) -> None:
        for process in self.processes:
            if process.stream is None and not process.closed:
                process.stream = Stream(process, self.now)
                self.streams.append(process.stream)
                process.session.connection_made(self.now)

    @precondition(lambda self: any(not each.broken for each in self.streams))
    @rule(data=st.data())
    def cut(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from([each for each in self.streams if not each.broken])).broken = True

    @precondition(lambda self: any(each.broken for each in self.streams))
    @rule(data=st.data(), agent=st.booleans())
    def notice(self, data: st.DataObject, agent: bool) -> None:
        """Report a cut to one end, after the messages that had reached it."""
        stream = data.draw(st.sampled_from([each for each in self.streams if each.broken]))
        if agent:
            if stream.process.stream is stream:
                self.agent_events(stream.process, stream.process.session.connection_lost(self.now))
                stream.process.stream = None
        elif not stream.server_gone:
            self.server_events(stream, stream.server.connection_lost(self.now))
            stream.server_gone = True
        self.forget_dead()

    def forget_dead(self) -> None:
        self.streams = [each for each in self.streams if not each.server_gone or each.process.stream is each]

    @precondition(lambda self: bool(self.streams))
    @rule(data=st.data(), up=st.booleans(), count=st.integers(1, 4))
    def carry(self, data: st.DataObject, up: bool, count: int) -> None:
        """Write and read some gRPC messages in one direction."""
        self.move(data.draw(st.sampled_from(self.streams)), up, count)

    @rule(up=st.booleans())
    def carry_all_one_way(self, up: bool) -> None:
        """Deliver all messages of one direction."""
        for stream in list(self.streams):
            self.move(stream, up, 50)

    @rule()
    def settle(self) -> None:
        """Deliver everything that can arrive."""
        for _ in range(6):
            for stream in list(self.streams):
                self.move(stream, True, 50)
                self.move(stream, False, 50)

    def move(self, stream: Stream, up: bool, count: int) -> None:
        process = stream.process
        if up and process.stream is stream and not stream.broken:
            while (request := process.session.messages_to_send()) is not None:
                stream.up.append(request)
        if not up and not stream.server_gone and not stream.broken:
            while (response := stream.server.messages_to_send()) is not None:
                stream.down.append(response)
        for _ in range(count):
            if up and stream.up and not stream.server_gone:
                batch = stream.up.popleft()
                self.server_events(stream, stream.server.receive_batch(batch.messages, self.now))
            elif not up and stream.down and process.stream is stream:
                answer = stream.down.popleft()
                for message in answer.messages:
                    self.note_offer(stream, message)
                self.agent_events(process, process.session.receive_batch(answer.messages, self.now))

    def note_offer(self, stream: Stream, message: pb.OrchestratorMessage) -> None:
        if message.WhichOneof("body") == "offer":
            key = AttemptKey.of(message.offer.attempt)
            assert key.fence > stream.last_fence.get(key.task_id, 0), "fences of a task only rise"
            stream.last_fence[key.task_id] = key.fence
            assert message.traceparent == TRACE

    def server_events(self, stream: Stream, events: list[s.OrchestratorEvent]) -> None:
        for event in events:
            match event:
                case s.HelloArrived():
                    self.greet(stream, event)
                case s.OffersAccepted(attempts):
                    for key in attempts:
                        self.accepted(stream, key)
                case s.OffersDeclined(declines):
                    self.requeue(*(decline.attempt for decline in declines))
                case s.OffersExpired(attempts):
                    self.requeue(*attempts)
                case s.ResultsArrived(results):
                    for key, result in results:
                        self.result(stream, key, result)
                case s.HeartbeatArrived(number=number, running=running):
                    for key in running:
                        self.renew(stream, key)
                    stream.server.echo(number)
                case s.SessionEnded():
                    stream.server_gone = True
                    stream.broken = True
                    if self.current is stream:
                        self.current = None

    def greet(self, stream: Stream, event: s.HelloArrived) -> None:
        instance = event.hello.instance_id
        newest = self.processes[-1].instance
        if self.current is not None and self.current is not stream:
            old = self.current
            if old.server.hello is not None and old.server.hello.instance_id != instance:
                self.server_events(old, old.server.replace(instance))
                old.server_gone, old.broken = False, False
            else:
                self.server_events(old, old.server.connection_lost(self.now))
        if instance != newest and any(p.instance == newest and p.started for p in self.processes):
            stream.server.refuse_session(HandlerRejected("an older instance"))
            return
        keep = []
        for key, has_result in event.held:
            work = self.tasks[key.task_id]
            if work.fence == key.fence and (work.state in ("offered", "running") or has_result):
                keep.append((key, TRACE))
                if work.state in ("offered", "running"):
                    work.state, work.deadline = "running", self.now + LEASE
        self.epoch += 1
        stream.server.welcome(session_epoch=self.epoch, keep=keep, now=self.now)
        self.current = stream
        for key, _ in keep:
            if self.tasks[key.task_id].cancel:
                stream.server.cancel(key, grace_ms=1000)

    def accepted(self, stream: Stream, key: AttemptKey) -> None:
        work = self.tasks[key.task_id]
        if work.fence == key.fence and work.state == "offered":
            work.state, work.deadline = "running", self.now + LEASE
        else:
            stream.server.refuse(key, StaleFence("withdrawn"))

    def result(self, stream: Stream, key: AttemptKey, result: pb.Result) -> None:
        work = self.tasks[key.task_id]
        end = {"response": "succeeded", "failure": "failed"}.get(str(result.WhichOneof("outcome")), "cancelled")
        if work.fence == key.fence and work.state not in ENDS:
            work.state = end
            work.endings.append((key.fence, end))
            assert stream.server.acknowledge(key)
        elif work.fence == key.fence and work.endings and work.endings[-1] == (key.fence, end):
            stream.server.acknowledge(key)
        else:
            stream.server.refuse(key, StaleFence("too late"))

    def renew(self, stream: Stream, key: AttemptKey) -> None:
        work = self.tasks[key.task_id]
        if work.fence == key.fence and work.state == "running":
            work.deadline = self.now + LEASE
        elif work.fence != key.fence or work.state in ENDS:
            stream.server.refuse(key, StaleFence("not yours any more"))

    def requeue(self, *keys: AttemptKey) -> None:
        for key in keys:
            work = self.tasks[key.task_id]
            if work.fence == key.fence and work.state in ("offered", "running"):
                work.state = "cancelled" if work.cancel else "queued"

    def expire(self) -> None:
        for task_id, work in self.tasks.items():
            if work.state in ("offered", "running") and self.now >= work.deadline:
                key = AttemptKey(task_id, work.attempt, work.fence)
                if work.state == "running":
                    assert all(key not in p.running for p in self.processes), "the agent stops before its lease ends"
                if self.current is not None:
                    self.current.server.refuse(key, StaleFence("the lease is over"))
                self.requeue(key)

    @precondition(lambda self: len(self.tasks) < 6)
    @rule()
    def submit(self) -> None:
        self.tasks[f"t{len(self.tasks)}"] = Work()

    @precondition(lambda self: self.current is not None and any(w.state == "queued" for w in self.tasks.values()))
    @rule(fraction=st.sampled_from([1, 1, 2]))
    def dispatch(self, fraction: int) -> None:
        for task_id, work in self.tasks.items():
            if self.current is None:
                return
            if work.state == "queued" and not work.cancel and self.current.server.free_slots:
                self.fences += 1
                work.fence, work.attempt, work.state = self.fences, work.attempt + 1, "offered"
                work.deadline = self.now + ACCEPT + 1
                key = AttemptKey(task_id, work.attempt, work.fence)
                offer = pb.Offer(
                    attempt=key.ref(), method="x.Y/Z", lease_ms=int(LEASE * 1000), accept_timeout_ms=int(ACCEPT * 1000)
                )
                self.current.server.offer(offer, TRACE, self.now)
                if fraction == 2:
                    return

    @precondition(lambda self: any(w.state not in ENDS for w in self.tasks.values()))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        task_id = data.draw(st.sampled_from(sorted(k for k, w in self.tasks.items() if w.state not in ENDS)))
        work = self.tasks[task_id]
        work.cancel = True
        if work.state == "queued":
            work.state = "cancelled"
        elif self.current is not None:
            self.current.server.cancel(AttemptKey(task_id, work.attempt, work.fence), grace_ms=1000)

    @precondition(lambda self: self.current is not None and any(w.state == "running" for w in self.tasks.values()))
    @rule(data=st.data())
    def direct(self, data: st.DataObject) -> None:
        task_id = data.draw(st.sampled_from(sorted(k for k, w in self.tasks.items() if w.state == "running")))
        if self.current is not None:
            work = self.tasks[task_id]
            self.current.server.direct(AttemptKey(task_id, work.attempt, work.fence), b"go on")

    @rule(really=st.sampled_from([False, False, True]))
    def server_drains(self, really: bool) -> None:
        if self.current is not None and really:
            self.requeue(*self.current.server.drain(1000))

    def agent_events(self, process: Process, events: list[s.AgentEvent]) -> None:
        for event in events:
            match event:
                case s.OffersArrived(offers):
                    for offer in offers:
                        self.answer(process, offer.attempt)
                case s.ResultsAcknowledged(attempts):
                    for key in attempts:
                        # The machine itself reports an attempt that was cancelled before it started.
                        assert key in process.unacknowledged or key not in process.started
                        process.unacknowledged.discard(key)
                case s.AttemptsRevoked(revocations):
                    for revocation in revocations:
                        self.stop(process, revocation.attempt)
                        process.unacknowledged.discard(revocation.attempt)
                case s.LeasesLost(attempts):
                    self.stop(process, *attempts)
                case s.SessionLost():
                    if process.stream is not None:
                        process.stream.broken = True
                        process.stream = None
                        self.forget_dead()
                case s.SessionClosed():
                    process.closed = True
                    process.running.clear()
                    process.unacknowledged.clear()
                    process.stream = None
                    self.forget_dead()

    def answer(self, process: Process, key: AttemptKey) -> None:
        if key.fence % 7 == 3:
            process.session.decline(key, HandlerRejected("not now"))
        elif process.session.accept(key, self.now):
            assert key not in process.started, "an attempt starts once"
            process.started.add(key)
            process.running.add(key)

    def stop(self, process: Process, *keys: AttemptKey) -> None:
        given_up = process.running.intersection(keys)
        process.running -= given_up
        process.given_up |= given_up

    def busy(self) -> list[tuple[Process, AttemptKey]]:
        return [(p, key) for p in self.processes if not p.closed for key in sorted(p.running)]

    @precondition(lambda self: bool(self.busy()))
    @rule(data=st.data(), how=st.sampled_from(["response", "failure", "cancelled", "unresponsive", "progress"]))
    def handler(self, data: st.DataObject, how: str) -> None:
        process, key = data.draw(st.sampled_from(self.busy()))
        session = process.session
        if how == "progress":
            assert session.progress(key, b"half")
            return
        process.running.discard(key)
        process.unacknowledged.add(key)
        if how == "response":
            assert session.report(key, b"done", self.now)
        elif how == "failure":
            assert session.report(key, Failure(reason=Reason.REASON_HANDLER_FAILED, message="no"), self.now)
        else:
            outcome = pb.CancelledOutcome(reason=Reason.REASON_CANCELLED)
            assert session.report(key, outcome, self.now, still_running=how == "unresponsive")
            if how == "unresponsive":
                process.given_up.add(key)

    @precondition(lambda self: any(p.given_up for p in self.processes))
    @rule(data=st.data())
    def given_up_handler_ends(self, data: st.DataObject) -> None:
        process, key = data.draw(st.sampled_from([(p, key) for p in self.processes for key in sorted(p.given_up)]))
        process.given_up.discard(key)
        process.session.release(key)

    @precondition(lambda self: any(not p.closed for p in self.processes))
    @rule(data=st.data(), really=st.sampled_from([False, False, True]))
    def agent_drains(self, data: st.DataObject, really: bool) -> None:
        process = data.draw(st.sampled_from([p for p in self.processes if not p.closed]))
        if really:
            self.agent_events(process, process.session.drain(self.now))

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 2.5, 7.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        """Fire the timers in their order; no message is delivered meanwhile."""
        until = self.now + seconds
        for _ in range(400):
            due = self.next_due()
            if due is None or due > until:
                break
            self.now = max(self.now, due)
            self.fire()
        self.now = until
        self.fire()

    def next_due(self) -> float | None:
        timers = [p.session.next_timer() for p in self.processes if not p.closed]
        timers += [each.server.next_timer() for each in self.streams if not each.server_gone]
        timers += [w.deadline for w in self.tasks.values() if w.state in ("offered", "running")]
        known = [each for each in timers if each is not None]
        return min(known) if known else None

    def fire(self) -> None:
        for process in self.processes:
            if not process.closed:
                self.agent_events(process, process.session.handle_timer(self.now))
        for stream in list(self.streams):
            if not stream.server_gone:
                self.server_events(stream, stream.server.handle_timer(self.now))
        self.expire()
        self.forget_dead()

    @invariant()
    def slots_are_never_exceeded(self) -> None:
        for stream in self.streams:
            held = [k for k, state in stream.server.attempts.items() if state is not AttemptState.REPORTED]
            assert len(held) <= self.slots
        for process in self.processes:
            assert len(process.running) <= process.slots

    @invariant()
    def a_result_is_kept_until_it_is_acknowledged(self) -> None:
        for process in self.processes:
            if not process.closed:
                held = process.session.attempts
                for key in process.unacknowledged:
                    assert held.get(key) is AttemptState.REPORTED

    @invariant()
    def one_ending_for_each_task(self) -> None:
        assert all(len(work.endings) <= 1 for work in self.tasks.values())

    @invariant()
    def machine_and_handlers_agree(self) -> None:
        for process in self.processes:
            if not process.closed:
                states = process.session.attempts.items()
                assert process.running == {key for key, state in states if state in AT_WORK}

    def teardown(self) -> None:
        """With a working connection and a running agent, every task must end."""
        process = self.processes[-1]
        for _ in range(60):
            if process.closed:
                return
            if process.stream is None or process.stream.broken:
                if process.stream is not None:
                    self.agent_events(process, process.session.connection_lost(self.now))
                process.stream = Stream(process, self.now)
                self.streams.append(process.stream)
                process.session.connection_made(self.now)
            self.settle()
            self.dispatch(1)
            for key in sorted(process.running):
                process.session.report(key, b"done", self.now)
                process.running.discard(key)
                process.unacknowledged.add(key)
            for key in sorted(process.given_up):
                process.session.release(key)
            process.given_up.clear()
            self.time_passes(0.5)
        assert not process.unacknowledged, "every result is acknowledged or refused in the end"
        if (
            process.session.state is not s.AgentState.DRAINING
            and self.current is not None
            and not self.current.server.draining
        ):
            assert all(work.state in ENDS for work in self.tasks.values()), "every task ends"


Fleet.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)


@pytest.mark.timeout(300)
class TestInterleavings(Fleet.TestCase):  # type: ignore[misc, valid-type]
    """Runs the model and checks its invariants."""
