"""Tests of the two ends of a submitters' session: their tables, their laws, and random histories with cuts."""

from __future__ import annotations

import random
from enum import Enum
from typing import Any

import pytest

from orki.control.v1 import submitter_pb2 as pb
from orki.control.v1.attempt_pb2 import AttemptRef, TaskState
from orki.control.v1.task_pb2 import (
    CancelRequest,
    DirectRequest,
    Submission,
    TaskSnapshot,
    WatchedProgress,
    WatchResponse,
)
from orki_contract.errors import (
    InvalidArgument,
    LocalProtocolError,
    OrchestratorUnavailable,
    OrkiError,
    Overloaded,
    ProtocolVersion,
    RemoteProtocolError,
    TooLarge,
    UnknownTask,
)
from orki_contract.transitions import Transitions
from orki_control.session import BatchBounds
from orki_control.submitter import (
    CLIENT,
    REQUEST,
    SERVING,
    Answered,
    CancelArrived,
    ClientSession,
    ClientSessionOptions,
    ClientState,
    CreditArrived,
    DirectiveArrived,
    Failed,
    OrchestratorDraining,
    Request,
    RequestState,
    ServingOptions,
    ServingSession,
    ServingState,
    SessionEnded,
    SessionLost,
    SessionOpened,
    SubmissionsArrived,
    Updated,
    WatchArrived,
    WatchClosed,
)

REQUEST_PAIRS = """
WAITING  RequestSent        SENT
WAITING  WatchOpened        WATCHING
WAITING  CreditGranted      WAITING
WAITING  ConnectionLost     WAITING
WAITING  RequestAbandoned   CLOSED
SENT     RequestAnswered    CLOSED
SENT     SubmissionAccepted WATCHING
SENT     CreditGranted      SENT
SENT     RequestRefused     CLOSED
SENT     ConnectionLost     WAITING
SENT     RequestAbandoned   CLOSED
WATCHING WatchUpdated       WATCHING
WATCHING WatchEnded         CLOSED
WATCHING CreditGranted      WATCHING
WATCHING RequestRefused     CLOSED
WATCHING ConnectionLost     WAITING
WATCHING RequestAbandoned   CLOSED
"""

CLIENT_PAIRS = """
DISCONNECTED     Connected        AWAITING_WELCOME
DISCONNECTED     Disconnected     DISCONNECTED
DISCONNECTED     Stopped          ENDED
AWAITING_WELCOME SubmitterWelcome OPEN
AWAITING_WELCOME HelloTimeout     DISCONNECTED
AWAITING_WELCOME Disconnected     DISCONNECTED
AWAITING_WELCOME Stopped          ENDED
OPEN             ReplyReceived    OPEN
OPEN             SubmitterPong    OPEN
OPEN             SubmitterDrain   PEER_DRAINING
OPEN             PeerSilent       DISCONNECTED
OPEN             Disconnected     DISCONNECTED
OPEN             Stopped          ENDED
PEER_DRAINING    ReplyReceived    PEER_DRAINING
PEER_DRAINING    SubmitterPong    PEER_DRAINING
PEER_DRAINING    SubmitterDrain   PEER_DRAINING
PEER_DRAINING    PeerSilent       DISCONNECTED
PEER_DRAINING    Disconnected     DISCONNECTED
PEER_DRAINING    Stopped          ENDED
ENDED            Disconnected     ENDED
ENDED            Stopped          ENDED
"""

