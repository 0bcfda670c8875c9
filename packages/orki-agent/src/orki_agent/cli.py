"""`orki-agent`: runs an agent that somebody wrote.

Exit codes: 0 drained; 1 failed; 2 wrong usage; 3 refused or replaced by the orchestrator, so that starting again as it
is would help nobody.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Final

import click

from orki_agent.agent import Agent
from orki_agent.loading import load_agent
from orki_agent.settings import RunSettings, ToolsAt
from orki_contract.errors import (
    ContractMismatch,
    InvalidContract,
    InvalidSetting,
    OrkiError,
    ProtocolVersion,
    RemoteProtocolError,
    Replaced,
)

__all__ = ["main"]

_log = logging.getLogger("orki.agent")

_FAILED: Final = 1
_USAGE: Final = 2
_REFUSED: Final = 3
_STUCK_AFTER: Final = 5.0
"""Seconds for the process to end once its session is over; user code may hold the main thread."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="orki-agent")
def main() -> None:
    """Runs orki agents.

    An agent is a Python module with an `Agent` in it; `orki-agent run MODULE:ATTRIBUTE` keeps it in session with an
    orchestrator until it is stopped.
    """


@main.command(short_help="Run an agent until it is stopped.")
@click.argument("target", metavar="MODULE:ATTRIBUTE")
@click.option(
    "--orchestrator",
    metavar="HOST:PORT",
    envvar="ORKI_ORCHESTRATOR",
    default="127.0.0.1:50051",
    show_default=True,
    show_envvar=True,
    help="Where the orchestrator is.",
)
@click.option(
    "--agent-id",
    metavar="NAME",
    envvar="ORKI_AGENT_ID",
    show_envvar=True,
    help="Name in the fleet. A newer process of the same name takes the older one's place.  [default: KIND-HOST-PID]",
)
@click.option(
    "--slots",
    type=int,
    envvar="ORKI_SLOTS",
    show_envvar=True,
    help="Attempts at once.  [default: what the agent's module says]",
)
@click.option(
    "--events",
    "events_url",
    metavar="URL",
    envvar="ORKI_EVENTS_URL",
    show_envvar=True,
    help="Where the event plane is, such as redis://127.0.0.1:6379/0. With a password: by the environment, where `ps` "
    "does not show it.  [default: where the orchestrator says]",
)
@click.option(
    "--tools",
    metavar="SOCKET",
    envvar="ORKI_TOOLS",
    show_envvar=True,
    help="Socket of a tool bridge outside this process, in place of the agent's own tools.",
)
@click.option(
    "--tools-token-file",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    envvar="ORKI_TOOLS_TOKEN_FILE",
    show_envvar=True,
    help="File with the bridge's token, 32 bytes or 64 hex digits.",
)
@click.option(
    "--drain-grace",
    type=float,
    metavar="SECONDS",
    envvar="ORKI_DRAIN_GRACE",
    default=30.0,
    show_default=True,
    show_envvar=True,
    help="How long running attempts may go on after SIGTERM.",
)
@click.option("--insecure", is_flag=True, help="Let plaintext leave this host, on a network that you trust.")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    envvar="ORKI_LOG_LEVEL",
    default="info",
    show_default=True,
    show_envvar=True,
)
def run(
    target: str,
    tools: str | None,
    tools_token_file: Path | None,
    log_level: str,
    orchestrator: str,
    insecure: bool,
    drain_grace: float,
    **named: str | int | None,
) -> None:
    """Runs the agent that MODULE:ATTRIBUTE names, until it is stopped.

    The first SIGTERM or SIGINT drains it: no more offers, and what runs may end within the drain's grace. The second
    gives running attempts back at once. The third ends the process where it stands.

    \b
    Exit codes:
      0  drained
      1  failed
      2  wrong usage
      3  refused by the orchestrator, or replaced by a newer process of the same name

    \b
    Example:
      orki-agent run review.agent:agent --orchestrator 127.0.0.1:50051 --agent-id reviewer-1
    """
    logging.basicConfig(
        level=log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    )
    try:
        agent = load_agent(target)
        given = {name: value for name, value in named.items() if value not in (None, "")}
        settings = agent.settings(
            orchestrator,
            insecure=insecure,
            drain_grace=drain_grace,
            tools=_tools_at(tools, tools_token_file),
            **given,
        )
    except OrkiError as error:
        _say(error.message)
        sys.exit(_USAGE)
    sys.exit(_run(agent, settings))


def _run(agent: Agent, settings: RunSettings) -> int:
    """Runs to the end; the exit code."""
    _Signals(agent).install()
    code = _FAILED
    threading.Thread(target=_end_when_stuck, args=(agent,), name="orki-exit", daemon=True).start()
    try:
        asyncio.run(agent.run(settings))
        code = 0
    except (Replaced, ContractMismatch, ProtocolVersion, RemoteProtocolError) as error:
        _say(error.message)
        code = _REFUSED
    except (InvalidSetting, InvalidContract) as error:
        _say(error.message)
        code = _USAGE
    except OrkiError as error:
        _say(error.message)
    return code


class _Signals:
    """Each signal asks harder. Handlers run in the main thread between two bytecodes, also while user code spins."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._count = 0

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._count == 1:
            self._agent.drain()
        elif self._count == 2:
            self._agent.stop_now()
        else:
            os._exit(128 + number)


def _end_when_stuck(agent: Agent) -> None:
    """Ends the process where user code keeps the main thread from it after the session is over."""
    agent.served.wait()
    threading.Event().wait(_STUCK_AFTER)
    refused = agent.refused_by is not None
    _log.error("a handler holds the process; it is ended")
    logging.shutdown()
    os._exit(_REFUSED if refused else 0)


def _tools_at(path: str | None, token_file: Path | None) -> ToolsAt | None:
    """The bridge outside, whose token comes from a file or the environment, never from the command line.

    Raises:
        InvalidSetting: Half of it is missing, or the token is none.
    """
    secret = os.environ.get("ORKI_TOOLS_TOKEN", "")
    if not path:
        if token_file is not None:
            raise InvalidSetting("--tools-token-file is of use only with --tools SOCKET")
        return None
    if token_file is not None:
        content = token_file.read_bytes()
        if len(content) == 32:
            return ToolsAt(path=path, token=content)
        secret = content.decode("ascii", "replace").strip()
    if not secret:
        raise InvalidSetting("--tools needs the bridge's token: give --tools-token-file, or set ORKI_TOOLS_TOKEN")
    try:
        return ToolsAt(path=path, token=bytes.fromhex(secret))
    except ValueError:
        raise InvalidSetting("the tool bridge's token is neither 32 bytes nor 64 hex digits") from None


def _say(message: str) -> None:
    click.echo(f"orki-agent: {message}", err=True)
