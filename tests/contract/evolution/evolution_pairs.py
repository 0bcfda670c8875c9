"""Old and new protos for each rule of change, and a harmless twin of the new one, out of one file.

A pair is named after its rule. Lines carry what they belong to:

    name: "a" // old             only in the old version; `new` and `twin` likewise, and several in one line
    name: "b" // new!            and the finding stands on this line; on `old!` where nothing is left in the new one
    message Finding { // !       a line of all versions, on which the finding stands

and whole lines say the rest:

    // file: acme/v1/x.proto     what follows is a file of its own
    // also ORKI_…               the break breaks this rule as well, wherever
    // buf sees                  buf without the plugin reports the break too
    // newer NAME = 7 in Enum    the options are newer than the rules: an enum or a message has one more member

A file begins with its syntax, its package and the import of the options, unless it says so itself. So that all pairs
fit in one tree, `acme` is another name in each of them, and so are opcodes that begin with 0xAA.
"""

from __future__ import annotations

__all__ = ["PAIRS", "Pair", "lay_out"]

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
OPTIONS = ROOT / "proto/orki/options/v1/options.proto"
VERSIONS = ("old", "new", "twin")

_TAG = re.compile(r"\s*// (?P<tags>(?:old|new|twin)!?(?: (?:old|new|twin)!?)*|!)$")
_HEAD = 'syntax = "proto3";\npackage {package};\nimport "orki/options/v1/options.proto";\n'


@dataclass(frozen=True, slots=True)
class Pair:
    """One pair and its twin.

    Attributes:
        name: Of its file.
        rule: That the break breaks.
        also: Other rules that it breaks.
        seen: Whether bare buf reports it.
        newer: Members that its options have more, each with the enum or message that gets it.
        files: The files of each version, by path.
        marks: Where the findings of the rule stand: file, line, and whether that is in the old version.
    """

    name: str
    rule: str
    also: frozenset[str]
    seen: bool
    newer: tuple[tuple[str, str], ...]
    files: dict[str, dict[str, str]]
    marks: frozenset[tuple[str, int, bool]]

    @property
    def folder(self) -> str:
        """Where all of its files lie."""
        return f"acme{_slug(self.name)}/"


def read_pair(path: Path, index: int) -> Pair:
    """Reads one file."""
    own = f"acme{_slug(path.stem)}"
    text = re.sub(r"\bacme\b", own, path.read_text(encoding="utf-8"))
    text = text.replace(f'"{own}-', f'"p{index}-').replace("0xAA", f"0x{0x10 + index:02x}")
    files: dict[str, dict[str, str]] = {version: {} for version in VERSIONS}
    marks: set[tuple[str, int, bool]] = set()
    sections = re.split(r"^// file: (\S+)\n", text, flags=re.MULTILINE)
    for file, content in zip([f"{own}/v1/pair.proto", *sections[1::2]], sections[::2], strict=True):
        for version in VERSIONS:
            lines, marked = _lines(content, version)
            if not re.search(r"^(syntax|edition) ", content, re.MULTILINE):
                head = _HEAD.format(package=f"{own}.v1").splitlines()
                lines, marked = head + lines, [each + len(head) for each in marked]
            files[version][file] = "\n".join(lines) + "\n"
            if version != "twin":
                marks.update((file, line, version == "old") for line in marked)
    return Pair(
        name=path.stem,
        rule=re.sub(r"_\d+$", "", path.stem),
        also=frozenset(re.findall(r"^// also (\w+)$", text, re.MULTILINE)),
        seen="// buf sees\n" in text,
        newer=tuple(re.findall(r"^// newer (.+) in (\w+)$", text, re.MULTILINE)),
        files=files,
        marks=frozenset(marks),
    )


def lay_out(root: Path, pairs: Iterable[Pair], version: str) -> Path:
    """Writes one version of some pairs as a tree of its own, and returns it."""
    top = root / version
    options = OPTIONS.read_text(encoding="utf-8")
    for pair in pairs:
        for member, holder in pair.newer:
            options = re.sub(rf"((enum|message) {holder} {{.*?)\n}}", rf"\1\n  {member};\n}}", options, flags=re.DOTALL)
        for file, content in pair.files[version].items():
            place = top / "proto" / file
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(content, encoding="utf-8")
    home = top / "proto" / "orki/options/v1/options.proto"
    home.parent.mkdir(parents=True)
    home.write_text(options, encoding="utf-8")
    shutil.copy(ROOT / "buf.yaml", top)
    return top


def _lines(content: str, version: str) -> tuple[list[str], list[int]]:
    """The lines of one version, and the numbers of those on which a finding stands."""
    lines: list[str] = []
    marked: list[int] = []
    for line in content.splitlines():
        found = _TAG.search(line)
        tags = found["tags"].split() if found else []
        names = [tag.rstrip("!") for tag in tags]
        if found and names != [""] and version not in names:
            continue
        lines.append(line[: found.start()] if found else line)
        if f"{version}!" in tags or (tags == ["!"] and version == "new"):
            marked.append(len(lines))
    return lines, marked


def _slug(name: str) -> str:
    return name.removeprefix("ORKI").lower()


PAIRS = [read_pair(path, index) for index, path in enumerate(sorted(Path(__file__).with_name("pairs").glob("*.proto")))]
"""Every pair, by name."""