SERVING_PAIRS = """
AWAITING_HELLO SubmitterHello OPEN
AWAITING_HELLO SubmitterDrain AWAITING_HELLO
AWAITING_HELLO HelloTimeout   ENDED
AWAITING_HELLO Disconnected   ENDED
OPEN           TaskSubmit     OPEN
OPEN           TaskWatch      OPEN
OPEN           TaskUnwatch    OPEN
OPEN           CancelRequest  OPEN
OPEN           DirectRequest  OPEN
OPEN           ProgressCredit OPEN
OPEN           SubmitterPing  OPEN
OPEN           SubmitterDrain DRAINING
OPEN           Disconnected   ENDED
DRAINING       TaskSubmit     DRAINING
DRAINING       TaskWatch      DRAINING
DRAINING       TaskUnwatch    DRAINING
DRAINING       CancelRequest  DRAINING
DRAINING       DirectRequest  DRAINING
DRAINING       ProgressCredit DRAINING
DRAINING       SubmitterPing  DRAINING
DRAINING       SubmitterDrain DRAINING
DRAINING       Disconnected   ENDED
ENDED          SubmitterDrain ENDED
ENDED          Disconnected   ENDED
"""

MACHINES: list[tuple[Transitions[Any], str]] = [
    (REQUEST, REQUEST_PAIRS),
    (CLIENT, CLIENT_PAIRS),
    (SERVING, SERVING_PAIRS),
]
IDS = ["request", "client", "serving"]


@pytest.mark.parametrize(("machine", "written"), MACHINES, ids=IDS)
def test_the_table_has_exactly_the_listed_moves(machine: Transitions[Any], written: str) -> None:
    table = {
        (state.name, event.__name__, following.name)
        for state, row in machine.rows.items()
        for event, following in row.items()
    }
    assert table == {tuple(line.split()) for line in written.strip().splitlines()}


@pytest.mark.parametrize("error", [LocalProtocolError, RemoteProtocolError])
@pytest.mark.parametrize(("machine", "written"), MACHINES, ids=IDS)
def test_every_other_pair_raises_the_given_error(
    machine: Transitions[Any], written: str, error: type[OrkiError]
) -> None:
    legal = {tuple(line.split()[:2]) for line in written.strip().splitlines()}
    states: type[Enum] = type(machine.initial)
    refused = 0
    for state in states:
        for event in machine.events():
            if (state.name, event.__name__) not in legal:
                with pytest.raises(error, match=rf"{event.__name__} is illegal in state {state.name} \(legal there: "):
                    machine.next(state, event, error)
                refused += 1
    assert refused == len(states) * len(machine.events()) - len(legal)


def test_every_state_is_reachable() -> None:
    for machine, _ in MACHINES:
        reached = {machine.initial} | {following for row in machine.rows.values() for following in row.values()}
        states: type[Enum] = type(machine.initial)
        assert reached == set(states)


# --- the ends ---

RESULT, ALL = pb.WATCH_MODE_RESULT, pb.WATCH_MODE_ALL
LOST = OrchestratorUnavailable("cut")


class Pair:
    """A client's end and, while there is a stream, an orchestrator's end; the test moves the messages."""

    def __init__(self, **options: Any) -> None:
        self.client = ClientSession(ClientSessionOptions())
        self.options = ServingOptions(**{"orchestrator_id": "o", "ping_interval": 3.0, **options})
        self.now = 100.0
        self.connect()

    def connect(self) -> None:
        self.serving = ServingSession(self.options, self.now)
        self.client.connection_made(self.now)

    def opened(self) -> Pair:
        self.up()
        assert self.down() == [SessionOpened()]
        return self

    def up(self) -> list[Any]:
        """Move all messages of the client."""
        events: list[Any] = []
        while (batch := self.client.messages_to_send(self.now)) is not None:
            events += self.serving.receive_batch(batch.messages)
        return events

    def down(self) -> list[Any]:
        """Move all messages of the orchestrator."""
        events: list[Any] = []
        while (batch := self.serving.messages_to_send()) is not None:
            events += self.client.receive_batch(batch.messages, self.now)
        return events

    def cut(self) -> list[Any]:
        """Lose the stream and open another one."""
        self.serving.connection_lost()
        events = self.client.connection_lost(LOST)
        self.connect()
        return events + self.up_down()

    def up_down(self) -> list[Any]:
        assert self.up() == []
        events = self.down()
        assert events == [SessionOpened()]
        return []

    def submit(self, name: bytes = b"a", **options: Any) -> Request:
        return self.client.submit(Submission(method="x.Y/Z", request=name), name * 16, **options)


