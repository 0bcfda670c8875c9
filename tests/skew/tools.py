"""The hot path: tool clients and bridges of two versions, over a Unix socket."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actors.values import measuring
from control import check_mismatch, knows_v2
from stage import Stage, Wrong

__all__ = ["meet", "refused"]

CALLS = 50


def meet(stage: Stage, *, bridge: str, client: str) -> str:
    """A blocking client and one of coroutines call every tool that they know."""
    caller = stage.actor(client, "toolclient", **stage.actor(bridge, "bridge").expect("ready"), count=CALLS)
    first = caller.expect("done")
    check_measured(first["measured"], bridge, client)
    check_described(first["described"], bridge, client)
    calibrated = check_calibrated(first["calibrated"], bridge, client)
    check_measured(caller.expect("done"), bridge, client)
    return f"{2 * CALLS} frames each way, messages in their tails; {calibrated}"


def refused(stage: Stage, *, bridge: str, client: str, rule: str) -> str:
    """Both kinds of client learn that the contracts do not fit before a byte is misread."""
    caller = stage.actor(client, "toolclient", **stage.actor(bridge, "bridge").expect("ready"), count=CALLS)
    blocking, pipelined = (check_mismatch(caller.expect("refused"), rule) for _ in range(2))
    if blocking != pipelined:
        raise Wrong(f"one client is told {blocking}, the other {pipelined}")
    return blocking


def check_measured(measured: Any, bridge: str, client: str) -> None:
    """Frames: what both know arrives; a field behind the other's block is absent.

    Raises:
        Wrong: A value differs.
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
            raise Wrong(f"{client} expected {expected} of {bridge}, and read {found}")


def check_described(described: Mapping[str, Any], bridge: str, client: str) -> None:
    """Messages in the tail of a frame.

    Raises:
        Wrong: A value differs.
    """
    both = knows_v2(bridge) and knows_v2(client)
    language = "de" if both else "" if knows_v2(bridge) else "unknown here"
    wanted: dict[str, Any] = {"words": f"p in {language!r}", "built": -7}
    if knows_v2(client):
        wanted["maker"] = "orki" if both else ""
    if described != wanted:
        raise Wrong(f"{client} expected {wanted} of {bridge}, and read {dict(described)}")


def check_calibrated(calibrated: Any, bridge: str, client: str) -> str:
    """The tool that v2 added: done where it is served, refused by name where it is not."""
    if not knows_v2(client):
        wanted, words = None, "v1 calls nothing of v2"
    elif knows_v2(bridge):
        wanted, words = "calibrated p", "the added tool answers"
    else:
        wanted, words = "UnknownOpcode", "the added tool is refused as UnknownOpcode"
    if calibrated != wanted:
        raise Wrong(f"the tool that v2 added gave {calibrated!r} to {client}, not {wanted!r}")
    return words
