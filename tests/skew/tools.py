"""The hot path: tool clients and bridges of two versions, over a Unix socket."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actors.values import measuring
from control import check_mismatch, knows_v2
from stage import CaseFailed, Stage

CALLS = 50


def meet(stage: Stage, *, bridge: str, client: str) -> str:
    """A blocking and an async client call every tool that they know."""
    caller = stage.actor(client, "toolclient", **stage.actor(bridge, "bridge").expect("ready"), count=CALLS)
    first = caller.expect("done")
    check_measured(first["measured"], bridge, client)
    check_described(first["described"], bridge, client)
    calibrated = check_calibrated(first["calibrated"], bridge, client)
    check_measured(caller.expect("done"), bridge, client)
    return f"{2 * CALLS} frames each way, messages in their tails; {calibrated}"


def refused(stage: Stage, *, bridge: str, client: str, rule: str) -> str:
    """Both kinds of client refuse an incompatible contract before a call."""
    caller = stage.actor(client, "toolclient", **stage.actor(bridge, "bridge").expect("ready"), count=CALLS)
    blocking, pipelined = (check_mismatch(caller.expect("refused"), rule) for _ in range(2))
    if blocking != pipelined:
        raise CaseFailed(f"the clients report different errors: {blocking} and {pipelined}")
    return blocking


def check_measured(measured: Any, bridge: str, client: str) -> None:
    """Check frames: shared fields arrive, and fields behind the other side's block are absent.

    Raises:
        CaseFailed: A value differs.
    """
    wanted = []
    for number in range(1, 1 + CALLS):
        sent = measuring(number)
        reply: dict[str, Any] = {"fraction": number / 1_024, "depth": sent["depth"], "probe": sent["probe"]}
        if knows_v2(client):
            reply["correction"] = float(sent["temperature"]) if knows_v2(bridge) else None
        wanted.append(reply)
    for expected, found in zip(wanted, measured, strict=True):
        if expected != found:
            raise CaseFailed(f"{client} expected {expected} of {bridge}, and read {found}")


def check_described(described: Mapping[str, Any], bridge: str, client: str) -> None:
    """Check messages in the tail of a frame.

    Raises:
        CaseFailed: A value differs.
    """
    both = knows_v2(bridge) and knows_v2(client)
    language = "de" if both else "" if knows_v2(bridge) else "unknown here"
    wanted: dict[str, Any] = {"words": f"p in {language!r}", "built": -7}
    if knows_v2(client):
        wanted["maker"] = "orki" if both else ""
    if described != wanted:
        raise CaseFailed(f"{client} expected {wanted} of {bridge}, and read {dict(described)}")


def check_calibrated(calibrated: Any, bridge: str, client: str) -> str:
    """Check that the tool added in v2 runs if it is served, and is refused otherwise."""
    if not knows_v2(client):
        wanted, words = None, "v1 calls nothing of v2"
    elif knows_v2(bridge):
        wanted, words = "calibrated p", "the added tool answers"
    else:
        wanted, words = "UnknownOpcode", "the added tool is refused as UnknownOpcode"
    if calibrated != wanted:
        raise CaseFailed(f"the tool that v2 added gave {calibrated!r} to {client}, not {wanted!r}")
    return words