def task(task_id: str = "t1", state: TaskState.ValueType = TaskState.TASK_STATE_QUEUED, **fields: Any) -> TaskSnapshot:
    return TaskSnapshot(task_id=task_id, state=state, **fields)


def ended(task_id: str = "t1", **fields: Any) -> WatchResponse:
    return WatchResponse(task=task(task_id, TaskState.TASK_STATE_SUCCEEDED, **fields))


def delta(index: int) -> WatchResponse:
    return WatchResponse(progress=WatchedProgress(cursor=f"{index}-0", index=index))


def sent(machine: Any, *now: float) -> list[Any]:
    messages: list[Any] = []
    while (batch := machine.messages_to_send(*now)) is not None:
        messages += batch.messages
    return messages


def failed(events: list[Any]) -> list[Request]:
    return [event.request for event in events if isinstance(event, Failed)]


def numbers(events: list[Any]) -> list[int]:
    return [number for event in events for number, _ in event.submissions]


def test_a_submission_is_accepted_and_its_result_arrives() -> None:
    pair = Pair().opened()
    request = pair.submit(watch=RESULT)
    (arrived,) = pair.up()
    assert isinstance(arrived, SubmissionsArrived)
    ((number, submit),) = arrived.submissions
    assert (submit.submission.request, submit.repeated, submit.watch) == (b"a", False, RESULT)
    pair.serving.accept(number, task())
    assert pair.down() == [Answered(request, task())]
    assert pair.serving.watching(number)
    pair.serving.update(number, ended(response=b"r"))
    assert pair.down() == [Updated(request, ended(response=b"r"))]
    assert request.closed
    assert pair.client.idle
    assert not pair.serving.watching(number)


def test_everything_that_gathered_leaves_in_one_batch_of_bounded_size() -> None:
    pair = Pair().opened()
    for _ in range(300):
        pair.submit(b"x" * 2000)
    sizes = []
    while (batch := pair.client.messages_to_send(pair.now)) is not None:
        sizes.append((len(batch.messages), batch.ByteSize()))
        pair.serving.receive_batch(batch.messages)
    assert sum(count for count, _ in sizes) == 300
    assert len(sizes) > 1
    assert all(size <= BatchBounds().size for _, size in sizes)


def test_requests_beyond_the_bounds_wait_at_the_client() -> None:
    pair = Pair(max_requests=2, max_watches=3).opened()
    requests = [pair.submit(bytes([number]), watch=RESULT) for number in range(5)]
    assert numbers(pair.up()) == [1, 2]
    pair.serving.accept(1, task("t1"))
    pair.down()
    assert numbers(pair.up()) == [3]
    for number in (2, 3):
        pair.serving.accept(number, task(f"t{number}"))
    pair.down()
    assert pair.up() == []
    pair.serving.update(1, ended("t1"))
    pair.down()
    assert numbers(pair.up()) == [4]
    assert requests[4].state is RequestState.WAITING


def test_bytes_bound_requests_but_one_may_be_larger() -> None:
    pair = Pair(max_request_bytes=1000).opened()
    pair.submit(b"x" * 5000)
    pair.submit(b"y" * 100)
    assert numbers(pair.up()) == [1]
    pair.serving.accept(1, task())
    pair.down()
    assert numbers(pair.up()) == [2]


