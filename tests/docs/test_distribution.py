"""The `pyproject.toml` in CONTRIBUTING.md makes a distribution that is found, generated and built completely."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from nox_sessions.workspace import distributions

ROOT = Path(__file__).resolve().parents[2]
SHOWN = re.compile(r"<!-- distribution: (\S+) -->\n```toml\n(.*?)```", re.DOTALL)
PROTO = """\
// Reviews.
syntax = "proto3";

package acme.review.v1;

import "orki/options/v1/options.proto";

// A finding.
message FindingEvent {
  option (orki.options.v1.stream) = {
    name: "acme_findings"
    retention: {max_entries: 10}
  };
  // Where.
  string path = 1;
}
"""


def run(folder: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_distribution_of_contributing_builds_a_complete_wheel(tmp_path: Path) -> None:
    for name in ("buf.yaml", "buf.gen.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "proto/orki/options", tmp_path / "proto/orki/options")
    ((place, text),) = SHOWN.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    folder = (tmp_path / place).parent
    folder.mkdir(parents=True)
    (tmp_path / place).write_text(text, encoding="utf-8")
    (folder / "README.md").write_text("# Reviews\n", encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", folder)
    proto = tmp_path / "proto/acme/review/v1/review.proto"
    proto.parent.mkdir(parents=True)
    proto.write_text(PROTO, encoding="utf-8")

    assert [each.requirement for each in distributions(tmp_path)] == [f"./{folder.relative_to(tmp_path)}"]
    run(tmp_path, sys.executable, "-m", "orki_codegen.generate")
    run(folder, sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path / "dist"))
    (wheel,) = (tmp_path / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        files = {name.partition(".dist-info/")[2] or name for name in archive.namelist()}
    home = "acme/review/v1"
    assert {f"{home}/{name}" for name in ("contract.binpb", "py.typed", "review_orki.py", "review_pb2.pyi")} <= files
    assert "licenses/LICENSE" in files
