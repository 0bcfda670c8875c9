"""Common changes and the versions that they need."""

from __future__ import annotations

from pathlib import Path

import pytest
from gate_trees import TODAY, Tree, evaluation_of

from orki_codegen._gate.findings import Evaluation
from orki_contract.findings import Bump

pytestmark = pytest.mark.timeout(300)

REVIEW = """
// What was found.
message Finding {
  option (orki.options.v1.stream) = {
    name: "findings"
    retention: {max_entries: 1000 max_age: {seconds: 86400}}
    groups: [{name: "index"}]
  };
  string path = 1;
  uint32 line = 2;
}
message Header {
  option (orki.options.v1.frame) = {version: 1 block_length: 16};
  fixed32 magic = 1 [(orki.options.v1.offset) = 0];
  fixed32 kind = 2 [(orki.options.v1.offset) = 4];
}
service Lookup {
  rpc Find(FindRequest) returns (FindResponse);
  rpc Forget(ForgetRequest) returns (ForgetResponse);
}
message FindRequest { string path = 1; }
message FindResponse { string text = 1; }
message ForgetRequest { string path = 1; }
message ForgetResponse {}
"""
PROTO = "acme/review/v1/review.proto"
DESK = """
import "acme/review/v1/review.proto";
option (orki.options.v1.consume) = {stream: "findings" group: {name: "desk"}};
message Sheet { repeated acme.review.v1.Finding findings = 1; }
"""
API = "acme-review/src/acme_review/__init__.py"
SOURCE = '''"""Reviews."""

__all__ = ["LIMIT", "Reviewer", "review"]
__version__ = "1"

LIMIT = 5 * 60


class Reviewer:
    def look(self, path, deep=False):
        return path

    def _inner(self, path):
        return path


def review(path):
    return path


def hidden(path):
    return path
'''

OLD = Tree(
    protos={PROTO: REVIEW, "acme/desk/v1/desk.proto": DESK},
    versions={"acme-review": "1.4.0", "acme-desk": "2.0.0"},
    needs={"acme-desk": ["acme-review>=1.4,<2"]},
    sources={API: SOURCE},
)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return OLD.lay_out(tmp_path_factory.mktemp("gate") / "old")


def needed(evaluation: Evaluation, package: str = "acme-review") -> dict[str, str]:
    """Return the rules of a distribution's findings with the versions that they need."""
    return {each.rule: str(each.needs) for each in evaluation.findings if each.package == package}


def reds(evaluation: Evaluation) -> set[str]:
    return {each.rule for each in evaluation.findings if each.fails}


def test_an_unchanged_tree_needs_no_release(old: Path, tmp_path: Path) -> None:
    """Tuning of a deployment changes no proto either."""
    evaluation = evaluation_of(old, OLD.lay_out(tmp_path))
    assert evaluation.bumps == {"acme-review": None, "acme-desk": None}
    assert evaluation.findings == ()


def test_an_added_field_is_minor_for_its_owner_only(old: Path, tmp_path: Path) -> None:
    new = OLD.edited(PROTO, "uint32 line = 2;", "uint32 line = 2;\n  string rule = 3;")
    evaluation = evaluation_of(old, new.lay_out(tmp_path / "a"))
    assert evaluation.bumps == {"acme-review": Bump.MINOR, "acme-desk": None}
    assert needed(evaluation) == {"ORKI_FIELD_ADDED": "1.5.0"}
    assert evaluation.red
    (finding,) = evaluation.findings
    assert finding.location.file == f"proto/{PROTO}"
    assert finding.location.line
    assert not evaluation_of(old, new.promising(acme_review="1.5.0").lay_out(tmp_path / "b")).red
    assert evaluation_of(old, new.promising(acme_review="1.4.1").lay_out(tmp_path / "c")).red


def test_a_renamed_stream_is_major_and_names_affected_parties(old: Path, tmp_path: Path) -> None:
    new = OLD.edited(PROTO, 'name: "findings"', 'name: "results"')
    evaluation = evaluation_of(old, new.lay_out(tmp_path / "a"))
    assert evaluation.bumps["acme-review"] is Bump.MAJOR
    (gone,) = [each for each in evaluation.findings if each.rule == "ORKI_STREAM_REMOVED"]
    assert str(gone.needs) == "2.0.0"
    assert 'group "desk"' in gone.sentence or "acme.desk.v1" in gone.sentence
    assert "acme-review 1.4.0" in gone.sentence


def test_ranges_of_dependants_must_exclude_the_version_before_a_break(old: Path, tmp_path: Path) -> None:
    new = OLD.edited(PROTO, 'name: "findings"', 'name: "results"').promising(acme_review="2.0.0", acme_desk="2.0.1")
    evaluation = evaluation_of(old, new.lay_out(tmp_path / "a"))
    (ranged,) = [each for each in evaluation.findings if each.fails]
    assert (ranged.rule, ranged.package, ranged.subject) == ("SIBLING_RANGE", "acme-desk", "acme-review")
    assert (ranged.location.file, ranged.location.line) == ("packages/acme-desk/pyproject.toml", 5)
    for bounds, red in (("acme-review>=1.4", True), ("acme-review>=2,<3", False)):
        moved = Tree(protos=new.protos, versions=new.versions, sources=new.sources, needs={"acme-desk": [bounds]})
        assert evaluation_of(old, moved.lay_out(tmp_path / str(red))).red is red


