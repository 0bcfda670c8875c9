"""The changes that the rehearsal publishes: what is edited, what the gate must say, and whose version must rise."""

from __future__ import annotations

__all__ = ["SCENARIOS", "Edit", "Rewrite", "Scenario"]

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Edit:
    """One place of one file, and what comes there instead."""

    file: str
    before: str
    after: str

    def apply(self, root: Path) -> None:
        """Make the edit; the place must be there, and once."""
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.before) != 1:
            raise SystemExit(
                f"{self.file} holds {text.count(self.before)} times what the rehearsal edits: {self.before!r}"
            )
        path.write_text(text.replace(self.before, self.after), encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A line of hand-written modules, wherever it stands, and what comes there instead."""

    before: str
    after: str

    def apply(self, root: Path) -> None:
        """Make the edit; it must stand somewhere."""
        places = [*root.glob("packages/*/src/**/*.py"), *root.glob("examples/*/src/**/*.py")]
        texts = {path: path.read_text(encoding="utf-8") for path in places}
        found = {path: text for path, text in texts.items() if self.before in text}
        if not found:
            raise SystemExit(f"no module holds what the rehearsal rewrites: {self.before!r}")
        for path, text in found.items():
            path.write_text(text.replace(self.before, self.after), encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Scenario:
    """One change.

    Attributes:
        name: its letter and what is done.
        edits: the change itself.
        rule: what the gate must name.
        owner: whose version must rise.
        bump: by how much.
        affected: words that must stand where it is told who is concerned.
        follow: what hand-written code has to follow, once the break is meant; the build's imports would find it.
    """

    name: str
    edits: tuple[Edit, ...]
    rule: str
    owner: str
    bump: str
    affected: tuple[str, ...] = ()
    follow: tuple[Rewrite, ...] = ()


AGENTS = "proto/orki/events/v1/agent.proto"
AUDIT = "proto/orki/events/v1/audit.proto"

# The constant of a stream is called as the stream is.
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
        bump="minor",
    ),
    Scenario(
        "b: a stream is renamed",
        (Edit(AGENTS, 'name: "agents"', 'name: "lives"'),),
        rule="ORKI_STREAM_REMOVED",
        owner="orki-events",
        bump="major",
        affected=("metrics",),
        follow=(Rewrite(_IMPORT, _IMPORT.replace("AGENTS", "LIVES as AGENTS")),),
    ),
    Scenario(
        "c: a retention is lowered",
        (Edit(AGENTS, "max_entries: 100000", "max_entries: 50000"),),
        rule="ORKI_STREAM_ENTRIES_LOWERED",
        owner="orki-events",
        bump="major",
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
        bump="major",
    ),
    Scenario(
        "e: an rpc is deleted",
        (
            Edit(
                "proto/orki/control/v1/task.proto",
                "  // Registered task services, with their contracts.\n"
                "  rpc ListServices(ListServicesRequest) returns (ListServicesResponse);\n",
                "",
            ),
        ),
        rule="ORKI_RPC_REMOVED",
        owner="orki-control",
        bump="major",
    ),
    Scenario(
        "f: a comment is changed, and nothing else",
        (Edit(AUDIT, "// One deed.", "// One deed, by whomever."),),
        rule="CONTENT_CHANGED",
        owner="orki-events",
        bump="patch",
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
        bump="minor",
    ),
)
