"""What the gate has to say: a change of one distribution, and the version that it asks for."""

from __future__ import annotations

__all__ = ["Remark", "as_json"]

import json
from collections.abc import Iterable
from dataclasses import dataclass

from packaging.version import Version

from orki_contract.descriptors import Location
from orki_contract.findings import Bump


@dataclass(frozen=True, slots=True, kw_only=True)
class Remark:
    """One change, or one fault.

    Attributes:
        rule: Its id: one of orki's (`ORKI_…`), of buf's, of the Python API's (`API_…`) or of the gate's own.
        package: The distribution whose version must tell of it.
        subject: What changed.
        place: Where.
        message: A sentence without a full stop.
        bump: What it asks for.
        since: The label of the release that it is a change from; empty for faults of the tree itself.
        needs: The least version that may promise it; None where a version cannot mend it.
        fails: Whether the gate is red because of it.
        wire: Whether running processes would misunderstand or fail each other.
        affected: Who is concerned.
    """

    rule: str
    package: str
    subject: str
    place: Location
    message: str
    bump: Bump
    since: str = ""
    needs: Version | None = None
    fails: bool = False
    wire: bool = False
    affected: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """The message with who is concerned, and since when."""
        affects = f"; affects {', '.join(self.affected)}" if self.affected else ""
        since = f" (since {self.since})" if self.since else ""
        return f"{self.message}{affects}{since}"


def as_json(remarks: Iterable[Remark]) -> str:
    """An array with an object for each remark."""
    shown = [
        {
            "rule": each.rule,
            "package": each.package,
            "subject": each.subject,
            "file": each.place.file,
            "line": each.place.line,
            "message": each.sentence,
            "bump": each.bump.value,
        }
        for each in remarks
    ]
    return json.dumps(shown, indent=2, ensure_ascii=False) + "\n"
