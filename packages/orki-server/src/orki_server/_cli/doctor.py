"""`orki doctor`: checks the store, the orchestrator and the consumer groups, and suggests next steps."""

from __future__ import annotations

import asyncio
import time
from typing import Final

import click

from orki_contract.errors import OrkiError, PeerRefused
from orki_control import Credentials
from orki_events.registry import StreamRegistry
from orki_server._cli.formats import Columns, print_rows, sentence
from orki_server._cli.options import credentials, json_option, redis_option, run_async, with_orchestrator
from orki_server._health.findings import Check, Health, check_pauses
from orki_server._health.probe import ServerProbe, check_streams
from orki_server._keys import FleetKeys
from orki_server._store.fleet import read_pauses

_COLUMNS: Final = Columns(
    ("CHECK", "STATE", "VALUE", "CAUSE AND NEXT STEP"), uncut={"CHECK"}, wraps={"VALUE", "CAUSE AND NEXT STEP"}
)


@click.command(
    epilog="""\b
Examples:
  orki doctor
  orki doctor --json | jq '.checks[] | select(.verdict != "ok")'
  orki doctor --timeout 1 || echo unhealthy

\b
Exit codes:
  0  every check is ok or warn
  1  at least one check is bad
  2  wrong usage, or an invalid setting
""",
)
@click.option(
    "--timeout",
    default=3.0,
    show_default=True,
    type=click.FloatRange(0.1, 600),
    metavar="SECONDS",
    help="Time after which a server that has not answered counts as hung.",
)
@json_option
@redis_option
@with_orchestrator
@run_async
async def doctor(timeout: float, as_json: bool, redis_url: str, orchestrator: str, insecure: bool) -> None:
    """Check the store, the orchestrator and the consumer groups.

    Each check is ok, warn or bad and shows the measured value. A check that is not ok also shows its cause and the next
    step. docs/runbook.md explains the states in more detail.
    """
    from orki_control.transport import check_targets  # needs gRPC, and `--help` does not

    probe = ServerProbe.of(redis_url, server="store", timeout=timeout)
    identity = credentials()
    targets = check_targets(orchestrator, insecure=insecure, credentials=identity)
    orchestrators = asyncio.gather(*(_orchestrator(target, timeout, identity) for target in targets))
    store, answers = await asyncio.gather(_store(probe), orchestrators)
    checks = [*store, *answers]
    healthy = all(check.verdict is not Health.BAD for check in checks)
    value = {"healthy": healthy, "checks": [check.to_json() for check in checks]}
    rows = [(each.name, each.verdict.value, each.figure, f"{each.cause} {each.next_step}".strip()) for each in checks]
    print_rows(as_json, value, _COLUMNS, rows)
    if not healthy:
        click.get_current_context().exit(1)


async def _store(probe: ServerProbe) -> list[Check]:
    found = await probe.checks()
    try:
        if not any(check.name == "store.reachable" and check.state == "ok" for check in found):
            return found
        if probe.is_cluster:
            return found  # it has no streams
        found += check_pauses(
            read_pauses(await probe.link.execute((b"HVALS", FleetKeys.PAUSES))), time.time_ns() // 1000
        )
        streams = await check_streams(probe.link, StreamRegistry())
        return found + (streams or [Check("events.streams", "ok", "none registered yet")])
    except OrkiError as error:
        return [*found, Check("store.answers", "refused", "refused", sentence(error.message), "Fix the cause.")]
    finally:
        await probe.close()


async def _orchestrator(target: str, timeout: float, identity: Credentials) -> Check:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

    from orki_control.transport import error_from, open_channel

    name = "orchestrator"
    try:
        async with open_channel(target, credentials=identity) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout)
    except grpc.aio.AioRpcError as error:
        typed = error_from(error, target)
        if isinstance(typed, PeerRefused):
            step = "Set ORKI_TOKEN_FILE to a token that it knows, or ask its operator: docs/security.md."
            return Check(name, "refused", f"{target} refuses", sentence(typed.message), step)
        hung = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        silence = f"has not answered within {timeout:g} s" if hung else "does not answer"
        cause = f"{error.code().name}: {' '.join((error.details() or '').split())}"
        step = "Start it with orki serve, or use another address with --orchestrator."
        if identity.encrypted and "handshake failed" in cause:
            cause, step = sentence(typed.message), "Check the files of --tls-ca and of orki serve --server-certificate."
        elif "Socket closed" in cause:
            # TLS 1.3 tells a client only by closing that its certificate was refused.
            step = (
                "It may refuse the certificate: check --tls-certificate and --tls-key."
                if identity.encrypted
                else "It may require TLS: set --tls-ca."
            )
        return Check(name, "hung" if hung else "unreachable", f"{target} {silence}", cause, step)
    figure = f"{target} {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return Check(name, "ok", figure)
    cause = "The orchestrator runs but its store is down or may lose work, or it is stopping."
    return Check(name, "not-serving", figure, cause, "See the store's checks above and the orchestrator's log.")
