"""The states of a consumer, and which events are possible in each."""

from __future__ import annotations

__all__ = ["TRANSITIONS", "State"]

from enum import StrEnum
from typing import Final

from orki_events.delivery_moves import (
    Acked,
    DeadLettered,
    DrainAsked,
    EntriesClaimed,
    EntriesRead,
    Event,
    Failed,
    GroupMissing,
    GroupsReady,
    HandedBack,
    Opened,
    Renewed,
    Returned,
    Succeeded,
    Unanswered,
    Wanted,
)


class State(StrEnum):
    """Where a consumer is in its life."""

    NEW = "new"
    CREATING = "creating groups"
    RECOVERING = "recovering"
    READING = "reading"
    DRAINING = "draining"
    CLOSED = "closed"


_NEW, _CREATING, _RECOVERING = State.NEW, State.CREATING, State.RECOVERING
_READING, _DRAINING, _CLOSED = State.READING, State.DRAINING, State.CLOSED

TRANSITIONS: Final[dict[tuple[State, type[Event]], tuple[State, ...]]] = {
    (_NEW, Opened): (_CREATING,),
    (_NEW, DrainAsked): (_CLOSED,),
    (_CREATING, GroupsReady): (_RECOVERING,),
    (_CREATING, EntriesRead): (_CREATING,),
    (_CREATING, EntriesClaimed): (_CREATING,),
    (_CREATING, Acked): (_CREATING,),
    (_CREATING, DeadLettered): (_CREATING,),
    (_CREATING, Renewed): (_CREATING,),
    (_CREATING, Unanswered): (_CREATING,),
    (_CREATING, GroupMissing): (_CREATING,),
    (_CREATING, Wanted): (_CREATING,),
    (_CREATING, Returned): (_CREATING,),
    (_CREATING, Succeeded): (_CREATING,),
    (_CREATING, Failed): (_CREATING,),
    (_CREATING, DrainAsked): (_DRAINING, _CLOSED),
    (_RECOVERING, EntriesRead): (_RECOVERING, _READING),
    (_RECOVERING, EntriesClaimed): (_RECOVERING,),
    (_RECOVERING, Acked): (_RECOVERING,),
    (_RECOVERING, DeadLettered): (_RECOVERING,),
    (_RECOVERING, Renewed): (_RECOVERING,),
    (_RECOVERING, Unanswered): (_RECOVERING,),
    (_RECOVERING, GroupMissing): (_CREATING,),
    (_RECOVERING, Wanted): (_RECOVERING,),
    (_RECOVERING, Returned): (_RECOVERING,),
    (_RECOVERING, Succeeded): (_RECOVERING,),
    (_RECOVERING, Failed): (_RECOVERING,),
    (_RECOVERING, DrainAsked): (_DRAINING, _CLOSED),
    (_READING, EntriesRead): (_READING,),
    (_READING, EntriesClaimed): (_READING,),
    (_READING, Acked): (_READING,),
    (_READING, DeadLettered): (_READING,),
    (_READING, Renewed): (_READING,),
    (_READING, Unanswered): (_READING, _RECOVERING),
    (_READING, GroupMissing): (_CREATING,),
    (_READING, Wanted): (_READING,),
    (_READING, Returned): (_READING,),
    (_READING, Succeeded): (_READING,),
    (_READING, Failed): (_READING,),
    (_READING, DrainAsked): (_DRAINING, _CLOSED),
    (_DRAINING, GroupsReady): (_DRAINING, _CLOSED),
    (_DRAINING, EntriesRead): (_DRAINING, _CLOSED),
    (_DRAINING, EntriesClaimed): (_DRAINING, _CLOSED),
    (_DRAINING, Acked): (_DRAINING, _CLOSED),
    (_DRAINING, DeadLettered): (_DRAINING,),
    (_DRAINING, Renewed): (_DRAINING, _CLOSED),
    (_DRAINING, HandedBack): (_DRAINING, _CLOSED),
    (_DRAINING, Unanswered): (_DRAINING, _CLOSED),
    (_DRAINING, GroupMissing): (_DRAINING, _CLOSED),
    (_DRAINING, Returned): (_DRAINING,),
    (_DRAINING, Succeeded): (_DRAINING,),
    (_DRAINING, Failed): (_DRAINING, _CLOSED),
    (_DRAINING, DrainAsked): (_DRAINING,),
    (_CLOSED, DrainAsked): (_CLOSED,),
}
"""Each legal pair of state and event, and the states that may follow. Every other pair is a LocalProtocolError."""
