"""The `orki-agent` command.

Exit codes: 0 drained; 1 failed; 2 wrong usage; 3 refused or replaced by the orchestrator, so that a restart without a
change cannot help.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from orki_agent import Agent, RunSettings, ToolsAt

_log = logging.getLogger("orki.agent")

_FAILED: Final = 1
_USAGE: Final = 2
_REFUSED: Final = 3
_STUCK_AFTER: Final = 5.0
"""Seconds for the process to end after its session; user code may block the main thread."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="orki-agent")
def main() -> None:
    """Run orki agents.

    An agent is an `orki_agent.Agent` in a Python module. `orki-agent run MODULE:ATTRIBUTE` connects it to an
    orchestrator and serves tasks until it is stopped.
    """


@main.command(short_help="Run an agent until it is stopped.")
@click.argument("target", metavar="MODULE:ATTRIBUTE")
@click.option(
    "--orchestrator",
    metavar="HOST:PORT,…",
    envvar="ORKI_ORCHESTRATOR",
    default="127.0.0.1:50051",
    show_default=True,
    show_envvar=True,
    help="Address of the orchestrator; several separated by commas. After a loss the agent tries the next one.",
)
@click.option(
    "--agent-id",
    metavar="NAME",
    envvar="ORKI_AGENT_ID",
    show_envvar=True,
    help="Name in the fleet. A newer process with the same name replaces the older one.  [default: KIND-HOST-PID]",
)
@click.option(
    "--slots",
    type=int,
    envvar="ORKI_SLOTS",
    show_envvar=True,
    help="Maximum number of concurrent attempts.  [default: the agent's own setting]",
)
@click.option(
    "--label",
    "labels",
    multiple=True,
    metavar="NAME=VALUE",
    envvar="ORKI_LABELS",
    show_envvar=True,
    help="Label of the agent, such as gpu=a100; may be repeated, in the environment separated by spaces. Tasks "
    "that ask for labels go to agents that have all of them.",
)
@click.option(
    "--events",
    "events_url",
    metavar="URL",
    envvar="ORKI_EVENTS_URL",
    show_envvar=True,
    help="URL of the event plane, such as redis://127.0.0.1:6379/0. Give a URL with a password in the environment, "
    "where `ps` does not show it.  [default: the orchestrator's setting]",
)
@click.option(
    "--tools",
    metavar="SOCKET",
    envvar="ORKI_TOOLS",
    show_envvar=True,
    help="Socket of a tool bridge outside this process, which replaces the agent's own tools.",
)
@click.option(
    "--tools-token-file",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    envvar="ORKI_TOOLS_TOKEN_FILE",
    show_envvar=True,
    help="File with the bridge's token: 32 bytes or 64 hex digits.",
)
@click.option(
    "--drain-grace",
    type=float,
    metavar="SECONDS",
    envvar="ORKI_DRAIN_GRACE",
    default=30.0,
    show_default=True,
    show_envvar=True,
    help="Time that running attempts may go on after SIGTERM.",
)
@click.option(
    "--tls-ca",
    "ca",
    metavar="FILE",
    envvar="ORKI_TLS_CA",
    show_envvar=True,
    help="PEM file with the authorities of the orchestrators' certificates. Turns TLS on.",
)
@click.option(
    "--tls-certificate",
    "certificate",
    metavar="FILE",
    envvar="ORKI_TLS_CERTIFICATE",
    show_envvar=True,
    help="PEM file with the agent's certificate; its URI name is spiffe://DOMAIN/agent/NAME.",
)
@click.option(
    "--tls-key",
    "key",
    metavar="FILE",
    envvar="ORKI_TLS_KEY",
    show_envvar=True,
    help="PEM file with the key of the certificate.",
)
@click.option(
    "--token-file",
    metavar="FILE",
    envvar="ORKI_TOKEN_FILE",
    show_envvar=True,
    help="File with the agent's bearer token; or set ORKI_TOKEN to the token itself.",
)
@click.option(
    "--insecure", is_flag=True, help="Allow plaintext to leave this host. Use it only on a network that you trust."
)
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
    ca: str | None,
    certificate: str | None,
    key: str | None,
    token_file: str | None,
    drain_grace: float,
    labels: tuple[str, ...],
    **named: str | int | None,
) -> None:
    """Run the agent at MODULE:ATTRIBUTE until it is stopped.

    The first SIGTERM or SIGINT drains the agent: it accepts no more offers, and running attempts may go on for the
    drain grace. The second gives running attempts back at once. The third ends the process immediately.

    \b
    Exit codes:
      0  drained
      1  failed
      2  wrong usage
      3  refused by the orchestrator, or replaced by a newer process with the same name

    \b
    Example:
      orki-agent run review.agent:agent --orchestrator 127.0.0.1:50051 --agent-id reviewer-1
    """
    logging.basicConfig(
        level=log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    )
    from orki_contract.errors import OrkiError
    from orki_control import Credentials

    try:
        agent = load_agent(target)
        given = {name: value for name, value in named.items() if value not in (None, "")}
        settings = agent.settings(
            orchestrator,
            insecure=insecure,
            credentials=Credentials.from_environment(
                os.environ, ca=ca, certificate=certificate, key=key, token_file=token_file
            ),
            drain_grace=drain_grace,
            tools=_tools_at(tools, tools_token_file),
            labels=_labels(labels),
            **given,
        )
    except OrkiError as error:
        _print_error(error.message)
        sys.exit(_USAGE)
    sys.exit(_run(agent, settings))


