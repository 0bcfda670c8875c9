"""The changes that the rehearsal publishes, with the expected findings and bumps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from orki_contract.findings import Bump


@dataclass(frozen=True, slots=True)
class Edit:
    """A replacement of one text in one file."""

    file: str
    before: str
    after: str

    def apply(self, root: Path) -> None:
        """Make the edit; the text must occur exactly once."""
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.before) != 1:
            raise SystemExit(f"{self.file} contains {text.count(self.before)} times the text to edit: {self.before!r}")
        path.write_text(text.replace(self.before, self.after), encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A replacement of one line in all hand-written modules."""

    before: str
    after: str

    def apply(self, root: Path) -> None:
        """Make the edit; at least one module must contain the line."""
        places = [*root.glob("packages/*/src/**/*.py"), *root.glob("examples/*/src/**/*.py")]
        texts = {path: path.read_text(encoding="utf-8") for path in places}
        found = {path: text for path, text in texts.items() if self.before in text}
        if not found:
            raise SystemExit(f"no module contains the line to rewrite: {self.before!r}")
        for path, text in found.items():
            path.write_text(text.replace(self.before, self.after), encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Scenario:
    """One change.

    Attributes:
        name: Its letter and a description.
        edits: The change.
        rule: The rule that the gate must report.
        owner: The distribution whose version must be raised.
        bump: The bump that it needs.
        affected: Words that the report of affected parties must contain.
        follow: Edits of hand-written code that the change requires.
    """

    name: str
    edits: tuple[Edit, ...]
    rule: str
    owner: str
    bump: Bump
    affected: tuple[str, ...] = ()
    follow: tuple[Rewrite, ...] = ()


AGENTS = "proto/orki/events/v1/agent.proto"
AUDIT = "proto/orki/events/v1/audit.proto"

# The constant of a stream is named after the stream.
_IMPORT = "from orki.events.v1.agent_orki import AGENTS\n"

SCENARIOS = (
    Scenario(
        "a: a field is added",
        (
            Edit(
                AUDIT,
                "  string detail = 5 [(orki.options.v1.sensitive) = true];\n",
                "  string detail = 5 [(orki.options.v1.sensitive) = true];\n"
                "  // Where it was done.\n"
                "  string place = 6;\n",
            ),
        ),
        rule="ORKI_FIELD_ADDED",
        owner="orki-events",
        bump=Bump.MINOR,
    ),
    Scenario(
        "b: a stream is renamed",
        (Edit(AGENTS, 'name: "agents"', 'name: "lives"'),),
        rule="ORKI_STREAM_REMOVED",
        owner="orki-events",
        bump=Bump.MAJOR,
        affected=("metrics",),
        follow=(Rewrite(_IMPORT, _IMPORT.replace("AGENTS", "LIVES as AGENTS")),),
    ),
    Scenario(
        "c: a retention is lowered",
        (Edit(AGENTS, "max_entries: 100000", "max_entries: 50000"),),
        rule="ORKI_STREAM_ENTRIES_LOWERED",
        owner="orki-events",
        bump=Bump.MAJOR,
    ),
    Scenario(
        "d: a field of a frame is moved",
        (
            Edit(
                "proto/orki/hotpath/v1/tool.proto",
                "  uint32 max_frame_bytes = 1 [(orki.options.v1.offset) = 0];",
                "  uint32 max_frame_bytes = 1 [(orki.options.v1.offset) = 12];",
            ),
        ),
        rule="ORKI_FRAME_FIELD_MOVED",
        owner="orki-agent",
        bump=Bump.MAJOR,
    ),
    Scenario(
        "e: an rpc is deleted",
        (
            Edit(
                "proto/orki/control/v1/task.proto",
                "  // Lists registered task services with their contracts.\n"
                "  rpc ListServices(ListServicesRequest) returns (ListServicesResponse);\n",
                "",
            ),
        ),
        rule="ORKI_RPC_REMOVED",
        owner="orki-control",
        bump=Bump.MAJOR,
    ),
    Scenario(
        "f: a comment is changed, and nothing else",
        (Edit(AUDIT, "// One audited action.", "// One audited action, by anyone."),),
        rule="CONTENT_CHANGED",
        owner="orki-events",
        bump=Bump.PATCH,
    ),
    Scenario(
        "g: a type is changed that another package owns",
        (
            Edit(
                "proto/orki/errors/v1/errors.proto",
                "  // The handler raised an error.\n  REASON_HANDLER_FAILED",
                "  // Rehearsed.\n  REASON_REHEARSED = 99;\n  // The handler raised an error.\n  REASON_HANDLER_FAILED",
            ),
        ),
        rule="ORKI_ENUM_VALUE_ADDED",
        owner="orki-contract",
        bump=Bump.MINOR,
    ),
)