def test_a_lower_retention_is_major(old: Path, tmp_path: Path) -> None:
    lower = OLD.edited(PROTO, "max_entries: 1000", "max_entries: 999").lay_out(tmp_path / "a")
    assert needed(evaluation_of(old, lower)) == {"ORKI_STREAM_ENTRIES_LOWERED": "2.0.0"}
    more = OLD.edited(PROTO, "max_entries: 1000", "max_entries: 1001").lay_out(tmp_path / "b")
    assert needed(evaluation_of(old, more)) == {"ORKI_STREAM_RELAXED": "1.5.0"}


def test_a_moved_frame_field_is_major(old: Path, tmp_path: Path) -> None:
    new = OLD.edited(PROTO, "(orki.options.v1.offset) = 4]", "(orki.options.v1.offset) = 8]")
    assert needed(evaluation_of(old, new.lay_out(tmp_path)))["ORKI_FRAME_FIELD_MOVED"] == "2.0.0"


def test_a_deleted_rpc_is_major_by_the_rules_of_orki_and_buf(old: Path, tmp_path: Path) -> None:
    new = OLD.edited(PROTO, "  rpc Forget(ForgetRequest) returns (ForgetResponse);\n", "")
    assert needed(evaluation_of(old, new.lay_out(tmp_path))) == {"ORKI_RPC_REMOVED": "2.0.0", "RPC_NO_DELETE": "2.0.0"}


def test_a_comment_changes_no_contract(old: Path, tmp_path: Path) -> None:
    """Its change of the wheel is a patch; see the tests with an index."""
    new = OLD.edited(PROTO, "// What was found.", "// What was found, and where.")
    assert evaluation_of(old, new.lay_out(tmp_path)).findings == ()


def test_other_code_with_the_same_api_is_a_patch(old: Path, tmp_path: Path) -> None:
    new = OLD.edited(API, "return path\n\n\ndef hidden", "return path.strip()\n\n\ndef hidden")
    evaluation = evaluation_of(old, new.lay_out(tmp_path))
    assert needed(evaluation) == {"CONTENT_CHANGED": "1.4.1"}
    assert not evaluation.red, "unpublished contents may differ"


def test_a_changed_message_needs_a_release_of_its_owner_only(old: Path, tmp_path: Path) -> None:
    """The reader's image contains a copy of the changed message and needs no release."""
    new = OLD.edited(PROTO, "uint32 line = 2;", "uint64 line = 2;").promising(acme_review="2.0.0")
    evaluation = evaluation_of(old, new.lay_out(tmp_path))
    assert evaluation.bumps == {"acme-review": Bump.MAJOR, "acme-desk": None}
    assert reds(evaluation) == {"SIBLING_RANGE"}
    (retyped,) = [each for each in evaluation.findings if each.rule == "ORKI_FIELD_RETYPED"]
    assert "package acme.desk.v1" in retyped.affected


@pytest.mark.parametrize(
    ("before", "after", "rules"),
    [
        ("def review(path)", "def review(path, depth)", {"API_PARAMETER_ADDED_REQUIRED": "2.0.0"}),
        (
            "def review(path)",
            "def review(way)",
            {"API_PARAMETER_ADDED_REQUIRED": "2.0.0", "API_PARAMETER_REMOVED": "2.0.0"},
        ),
        ('"Reviewer", "review"]', '"Reviewer"]', {"API_OBJECT_REMOVED": "2.0.0"}),
        ("    def look(self", "    def gaze(self", {"API_OBJECT_REMOVED": "2.0.0", "API_ADDED": "1.5.0"}),
        ("def review(path)", "def review(path, depth=1)", {"CONTENT_CHANGED": "1.4.1"}),
        ("def hidden(path)", "def hidden()", {"CONTENT_CHANGED": "1.4.1"}),
        ("def _inner(self, path)", "def _inner(self)", {"CONTENT_CHANGED": "1.4.1"}),
        ('__version__ = "1"', '__version__ = "2"', {"CONTENT_CHANGED": "1.4.1"}),
        ("LIMIT = 5 * 60", "LIMIT = 6 * 60", {"CONTENT_CHANGED": "1.4.1"}),
        ('"Reviewer", "review"]', '"Reviewer", "hidden", "review"]', {"API_ADDED": "1.5.0"}),
    ],
)
def test_the_python_api(old: Path, tmp_path: Path, before: str, after: str, rules: dict[str, str]) -> None:
    evaluation = evaluation_of(old, OLD.edited(API, before, after).lay_out(tmp_path))
    assert needed(evaluation) == rules
    assert all(each.location.file == f"packages/{API}" and each.location.line for each in evaluation.findings)


