"""What orchestrators tell each other by the store: mail about attempts, and queued tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from orki.errors.v1.errors_pb2 import Reason
from orki_control.session import AttemptKey
from orki_server._fields import MAIL_FIELDS
from orki_server._store.operations import Operation, shard_of

_AT_ONCE: Final = 64
"""Maximum number of entries in one read."""


class MailKind(StrEnum):
    """What a piece of mail is."""

    CANCEL = "cancel"
    DIRECT = "direct"
    ANSWER = "answer"
    """The answer to a directive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mail:
    """Mail from one orchestrator to another about an attempt. `orki_server._fields.MAIL_FIELDS` describes the fields.

    Attributes:
        kind: What it is.
        attempt: The attempt.
        agent_id: Its agent.
        method: The task's method.
        sender: The orchestrator that sent it.
        number: Cancel grace in milliseconds, or the sender's number of the directive.
        reason: Of an answer, why the directive was refused; unspecified if it was not.
        text: Message, or the directive's requester.
        payload: The directive message, serialized.
    """

    kind: MailKind
    attempt: AttemptKey
    agent_id: str
    method: str = ""
    sender: str = ""
    number: int = 0
    reason: Reason.ValueType = Reason.REASON_UNSPECIFIED
    text: str = ""
    payload: bytes = b""


class Posted(StrEnum):
    """The outcome of sending mail."""

    POSTED = "posted"
    ABSENT = "absent"
    """The orchestrator was not heard of lately."""
    FULL = "full"
    """It does not read its mail fast enough."""


def post(receiver: str, mail: Mail) -> Operation[Posted]:
    """Send mail to an orchestrator. Sent again, it arrives twice."""
    key = mail.attempt
    refusable = int(mail.kind is not MailKind.ANSWER)
    arguments = (
        *(receiver, refusable, mail.kind, key.task_id, key.attempt, key.fence, mail.agent_id, mail.method, mail.sender),
        *(mail.number, mail.reason, mail.text, mail.payload),
    )
    return Operation("post", shard_of(key.task_id), arguments, lambda reply: Posted(reply[0].decode()), patient=False)


def is_live(shard: int, orchestrator_id: str) -> Operation[bool]:
    """Find out whether an orchestrator was heard of within the last 3 s."""
    return Operation("is_live", shard, (orchestrator_id,), lambda reply: reply[0] == b"1", patient=False)


@dataclass(frozen=True, slots=True)
class Received:
    """The outcome of reading mail.

    Attributes:
        mail: The mail, which has left the mailbox.
        more: Whether there may be more.
    """

    mail: tuple[Mail, ...]
    more: bool


def read_mail(shard: int) -> Operation[Received]:
    """Take the orchestrator's oldest mail on one shard."""

    def outcome(reply: list[bytes]) -> Received:
        width = len(MAIL_FIELDS)
        rows = (reply[at : at + width] for at in range(1, len(reply), width))
        return Received(tuple(_mail(*row) for row in rows), reply[0] == b"1")

    return Operation("mail", shard, (_AT_ONCE,), outcome, patient=False)


def _mail(
    kind: bytes,
    task_id: bytes,
    attempt: bytes,
    fence: bytes,
    agent_id: bytes,
    method: bytes,
    sender: bytes,
    number: bytes,
    reason: bytes,
    text: bytes,
    payload: bytes,
) -> Mail:
    return Mail(
        kind=MailKind(kind.decode()),
        attempt=AttemptKey(task_id.decode(), int(attempt), int(fence)),
        agent_id=agent_id.decode(),
        method=method.decode(),
        sender=sender.decode(),
        number=int(number),
        reason=Reason.ValueType(int(reason)),
        text=text.decode(errors="replace"),
        payload=payload,
    )


def queue_lengths(shard: int, methods: Sequence[str]) -> Operation[dict[str, int]]:
    """Count the queued tasks of methods on one shard. The outcome leaves out methods without any."""

    def outcome(reply: list[bytes]) -> dict[str, int]:
        return {method: int(count) for method, count in zip(methods, reply, strict=True) if int(count)}

    return Operation("queue_lengths", shard, methods, outcome, patient=False)