def _labels(given: tuple[str, ...]) -> dict[str, str]:
    """Parse labels; raises InvalidSetting for one without `=` or a name that is given twice."""
    from orki_contract.errors import InvalidSetting

    labels: dict[str, str] = {}
    for each in given:
        name, sign, value = each.partition("=")
        if not sign or name in labels:
            raise InvalidSetting(f"label {each!r}: use NAME=VALUE, such as gpu=a100, and each name once")
        labels[name] = value
    return labels


def _run(agent: Agent, settings: RunSettings) -> int:
    """Run the agent to its end and return the exit code."""
    from orki_contract.errors import (
        ContractMismatch,
        InvalidContract,
        InvalidSetting,
        OrkiError,
        PeerRefused,
        ProtocolVersion,
        RemoteProtocolError,
        Replaced,
    )

    _Signals(agent).install()
    code = _FAILED
    threading.Thread(target=_end_when_stuck, args=(agent,), name="orki-exit", daemon=True).start()
    try:
        asyncio.run(agent.run(settings))
        code = 0
    except (Replaced, ContractMismatch, PeerRefused, ProtocolVersion, RemoteProtocolError) as error:
        _print_error(error.message)
        code = _REFUSED
    except (InvalidSetting, InvalidContract) as error:
        _print_error(error.message)
        code = _USAGE
    except OrkiError as error:
        _print_error(error.message)
    return code


class _Signals:
    """Drains on the first signal, gives attempts back on the second, exits on the third.

    Python runs signal handlers in the main thread between two bytecodes, also while user code is busy.
    """

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
    """End the process if user code still blocks the main thread after the session has ended."""
    agent.served.wait()
    threading.Event().wait(_STUCK_AFTER)
    refused = agent.refused_by is not None
    _log.error("a handler blocks the process; the process is ended")
    logging.shutdown()
    os._exit(_REFUSED if refused else 0)


def _tools_at(path: str | None, token_file: Path | None) -> ToolsAt | None:
    """Return the external bridge. Its token comes from a file or the environment, never from the command line.

    Raises:
        InvalidSetting: The path or the token is missing, or the token is malformed.
    """
    from orki_agent import ToolsAt
    from orki_contract.errors import InvalidSetting

    secret = os.environ.get("ORKI_TOOLS_TOKEN", "")
    if not path:
        if token_file is not None:
            raise InvalidSetting("--tools-token-file needs --tools SOCKET")
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


def _print_error(message: str) -> None:
    click.echo(f"orki-agent: {message}", err=True)


def load_agent(target: str) -> Agent:
    """Return the agent at `MODULE:ATTRIBUTE`. The current directory is searched first, as with `python -m`.

    Raises:
        InvalidSetting: `target` has another form, the module cannot be imported, or its attribute is not an agent.
    """
    from orki_agent import Agent
    from orki_contract.errors import InvalidSetting

    name, colon, attribute = target.partition(":")
    if not colon or not name or not attribute:
        raise InvalidSetting(f"{target!r} is not MODULE:ATTRIBUTE, such as review.agent:agent")
    module = _import(name, target)
    try:
        found: Any = module
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise InvalidSetting(
            f"{target}: module {name} ({_file(module)}) has no {attribute}; {_agents(module)}"
        ) from None
    if isinstance(found, Agent):
        return found
    where = _defined(found) or _file(module)
    hint = "name the Agent(...) itself, not what creates it" if callable(found) else _agents(module)
    raise InvalidSetting(f"{target} is {_article(found)}, not an orki_agent.Agent ({where}); {hint}")


def _import(name: str, target: str) -> ModuleType:
    from orki_contract.errors import InvalidSetting, OrkiError

    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise InvalidSetting(
                f"{target}: no module is named {error.name}; run this where it can be imported, or set PYTHONPATH"
            ) from None
        raise InvalidSetting(f"{target}: {_last_line(error)}: {error}; install the missing package") from error
    except OrkiError as error:
        raise InvalidSetting(f"{target}: {_last_line(error)}: {error.message}") from error
    except (Exception, SystemExit) as error:
        raise InvalidSetting(
            f"{target}: importing {name} failed at {_last_line(error)}: {type(error).__name__}: {error}"
        ) from error


def _last_line(error: BaseException) -> str:
    """Return `file:line` of the user's code that raised an error."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "importlib" not in frame.filename and "/orki_" not in frame.filename]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else "its import"


def _agents(module: ModuleType) -> str:
    from orki_agent import Agent

    names = sorted(name for name, value in vars(module).items() if isinstance(value, Agent))
    if names:
        return "it has " + ", ".join(f"{module.__name__}:{name}" for name in names)
    return 'it has no agent; add agent = Agent("reviewer", Reviewer()) to it'


def _file(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or "a package without a file"


def _defined(found: object) -> str:
    try:
        return f"{inspect.getsourcefile(found)}:{inspect.getsourcelines(found)[1]}"  # type: ignore[arg-type]
    except (TypeError, OSError):
        return ""


def _article(found: object) -> str:
    kind = "class" if isinstance(found, type) else type(found).__name__
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"