def test_a_client_that_ignores_the_bounds_is_refused_request_by_request() -> None:
    serving = ServingSession(ServingOptions(orchestrator_id="o", max_requests=1, max_watches=1), 0.0)
    hello = pb.SubmitterHello(protocol_min=1, protocol_max=1, max_message_bytes=1024)
    messages = [pb.SubmitterMessage(hello=hello)]
    messages += [pb.SubmitterMessage(request=number, submit=pb.TaskSubmit()) for number in (1, 2)]
    messages += [pb.SubmitterMessage(request=number, watch=pb.TaskWatch(mode=RESULT)) for number in (3, 4)]
    assert len(serving.receive_batch(messages)) == 2
    reasons = {reply.request: reply.failure.reason for reply in sent(serving) if reply.HasField("failure")}
    assert reasons == {2: Overloaded.reason, 4: Overloaded.reason}


def test_a_request_that_no_batch_can_carry_fails_alone() -> None:
    pair = Pair(max_message_bytes=2048)
    early = pair.submit(b"x" * 4000)
    small = pair.submit(b"y")
    pair.up()
    events = pair.down()
    assert events[0] == SessionOpened()
    assert [type(event.error) for event in events[1:]] == [TooLarge]
    assert early.closed
    assert numbers(pair.up()) == [1]
    assert small.number == 1
    with pytest.raises(TooLarge):
        pair.submit(b"z" * 4000)


def test_an_update_that_the_client_cannot_take_fails_its_watch_only() -> None:
    pair = Pair().opened()
    pair.client._options = ClientSessionOptions(max_message_bytes=4096)
    pair.cut()
    first, second = pair.submit(b"a", watch=RESULT), pair.submit(b"b", watch=RESULT)
    pair.up()
    for number in (1, 2):
        pair.serving.accept(number, task(f"t{number}"))
    assert not pair.serving.update(1, ended("t1", response=b"r" * 5000))
    pair.serving.update(2, ended("t2", response=b"r" * 1000))
    events = pair.down()[2:]
    assert [(type(event), event.request) for event in events] == [(Failed, first), (Updated, second)]
    assert isinstance(events[0].error, TooLarge)


def test_a_cut_repeats_what_was_not_answered_and_watches_again() -> None:
    pair = Pair().opened()
    accepted, unanswered = pair.submit(b"a", watch=RESULT), pair.submit(b"b")
    watch = pair.client.watch("t9", ALL, credit=5)
    cancel = pair.client.cancel(CancelRequest(task_id="t8"))
    direct = pair.client.direct(DirectRequest(task_id="t7"))
    pair.up()
    # The cancel and the directive went first.
    pair.serving.accept(accepted.number, task("t1"))
    pair.serving.update(watch.number, delta(1))
    pair.serving.update(watch.number, delta(2))
    pair.down()
    pair.serving.accept(unanswered.number, task("t2"))  # the answer is lost
    events = pair.cut()
    assert [(type(event), event.request) for event in events] == [(Failed, direct)]
    assert isinstance(events[0].error, OrchestratorUnavailable)
    again = pair.up()
    assert [type(event) for event in again] == [CancelArrived, WatchArrived, SubmissionsArrived, WatchArrived]
    assert again[1].watch == pb.TaskWatch(task_id="t1", mode=RESULT)
    ((number, submit),) = again[2].submissions
    assert submit.repeated
    assert submit.submission_id == b"b" * 16
    position = again[3].watch.position
    assert again[3].watch == pb.TaskWatch(task_id="t9", mode=ALL, after="2-0", credit=3, position=position)
    assert position.index == 2
    pair.serving.accept(number, task("t2"))
    pair.serving.cancelled(again[0].number, task("t8"))
    assert {event.request for event in pair.down()} == {unanswered, cancel}
    assert accepted.state is watch.state is RequestState.WATCHING


def test_a_directive_is_sent_once() -> None:
    pair = Pair().opened()
    direct = pair.client.direct(DirectRequest(task_id="t1"))
    pair.up()
    pair.cut()
    assert direct.closed
    assert pair.up() == []


