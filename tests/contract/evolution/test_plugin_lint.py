"""`buf lint` reports orki's rules beside its own, with file, line and column."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from evolution_pairs import OPTIONS, ROOT

pytestmark = pytest.mark.timeout(120)

PROTO = """\
syntax = "proto3";

package acme.v1;

import "orki/options/v1/options.proto";

// The stream's name is none, it keeps nothing, and one of its groups is there twice.
message event {
  option (orki.options.v1.stream) = {
    name: "No Name"
    partitions: 2000
    retention: {max_age: {seconds: 1}}
  };
  string path = 1 [(orki.options.v1.offset) = 0];
}

message Head {
  option (orki.options.v1.frame) = {
    version: 0
    block_length: 7
  };
  uint32 kind = 1;
}

message ReadRequest {}
message ReadResponse {}

service FileService {
  rpc Read(ReadRequest) returns (ReadResponse) {
    option (orki.options.v1.tool) = {
      opcode: 1
      timeout: {nanos: 1}
    };
  }
  rpc Plain(ReadRequest) returns (ReadResponse);
}
"""


def test_violations_stand_beside_bufs_own(tmp_path: Path) -> None:
    home = tmp_path / "proto/orki/options/v1"
    home.mkdir(parents=True)
    shutil.copy(OPTIONS, home)
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    (tmp_path / "proto/acme/v1").mkdir(parents=True)
    (tmp_path / "proto/acme/v1/x.proto").write_text(PROTO, encoding="utf-8")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    done = subprocess.run(
        ["buf", "lint", "--error-format", "json"],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 100, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    found = {(each["type"], each["start_line"], each["start_column"]) for each in lines}
    assert {each["path"] for each in lines} == {"proto/acme/v1/x.proto"}
    assert ("MESSAGE_PASCAL_CASE", 8, 9) in found
    assert {each for each in found if each[0].startswith("ORKI_")} == {
        ("ORKI_STREAM_NAME", 10, 5),
        ("ORKI_STREAM_PARTITIONS", 11, 5),
        ("ORKI_STREAM_KEY_REQUIRED", 11, 5),
        ("ORKI_STREAM_MAX_ENTRIES", 9, 10),
        ("ORKI_FRAME_OPTION_STRAY", 14, 20),
        ("ORKI_FRAME_VERSION", 19, 5),
        ("ORKI_FRAME_BLOCK_LENGTH", 20, 5),
        ("ORKI_FRAME_FIELD_OFFSET", 22, 3),
        ("ORKI_SERVICE_MIXED", 28, 1),
        ("ORKI_TOOL_OPCODE", 31, 7),
        ("ORKI_DURATION", 32, 17),
    }
