"""What protobuf allows and no contract of orki's needs: it is generated like anything else, and no rule minds it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orki_codegen.cli import main

PLAIN = {
    "loose.proto": """\
syntax = "proto2";
import public "acme/old-style/groups.proto";
message Loose {
  required string class = 1;
  optional acme.old.Groups groups = 2;
  extensions 100 to 199;
}
extend Loose {
  optional int32 lambda = 100;
}
""",
    "acme/old-style/groups.proto": """\
syntax = "proto2";
package acme.old;
message Groups {
  repeated group Result = 1 {
    optional string import = 1 [default = "from"];
  }
  enum None { True = 1; False = -1; }
  optional None def = 2 [default = False];
}
""",
    "acme/new/edition.proto": """\
edition = "2023";
package acme.new;
import "loose.proto";
message Edition {
  map<string, Edition> global = 1;
  Loose loose = 2 [features.message_encoding = DELIMITED];
  oneof is { bool not = 3; bool and = 4; }
}
service Plain { rpc Raise(Edition) returns (stream Edition); }
""",
}

# Names that Python keeps, in messages that a contract carries but orki's code does not spell out.
KEYWORDS = """\
// Keywords.
syntax = "proto3";

package acme.v1;

import "orki/options/v1/options.proto";

// Work.
service RunService {
  // Runs.
  rpc Run(RunRequest) returns (RunResponse) {
    option (orki.options.v1.task) = {progress: "RunProgress"};
  }
}

// Which.
message RunRequest {
  string from = 1;
  repeated string import = 2;
  map<string, Inner> lambda = 3;
  message Inner {
    bool None = 1;
  }
  oneof class {
    string def = 4;
    Mood del = 5;
  }
  string self = 6;
}

// News.
message RunProgress {
  optional double async = 1;
}

// Done.
message RunResponse {}

// How.
enum Mood {
  MOOD_UNSPECIFIED = 0;
  None = 1;
}

// It happened.
message HappenedEvent {
  option (orki.options.v1.stream) = {
    name: "happened"
    partitions: 2
    partition_key: "global"
    retention: {max_entries: 10}
  };
  string global = 1 [(orki.options.v1.sensitive) = true];
}

// A frame.
message Look {
  option (orki.options.v1.frame) = {
    version: 1
    block_length: 8
  };
  Mood mood = 1 [(orki.options.v1.offset) = 0];
}
"""

IMPORT = """
import importlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
for path in sorted(root.rglob("*.py")):
    importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))
"""


def lay_out(root: Path, files: dict[str, str], packages: str) -> Path:
    """A workspace with some files, all of them one distribution's; its generated root."""
    assert main(["vendor"]) == 0
    for name, text in files.items():
        path = root / "proto" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (root / "carrier").mkdir()
    (root / "carrier/pyproject.toml").write_text(f"[tool.orki]\ncontracts = [{packages}]\n", encoding="utf-8")
    return root / "carrier/gen"


def run(gen: Path, *command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    roots = os.pathsep.join([str(gen), *sys.path])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": roots, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=gen.parents[1], env=environment, capture_output=True, text=True, check=False)


def test_plain_protos_are_generated_and_no_rule_of_ours_minds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    gen = lay_out(tmp_path, PLAIN, '"", "acme.new", "acme.old"')
    assert main(["generate"]) == 0
    assert main(["generate", "--check"]) == 0
    assert "generated code is up to date" in capsys.readouterr().out

    # What lies in no package has no image, and above all none in the file system's root.
    assert not Path("/contract.binpb").exists()
    images = sorted(path.relative_to(gen).as_posix() for path in gen.rglob("contract.binpb"))
    assert images == ["acme/new/contract.binpb", "acme/old/contract.binpb"]
    typed = sorted(path.parent.relative_to(gen).as_posix() for path in gen.rglob("py.typed"))
    assert typed == ["acme/new", "acme/old", "acme/old_style"]
    assert sorted(path.name for path in (tmp_path / "docs/reference").iterdir()) == [
        "README.md",
        "acme.new.md",
        "acme.old.md",
    ]

    done = run(gen, sys.executable, "-W", "error", "-c", IMPORT, str(gen))
    assert done.returncode == 0, done.stderr
    assert "ORKI_" not in run(gen, "buf", "lint").stdout


def test_keywords_in_messages_that_a_contract_carries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """orki's code names none of these fields; protobuf's own code reaches them by getattr and by keyword expansion."""
    monkeypatch.chdir(tmp_path)
    gen = lay_out(tmp_path, {"acme/v1/keywords.proto": KEYWORDS}, '"acme.v1"')
    assert main(["generate"]) == 0
    done = run(gen, sys.executable, "-W", "error", "-c", IMPORT, str(gen))
    assert done.returncode == 0, done.stderr
    options = ("--strict", "--config-file=", "--namespace-packages", "--explicit-package-bases", "--cache-dir=.mypy")
    monkeypatch.setenv("MYPYPATH", os.pathsep.join([str(gen), *(each for each in sys.path if each.endswith("/src"))]))
    done = run(gen, sys.executable, "-m", "mypy", *options, "carrier/gen")
    assert done.returncode == 0, done.stdout
