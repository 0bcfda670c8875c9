"""The plugin's face to buf: PluginRPC over arguments, standard input and standard output.

    orki-checks --protocol                                        the version of the protocol
    orki-checks --spec [--format json]                            the procedures
    orki-checks /buf.plugin.check.v1.CheckService/Check           a procedure: request in, response out

buf starts it anew for each of these, nine times a run. So the first two answer before anything else is imported, and
nothing is imported ever but protobuf and `orki_contract`.
"""

from __future__ import annotations

__all__ = ["main"]

import json
import sys
from collections.abc import Sequence
from typing import Final

_PROTOCOL: Final = "1"
_SERVICE: Final = "/buf.plugin.check.v1.CheckService"
_PROCEDURES: Final = (f"{_SERVICE}/Check", f"{_SERVICE}/ListRules", f"{_SERVICE}/ListCategories")
_USAGE: Final = "usage: orki-checks --protocol | --spec | PROCEDURE, with --format binary or --format json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Answers one call of buf; 0 unless the call itself makes no sense."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = False
    if "--format" in given:
        index = given.index("--format")
        name = given[index + 1] if index + 1 < len(given) else ""
        if name not in ("binary", "json"):
            return _fail(f'"{name}" is no format')
        as_json = name == "json"
        del given[index : index + 2]
    if given == ["--protocol"]:
        answer = f"{_PROTOCOL}\n".encode()
    elif given == ["--spec"]:
        answer = _spec(as_json=as_json)
    elif len(given) == 1 and given[0] in _PROCEDURES:
        from orki_codegen.checks.procedures import respond

        answer = respond(given[0], sys.stdin.buffer.read(), as_json=as_json)
    else:
        return _fail(f"{' '.join(given) or 'no argument'} makes no call")
    sys.stdout.buffer.write(answer)
    sys.stdout.buffer.flush()
    return 0


def _spec(*, as_json: bool) -> bytes:
    """The `pluginrpc.v1.Spec`: field 1 holds procedures, whose field 1 is the path."""
    if as_json:
        return (json.dumps({"procedures": [{"path": path} for path in _PROCEDURES]}) + "\n").encode()
    return b"".join(_field(_field(path.encode())) for path in _PROCEDURES)


def _field(value: bytes) -> bytes:
    """Field 1 with its length before it, which is below 128 here."""
    return bytes((0x0A, len(value))) + value


def _fail(what: str) -> int:
    print(f"orki-checks: {what}: {_USAGE}", file=sys.stderr)
    return 2