def test_a_directive_that_was_never_sent_waits_for_a_stream() -> None:
    pair = Pair().opened()
    pair.client.connection_lost(LOST)
    direct = pair.client.direct(DirectRequest(task_id="t1"))
    pair.connect()
    pair.up_down()
    ((number, _),) = [(event.number, event.direct) for event in pair.up() if isinstance(event, DirectiveArrived)]
    pair.serving.directed(number, AttemptRef(task_id="t1"))
    assert pair.down() == [Answered(direct, AttemptRef(task_id="t1"))]


def test_credit_bounds_progress_and_is_granted_again() -> None:
    pair = Pair().opened()
    watch = pair.client.watch("t1", ALL, credit=2)
    pair.up()
    assert pair.serving.credit(1) == 2
    pair.serving.update(1, delta(1))
    pair.serving.update(1, delta(2))
    assert pair.serving.credit(1) == 0
    pair.down()
    pair.client.grant(watch, 2)
    assert pair.up() == [CreditArrived(1)]
    assert pair.serving.credit(1) == 2


def test_an_abandoned_watch_is_closed_and_late_updates_are_ignored() -> None:
    pair = Pair().opened()
    watch = pair.client.watch("t1", RESULT)
    pair.up()
    pair.client.abandon(watch)
    pair.client.abandon(watch)
    pair.client.grant(watch, 1)
    pair.serving.update(1, ended())
    assert pair.down() == []
    assert pair.up() == []
    pair.client.watch("t2", RESULT)
    pair.up()
    assert pair.serving.watches == 1


def test_an_unwatch_frees_the_watch() -> None:
    pair = Pair().opened()
    watch = pair.client.watch("t1", RESULT)
    pair.up()
    pair.client.abandon(watch)
    assert pair.up() == [WatchClosed(1)]
    assert pair.serving.watches == 0
    assert not pair.serving.update(1, ended())
    assert pair.down() == []


def test_a_failure_hurts_its_request_only() -> None:
    pair = Pair().opened()
    bad, good = pair.submit(b"a"), pair.submit(b"b")
    pair.up()
    pair.serving.fail(1, InvalidArgument("method: none"))
    pair.serving.accept(2, task())
    failed, answered = pair.down()
    assert (failed.request, type(failed.error), failed.error.message) == (bad, InvalidArgument, "method: none")
    assert answered == Answered(good, task())


def test_an_unknown_kind_of_request_fails_and_the_session_goes_on() -> None:
    pair = Pair().opened()
    # Field 99 is a request of a newer client.
    unknown = pb.SubmitterMessage.FromString(b"\x08\x07\x9a\x06\x00")
    assert unknown.request == 7
    assert pair.serving.receive_batch([unknown]) == []
    (reply,) = sent(pair.serving)
    assert (reply.request, reply.failure.reason) == (7, InvalidArgument.reason)
    assert pair.client.receive_batch([pb.SubmitterReply.FromString(b"\x9a\x06\x00")], pair.now) == []


def test_nothing_but_hello_and_welcome_may_come_first() -> None:
    pair = Pair()
    with pytest.raises(RemoteProtocolError, match="first message is submit"):
        pair.serving.receive_batch([pb.SubmitterMessage(request=1, submit=pb.TaskSubmit())])
    with pytest.raises(RemoteProtocolError, match="AWAITING_WELCOME"):
        pair.client.receive_batch([pb.SubmitterReply(request=1, accepted=task())], 0.0)


@pytest.mark.parametrize(
    ("hello", "error"),
    [
        (pb.SubmitterHello(), RemoteProtocolError),
        (pb.SubmitterHello(protocol_min=2, protocol_max=1, max_message_bytes=4096), RemoteProtocolError),
        (pb.SubmitterHello(protocol_min=1, protocol_max=1, max_message_bytes=1), RemoteProtocolError),
        (pb.SubmitterHello(protocol_min=7, protocol_max=9, max_message_bytes=4096), ProtocolVersion),
    ],
)
def test_a_bad_hello_is_refused(hello: pb.SubmitterHello, error: type[OrkiError]) -> None:
    with pytest.raises(error):
        Pair().serving.receive_batch([pb.SubmitterMessage(hello=hello)])


