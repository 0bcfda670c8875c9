"""The store: the one place in the server that speaks to Redis."""

from orki_server.store.asks import Asked, Cancel, Direct, Submit, Submitted
from orki_server.store.contracts import Change, Contracts, Registered
from orki_server.store.fleet import Fleet, Greeting, Serving, digest_of
from orki_server.store.ids import new_task_id, shard_of, shard_of_key
from orki_server.store.link import address_of, without_credentials
from orki_server.store.looks import TERMINAL, Filter, Look, Seen
from orki_server.store.offers import Asker, Expired, Offer, Offered, RaiseEpoch, Sweep, Swept
from orki_server.store.opened import open_fleet
from orki_server.store.outbox import Outbox, Record
from orki_server.store.reports import (
    Accept,
    AcknowledgeCancel,
    Advance,
    Answer,
    Attach,
    Decline,
    EndCancelled,
    Fail,
    Kept,
    Renew,
    Succeed,
    Verdict,
)
from orki_server.store.store import Store
from orki_server.store.transition import Transition

__all__ = [
    "TERMINAL",
    "Accept",
    "AcknowledgeCancel",
    "Advance",
    "Answer",
    "Asked",
    "Asker",
    "Attach",
    "Cancel",
    "Change",
    "Contracts",
    "Decline",
    "Direct",
    "EndCancelled",
    "Expired",
    "Fail",
    "Filter",
    "Fleet",
    "Greeting",
    "Kept",
    "Look",
    "Offer",
    "Offered",
    "Outbox",
    "RaiseEpoch",
    "Record",
    "Registered",
    "Renew",
    "Seen",
    "Serving",
    "Store",
    "Submit",
    "Submitted",
    "Succeed",
    "Sweep",
    "Swept",
    "Transition",
    "Verdict",
    "address_of",
    "digest_of",
    "new_task_id",
    "open_fleet",
    "shard_of",
    "shard_of_key",
    "without_credentials",
]
