"""The root of the `orki` command: loads subcommands when they are used and turns errors into exit codes.

Exit codes: 0, success; 1, an operation was refused or failed; 2, wrong usage or an invalid setting. With 1 and 2, one
sentence is printed to standard error.
"""

from __future__ import annotations

import importlib
import sys
from typing import IO, Any, Final

import click
from click.shell_completion import CompletionItem

from orki_contract.errors import EventsUnavailable, InvalidSetting, OrchestratorUnavailable, OrkiError, StoreUnavailable
from orki_server._observers.redaction import safe_text

# Each command's module, which has a function of that name, and its description.
_COMMANDS: Final = {
    "agents": ("tasks", "List the agents of the fleet."),
    "answer": ("answer", "Answer a suspended task."),
    "budget": ("budget", "Show and raise budgets of tasks."),
    "audit": ("audit", "Verify and export the audit log."),
    "cancel": ("tasks", "Request cancellation of a task."),
    "contract": ("contract", "List, register and withdraw contracts."),
    "doctor": ("doctor", "Check the fleet's health and suggest next steps."),
    "explain": ("tasks", "Show what a task waits for."),
    "limit": ("limit", "Declare and list limits by key."),
    "observe": ("observe", "Run an observer: metrics, audit or feed."),
    "pause": ("pause", "Stop the offers of a service; its tasks wait."),
    "resume": ("pause", "End the pause of a service."),
    "schedule": ("schedule", "Submit tasks by cron expressions."),
    "serve": ("serve", "Run an orchestrator."),
    "streams": ("streams", "List the event streams and their consumer groups."),
    "submit": ("submit", "Submit a task and wait for its result."),
    "tasks": ("tasks", "List tasks, or show one task."),
    "token": ("token", "Create a bearer token."),
    "trace": ("trace", "Show the history of a task as a tree."),
    "up": ("up", "Run everything on this machine, for development."),
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
"""For each error: the next step, and the text that a message must contain for the step to apply."""


class CommandError(click.ClickException):
    """An error that ends the command with one line on standard error and exit code 1."""

    exit_code = 1

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the message as one line; unprintable characters are escaped."""
        click.echo(f"orki: {safe_text(self.message)}", file=file or sys.stderr)


class InvalidUsage(CommandError):
    """A setting is invalid; exit code 2."""

    exit_code = 2


class LazyGroup(click.Group):
    """A group that imports a command only when it is used, so that help and completion start quickly."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an `OrkiError` ends it with one sentence and exit code 1, an invalid setting with 2."""
        try:
            return super().invoke(ctx)
        except InvalidSetting as error:
            raise InvalidUsage(error.message) from error
        except OrkiError as error:
            text, step = _NEXT_STEPS.get(type(error), ("", ""))
            applies = step and text in error.message
            raise CommandError(f"{error.message.rstrip('.')}; {step}" if applies else error.message) from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the command names, sorted."""
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command; None if it does not exist."""
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"orki_server._cli.{_COMMANDS[cmd_name][0]}")
        command = getattr(module, cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in sorted(_COMMANDS.items())])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete command names without importing the commands."""
        names = [
            CompletionItem(name, help=text)
            for name, (_, text) in sorted(_COMMANDS.items())
            if name.startswith(incomplete)
        ]
        return [*names, *click.Command.shell_complete(self, ctx, incomplete)]


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": None, "max_content_width": 100},
    epilog="""\b
Exit codes:
  0  success
  1  the operation was refused or failed; standard error has one sentence
  2  wrong usage, or an invalid setting

Each command has its own help: orki COMMAND --help
""",
)
@click.version_option(package_name="orki-server", prog_name="orki")
def root() -> None:
    """Run and inspect a fleet of agents: its orchestrator, tasks, events and contracts.

    \b
    Start:   orki up
    Submit:  orki submit SERVICE.METHOD '{"field": "value"}'
    Inspect: orki tasks
             orki trace TASK
    """


def main() -> None:
    """Run the command line; the entry point of the `orki` script."""
    root(prog_name="orki")
