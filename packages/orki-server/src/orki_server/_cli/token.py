"""`orki token`: creates a bearer token."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import click

from orki_contract.errors import InvalidSetting


@click.command(
    epilog="""\b
Examples:
  orki token agent/reviewer-1 --out reviewer-1.token >> tokens
  orki token submitter/ci --out ci.token >> tokens

\b
Exit codes:
  0  success
  2  wrong usage, or the file cannot be created
""",
)
@click.argument("name")
@click.option(
    "--out",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="New file for the token, which only you may read. Its owner sets ORKI_TOKEN_FILE to it.",
)
def token(name: str, out: Path) -> None:
    """Create a bearer token and print its line for the tokens file of the orchestrator.

    NAME is agent/ID for the agent ID and its replicas ID.SUFFIX, or submitter/NAME. The line contains a hash, so the
    tokens file does not reveal the token. The token itself is only in FILE.
    """
    from orki_server._identity import TOKEN_NAME, token_hash

    if not TOKEN_NAME.match(name):
        raise InvalidSetting(f"{name!r}: use agent/ID or submitter/NAME, with letters, digits, `-`, `_` and `.`")
    token_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    try:
        descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(f"{token_id}.{secret}\n")
    except OSError as error:
        raise InvalidSetting(f"--out {out}: the file cannot be created: {error.strerror}") from error
    click.echo(f"{name} {token_id} {token_hash(secret)}")