def test_a_second_hello_and_numbers_that_do_not_rise_violate_the_protocol() -> None:
    pair = Pair().opened()
    with pytest.raises(RemoteProtocolError, match="SubmitterHello is illegal"):
        pair.serving.receive_batch([pb.SubmitterMessage(hello=pb.SubmitterHello())])
    for body in ({"submit": pb.TaskSubmit()}, {"watch": pb.TaskWatch()}, {"cancel": CancelRequest()}):
        pair = Pair().opened()
        message = pb.SubmitterMessage(request=3, **body)
        pair.serving.receive_batch([message])
        with pytest.raises(RemoteProtocolError, match="numbers must rise"):
            pair.serving.receive_batch([message])


@pytest.mark.parametrize(
    "reply",
    [
        pb.SubmitterReply(request=9, accepted=task()),
        pb.SubmitterReply(request=9, update=ended()),
        pb.SubmitterReply(request=0, update=ended()),
        pb.SubmitterReply(request=1, update=ended()),
    ],
)
def test_an_orchestrator_that_answers_what_was_not_asked_violates_the_protocol(reply: pb.SubmitterReply) -> None:
    pair = Pair().opened()
    pair.submit()
    pair.up()
    with pytest.raises(RemoteProtocolError):
        pair.client.receive_batch([reply], pair.now)


def test_a_hello_that_does_not_arrive_ends_the_stream() -> None:
    serving = ServingSession(ServingOptions(orchestrator_id="o", hello_timeout=5.0), 10.0)
    assert serving.next_timer() == 15.0
    assert serving.handle_timer(14.9) == []
    (event,) = serving.handle_timer(15.0)
    assert isinstance(event, SessionEnded)
    assert serving.state is ServingState.ENDED


def test_a_welcome_that_does_not_arrive_loses_the_stream() -> None:
    pair = Pair()
    assert pair.client.next_timer() == pair.now + 10.0
    (event,) = pair.client.handle_timer(pair.now + 10.0)
    assert isinstance(event, SessionLost)
    assert pair.client.state is ClientState.DISCONNECTED


def test_a_client_that_waits_pings_and_a_silent_orchestrator_loses_the_session() -> None:
    pair = Pair().opened()
    assert pair.client.next_timer() is None
    watch = pair.client.watch("t1", RESULT)
    pair.up()
    for number in (1, 2, 3):
        due = pair.client.next_timer()
        assert due == pair.now + 3.0 * number
        assert pair.client.handle_timer(due) == []
        assert [each.WhichOneof("body") for each in sent(pair.client, pair.now)] == ["ping"]
    due = pair.client.next_timer()
    assert due is not None
    (event,) = pair.client.handle_timer(due)
    assert isinstance(event, SessionLost)
    assert watch.state is RequestState.WAITING


def test_a_session_without_requests_may_be_silent_for_long() -> None:
    pair = Pair().opened()
    pair.now += 1000.0
    assert pair.client.next_timer() is None
    pair.client.watch("t1", RESULT)
    pair.up()
    assert pair.client.next_timer() == pair.now + 3.0


def test_a_cancel_overtakes_requests_that_wait() -> None:
    pair = Pair(max_watches=1).opened()
    for number in range(3):
        pair.client.watch(f"t{number}", RESULT)
    pair.client.cancel(CancelRequest(task_id="t0"))
    assert [type(event) for event in pair.up()] == [CancelArrived, WatchArrived]


def test_a_submission_that_is_given_up_leaves_no_watch() -> None:
    pair = Pair().opened()
    request = pair.submit(watch=RESULT)
    pair.up()
    pair.client.abandon(request)
    pair.up()
    pair.serving.accept(1, task())
    assert pair.down() == []
    assert pair.serving.watches == 0