def test_before_1_0_a_major_change_raises_the_second_number(tmp_path: Path) -> None:
    young = OLD.promising(acme_review="0.3.1", acme_desk="0.1.0")
    young = Tree(protos=young.protos, versions=young.versions, needs={"acme-desk": ["acme-review>=0.3,<0.4"]})
    old = young.lay_out(tmp_path / "old")
    field = young.edited(PROTO, "uint32 line = 2;", "uint32 line = 2;\n  string rule = 3;")
    assert needed(evaluation_of(old, field.lay_out(tmp_path / "a"))) == {"ORKI_FIELD_ADDED": "0.3.2"}
    assert not evaluation_of(old, field.promising(acme_review="0.3.2").lay_out(tmp_path / "b")).red
    renamed = young.edited(PROTO, 'name: "findings"', 'name: "results"').promising(acme_review="0.3.2")
    evaluation = evaluation_of(old, renamed.lay_out(tmp_path / "c"))
    assert needed(evaluation)["ORKI_STREAM_REMOVED"] == "0.4.0"
    assert evaluation.red


ACCEPTED = """
[[break]]
rule = "ORKI_STREAM_ENTRIES_LOWERED"
subject = 'stream "findings"'
package = "acme-review"
reason = "nobody reads back further"
until = {until}
"""


@pytest.mark.parametrize(
    ("until", "stale"),
    [("2026-11-20", False), ('"2026-11-20"', False), ("2026-11-19", True), ('"2.0.0"', False), ('"1.5.0"', True)],
)
def test_an_accepted_break_is_minor_until_its_end(old: Path, tmp_path: Path, until: str, stale: bool) -> None:
    new = OLD.edited(PROTO, "max_entries: 1000", "max_entries: 999").promising(acme_review="1.5.0").lay_out(tmp_path)
    evaluation = evaluation_of(old, new, accepted=ACCEPTED.format(until=until), today=TODAY)
    if stale:
        assert reds(evaluation) == {"ORKI_STREAM_ENTRIES_LOWERED", "ACCEPTED_BREAK_STALE"}
    else:
        assert not evaluation.red
        (finding,) = evaluation.findings
        assert (finding.bump, str(finding.needs)) == (Bump.MINOR, "1.5.0")
        assert "nobody reads back further" in finding.message


def test_an_accepted_break_without_a_match_is_stale(old: Path, tmp_path: Path) -> None:
    evaluation = evaluation_of(old, OLD.lay_out(tmp_path), accepted=ACCEPTED.format(until="2027-01-01"))
    (stale,) = evaluation.findings
    assert (stale.rule, stale.fails, str(stale.location)) == ("ACCEPTED_BREAK_STALE", True, "accepted-breaks.toml:2:1")


def test_streams_are_compared_with_every_version_with_remaining_entries(old: Path, tmp_path: Path) -> None:
    """1.5.0 removed a stream as an accepted break, and 1.6.0 uses its name for another message."""
    gap = OLD.edited(PROTO, 'name: "findings"', 'name: "other"').promising(acme_review="1.5.0")
    middle = gap.lay_out(tmp_path / "middle")
    back = Tree(
        protos={
            **gap.protos,
            PROTO: gap.protos[PROTO]
            + 'message Note { option (orki.options.v1.stream) = {name: "findings" retention: {max_entries: 1}}; }\n',
        },
        versions={"acme-review": "1.6.0", "acme-desk": "2.0.0"},
        needs=OLD.needs,
        sources=OLD.sources,
    ).lay_out(tmp_path / "new")
    assert not evaluation_of(middle, back).red
    evaluation = evaluation_of([middle, old], back, streams_only=[False, True])
    moved = [each for each in evaluation.findings if each.rule == "ORKI_STREAM_MOVED"]
    assert [(str(each.needs), each.fails) for each in moved] == [("2.0.0", True)]
    assert "acme-review 1.4.0" in moved[0].sentence


def test_a_removed_distribution_is_major(old: Path, tmp_path: Path) -> None:
    new = Tree(protos={PROTO: REVIEW}, versions={"acme-review": "1.4.0"}, sources=OLD.sources)
    (gone,) = evaluation_of(old, new.lay_out(tmp_path)).findings
    assert (gone.rule, gone.package, gone.fails) == ("DISTRIBUTION_GONE", "acme-desk", True)


def test_a_contract_that_moves_to_another_wheel_is_major(old: Path, tmp_path: Path) -> None:
    new = OLD.lay_out(tmp_path)
    for name, before, after in (
        ("acme-desk", "['acme.desk.v1']", "['acme.desk.v1', 'acme.review.v1']"),
        ("acme-review", "['acme.review.v1']", "[]"),
    ):
        table = new / "packages" / name / "pyproject.toml"
        text = table.read_text(encoding="utf-8")
        assert before in text
        table.write_text(text.replace(before, after), encoding="utf-8")
    evaluation = evaluation_of(old, new)
    assert needed(evaluation) == {"CONTRACT_OWNER_CHANGED": "2.0.0"}
    assert evaluation.red
