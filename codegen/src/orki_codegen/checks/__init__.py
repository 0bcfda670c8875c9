"""`orki-checks`: orki's contract rules as a plugin of `buf lint` and `buf breaking`, over PluginRPC.

    orki-checks --protocol                                        prints the protocol version
    orki-checks --spec [--format json]                            prints the procedures
    orki-checks /buf.plugin.check.v1.CheckService/Check           reads a request and writes the response

buf starts the plugin nine times a run. The first two forms import nothing else, and a procedure imports only protobuf
and `orki_contract`.
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
    """Handle one call and return the exit status; 2 for wrong arguments."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = False
    if "--format" in given:
        index = given.index("--format")
        name = given[index + 1] if index + 1 < len(given) else ""
        if name not in ("binary", "json"):
            return _fail(f'"{name}" is not a format')
        as_json = name == "json"
        del given[index : index + 2]
    if given == ["--protocol"]:
        answer = f"{_PROTOCOL}\n".encode()
    elif given == ["--spec"]:
        answer = _spec(as_json=as_json)
    elif len(given) == 1 and given[0] in _PROCEDURES:
        from orki_codegen.checks._procedures import respond

        answer = respond(given[0], sys.stdin.buffer.read(), as_json=as_json)
    else:
        return _fail(f"{' '.join(given) or 'no arguments'} is not a call")
    sys.stdout.buffer.write(answer)
    sys.stdout.buffer.flush()
    return 0


def _spec(*, as_json: bool) -> bytes:
    """Return the `pluginrpc.v1.Spec`: field 1 contains procedures, whose field 1 is the path."""
    if as_json:
        return (json.dumps({"procedures": [{"path": path} for path in _PROCEDURES]}) + "\n").encode()
    return b"".join(_field(_field(path.encode())) for path in _PROCEDURES)


def _field(value: bytes) -> bytes:
    """Encode field 1 with a length below 128."""
    return bytes((0x0A, len(value))) + value


def _fail(what: str) -> int:
    print(f"orki-checks: {what}: {_USAGE}", file=sys.stderr)
    return 2