def test_a_ping_is_answered() -> None:
    pair = Pair().opened()
    pair.client.watch("t1", RESULT)
    pair.up()
    pair.now += 3.0
    pair.client.handle_timer(pair.now)
    pair.up()
    assert pair.down() == []
    assert pair.client.next_timer() == pair.now + 3.0


def test_a_request_whose_time_is_over_fails() -> None:
    pair = Pair().opened()
    late, watch = pair.submit(deadline=105.0), pair.client.watch("t1", RESULT)
    pair.up()
    assert pair.client.next_timer() == 103.0
    events: Any = pair.client.handle_timer(105.0)
    assert [event.request for event in events] == [late]
    assert isinstance(events[0].error, OrchestratorUnavailable)
    pair.serving.accept(1, task())
    assert pair.down() == []
    assert watch.state is RequestState.WATCHING


def test_requests_are_given_up_when_no_stream_can_be_opened() -> None:
    pair = Pair()
    early, late, watch = pair.submit(deadline=5.0), pair.submit(b"b", deadline=9.0), pair.client.watch("t1", RESULT)
    pair.client.connection_lost(LOST)
    assert failed(pair.client.give_up(LOST, until=7.0)) == [early]
    assert failed(pair.client.give_up(LOST)) == [late, watch]
    assert pair.client.idle


def test_submissions_that_were_sent_are_not_given_up_to_another_protocol() -> None:
    pair = Pair().opened()
    sent_before, watch = pair.submit(), pair.client.watch("t1", RESULT)
    pair.up()
    pair.client.connection_lost(LOST)
    fresh = pair.submit(b"b")
    assert failed(pair.client.give_up(LOST)) == [watch, fresh]
    assert sent_before.state is RequestState.WAITING


def test_a_drain_is_announced_and_watches_go_on() -> None:
    pair = Pair().opened()
    watch = pair.client.watch("t1", RESULT)
    pair.up()
    pair.serving.drain()
    pair.serving.drain()
    assert pair.down() == [OrchestratorDraining(), OrchestratorDraining()]
    pair.serving.update(1, ended())
    assert pair.down() == [Updated(watch, ended())]


def test_a_stopped_client_fails_everything() -> None:
    pair = Pair(max_requests=1).opened()
    requests = [pair.submit(b"a"), pair.submit(b"b"), pair.client.watch("t1", RESULT)]
    pair.up()
    events: Any = pair.client.stop(LOST)
    assert {event.request for event in events} == set(requests)
    with pytest.raises(OrchestratorUnavailable):
        pair.submit()
    assert pair.client.connection_lost(LOST) == []


def test_answers_after_the_end_of_the_stream_are_dropped() -> None:
    pair = Pair().opened()
    pair.submit(watch=RESULT)
    pair.up()
    pair.serving.connection_lost()
    pair.serving.accept(1, task())
    pair.serving.fail(1, UnknownTask("gone"))
    assert not pair.serving.update(1, ended())
    pair.serving.drain()
    assert sent(pair.serving) == []


def test_every_message_wakes_the_writer() -> None:
    pair = Pair().opened()
    woken: list[str] = []
    pair.client.on_change = lambda: woken.append("client")
    pair.serving.on_change = lambda: woken.append("serving")
    watch = pair.client.watch("t1", ALL)
    assert woken.pop() == "client"
    pair.up()
    for call in (
        lambda: pair.submit(),
        lambda: pair.client.grant(watch, 1),
        lambda: pair.client.abandon(watch),
        lambda: pair.client.cancel(CancelRequest()),
        lambda: pair.client.direct(DirectRequest()),
    ):
        woken.clear()
        call()
        assert woken, call
    pair.up()
    for call in (
        lambda: pair.serving.accept(2, task()),
        lambda: pair.serving.cancelled(3, task()),
        lambda: pair.serving.directed(4, AttemptRef()),
        lambda: pair.serving.drain(),
    ):
        woken.clear()
        call()
        assert woken == ["serving"], call


