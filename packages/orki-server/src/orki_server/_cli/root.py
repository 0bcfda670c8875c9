"""The root of the `orki` command: its subcommands, each loaded when it is used, and how errors end it.

Exit codes: 0 done; 1 refused, failed or unhealthy, with one sentence on standard error; 2 wrong usage.
"""

from __future__ import annotations

import importlib
import sys
from typing import IO, Any, Final

import click

from orki_contract.errors import EventsUnavailable, OrchestratorUnavailable, OrkiError, StoreUnavailable
from orki_server._observers.redaction import safe_text

_COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "agents": ("orki_server._cli.tasks:agents", "Show the agents of the fleet."),
    "cancel": ("orki_server._cli.tasks:cancel", "Ask for the end of a task."),
    "contract": ("orki_server._cli.contract:contract", "Show the fleet's contracts, and register new ones ahead."),
    "doctor": ("orki_server._cli.doctor:doctor", "Look for what is wrong, and say what to do about it."),
    "observe": ("orki_server._cli.observe:observe", "Run an observer: metrics, audit or feed."),
    "serve": ("orki_server._cli.serve:serve", "Run an orchestrator."),
    "streams": ("orki_server._cli.streams:streams", "Show the event streams and their consumer groups."),
    "submit": ("orki_server._cli.submit:submit", "Submit a task, and wait for its result."),
    "tasks": ("orki_server._cli.tasks:tasks", "Show tasks."),
    "trace": ("orki_server._cli.trace:trace", "Show what became of a task, as one tree."),
    "up": ("orki_server._cli.up:up", "Run everything on this machine, for development."),
}


_REDIS_STEP: Final = "is that Redis running? check --redis and ORKI_REDIS_URL; `orki up` starts one of its own"
_NEXT_STEPS: Final[dict[type[OrkiError], tuple[str, str]]] = {
    OrchestratorUnavailable: (
        "",
        "is one running there? start one with `orki serve` or `orki up`, or check --orchestrator and ORKI_ORCHESTRATOR",
    ),
    StoreUnavailable: ("does not answer", _REDIS_STEP),
    EventsUnavailable: ("does not answer", _REDIS_STEP),
}
"""What to do about a server that is not there; for errors that say so with these words."""


class Refused(click.ClickException):
    """An error for people: what went wrong, where, and what to do."""

    exit_code = 1

    def show(self, file: IO[Any] | None = None) -> None:
        """Prints it as one line, whatever it holds."""
        click.echo(f"orki: {safe_text(self.message)}", file=file or sys.stderr)


def _refused(error: OrkiError) -> Refused:
    """The error for people, with what to do next where a server is not there."""
    words, step = _NEXT_STEPS.get(type(error), ("", ""))
    return Refused(f"{error.message.rstrip('.')}; {step}" if step and words in error.message else error.message)


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used, so that `--help` and completion are quick."""

    def __init__(self, *args: Any, lazy: dict[str, tuple[str, str]], **more: Any) -> None:
        """Args: lazy: for each command `MODULE:ATTRIBUTE` and one sentence on it; the rest goes to click."""
        super().__init__(*args, **more)
        self._lazy = lazy

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; an error of orki's ends it with one sentence and exit code 1."""
        try:
            return super().invoke(ctx)
        except OrkiError as error:
            raise _refused(error) from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, sorted."""
        return sorted({*super().list_commands(ctx), *self._lazy})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now; None when there is none."""
        if cmd_name not in self._lazy:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = self._lazy[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, self._lazy[name][1]) for name in sorted(self._lazy)])


@click.group(
    cls=LazyGroup,
    lazy=_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": None, "max_content_width": 100},
)
@click.version_option(package_name="orki-server", prog_name="orki")
def root() -> None:
    """A fleet of agents: its contract, its orchestrator, its events.

    \b
    Try it:  orki up
    Then:    orki submit SERVICE.METHOD '{"field": "value"}'
             orki tasks
             orki trace TASK
    """


def main() -> None:
    """Runs the command line; the entry point."""
    root(prog_name="orki")
