"""Options that many commands share, each read from the environment too."""

from __future__ import annotations

__all__ = ["json_option", "orchestrator_option", "redis_option", "watch_option"]

from typing import Final

import click

_ORCHESTRATOR: Final = "127.0.0.1:50051"
_REDIS: Final = "redis://127.0.0.1:6379/0"

orchestrator_option = click.option(
    "--orchestrator",
    metavar="HOST:PORT",
    envvar="ORKI_ORCHESTRATOR",
    default=_ORCHESTRATOR,
    show_default=True,
    show_envvar=True,
    help="Where the orchestrator answers.",
)

redis_option = click.option(
    "--redis",
    "redis_url",
    metavar="URL",
    envvar="ORKI_REDIS_URL",
    default=_REDIS,
    show_default=True,
    show_envvar=True,
    help="Where the events are. A URL with a password belongs into the environment, where `ps` does not show it.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON with stable keys instead of a table.")

watch_option = click.option("--watch", is_flag=True, help="Print again every second until interrupted.")