@pytest.mark.parametrize(("watch", "expected"), [(RESULT, "later"), (None, "now")])
def test_the_answer_to_a_watched_submission_may_wait_for_the_result(watch: Any, expected: str) -> None:
    pair = Pair().opened()
    pair.submit(**({"watch": watch} if watch else {}))
    pair.up()
    woken: list[str] = []
    pair.serving.on_change = lambda: woken.append("now")
    pair.serving.on_later = lambda: woken.append("later")
    pair.serving.accept(1, task())
    assert woken == [expected]
    if watch:
        pair.serving.update(1, ended())
        assert woken == ["later", "now"]
        batch = pair.serving.messages_to_send()
        assert batch is not None
        assert [each.WhichOneof("body") for each in batch.messages] == ["accepted", "update"]


@pytest.mark.parametrize("seed", range(200))
def test_nothing_acknowledged_is_lost_or_doubled_over_any_cuts(seed: int) -> None:
    """Random interleavings: each submission makes one task, and each watch ends once with its task's result."""
    draw = random.Random(seed)
    pair = Pair(max_requests=draw.choice([1, 3, 100]), max_watches=draw.choice([2, 100]))
    tasks: dict[bytes, str] = {}
    created: list[str] = []
    open_watches: dict[int, str] = {}
    unanswered: list[tuple[int, pb.TaskSubmit]] = []
    requests: dict[Request, list[Any]] = {}

    def take(events: list[Any]) -> None:
        for event in events:
            match event:
                case SubmissionsArrived(submissions):
                    unanswered.extend(submissions)
                case WatchArrived(number, watch):
                    open_watches[number] = watch.task_id

    def give(events: list[Any]) -> None:
        for event in events:
            if isinstance(event, (Answered, Updated, Failed)):
                requests[event.request].append(event)

    def answer() -> None:
        number, submit = unanswered.pop(draw.randrange(len(unanswered)))
        if submit.submission_id not in tasks:
            assert not submit.repeated or submit.submission_id not in tasks
            tasks[submit.submission_id] = f"t{len(tasks)}"
            created.append(tasks[submit.submission_id])
        task_id = tasks[submit.submission_id]
        pair.serving.accept(number, task(task_id))
        if submit.watch:
            open_watches[number] = task_id

    def step(moves: list[str]) -> None:
        move = draw.choice(moves)
        if move == "submit" and len(requests) < 20:
            name = bytes([len(requests)])
            requests[pair.submit(name, watch=draw.choice([RESULT, pb.WATCH_MODE_UNSPECIFIED]))] = []
        elif move == "up" and (batch := pair.client.messages_to_send(pair.now)) is not None:
            take(pair.serving.receive_batch(batch.messages))
        elif move == "down" and (replies := pair.serving.messages_to_send()) is not None:
            give(pair.client.receive_batch(replies.messages, pair.now))
        elif move == "answer" and unanswered:
            answer()
        elif move == "end" and open_watches:
            number = draw.choice(list(open_watches))
            pair.serving.update(number, ended(open_watches.pop(number)))
        elif move == "cut":
            pair.serving.connection_lost()
            unanswered.clear()
            open_watches.clear()
            give(pair.client.connection_lost(LOST))
            pair.connect()

    for _ in range(300):
        step(["submit", "up", "up", "down", "down", "answer", "answer", "end", "cut"])
    for _ in range(2000):
        step(["up", "down", "answer", "end"])
    assert pair.client.idle
    assert sorted(created) == sorted(set(tasks.values()))
    assert len(tasks) == len(requests)
    for position, (request, events) in enumerate(requests.items()):
        expected = tasks[bytes([position]) * 16]
        answers = [event.outcome.task_id for event in events if isinstance(event, Answered)]
        results = [event.update.task.task_id for event in events if isinstance(event, Updated)]
        assert answers == [expected]
        assert results == ([expected] if request.mode else [])
