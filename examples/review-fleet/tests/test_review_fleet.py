"""The example's own logic: which files, what is in them, and tools that stay below their root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from review_fleet.measure import LONG_FUNCTION_LINES, measure_source
from review_fleet.tools import MAX_PIECE_BYTES, SourceTools
from review_fleet.tree import python_files
from sourcereview.v1.tools_orki import MeasureFileRequest, ReadFileRequest

from orki_contract.errors import ToolFailed


class Call:
    """A call that nobody cancels."""

    span = None
    client = "test"
    cancelled = False


def test_links_dot_folders_and_what_is_not_a_file_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "b.py").write_text("")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "c.py").write_text("")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "dangling.py").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "self.py").symlink_to("self.py")
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / os.fsdecode(b"\xff.py")).write_text("")
    assert python_files(tmp_path) == [b"a.py", b"deep/er/b.py", b"\xff.py"]


def test_a_folder_that_is_not_there_has_no_files(tmp_path: Path) -> None:
    assert python_files(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("source", "functions", "classes"),
    [
        (b"", 0, 0),
        (b"\xef\xbb\xbfdef f():\r\n    async def g(): ...\r\n", 2, 0),
        (b"class A:\n    class B:\n        def m(self): ...\n", 1, 2),
        (b"# -*- coding: latin-1 -*-\ndef caf\xe9(): ...\n", 1, 0),
        (b"x = lambda: 1\n", 0, 0),
    ],
)
def test_definitions_are_counted(source: bytes, functions: int, classes: int) -> None:
    measured = measure_source(source)
    assert (measured.functions, measured.classes, measured.error) == (functions, classes, "")


@pytest.mark.parametrize(
    "source", [b"def", b"\xff\xfe\x00", b"\0", b"# coding: nonsense\n", b"(" * 100_000, b"-" * 20_000 + b"1", b"1\xff"]
)
def test_what_does_not_parse_is_said_in_a_sentence(source: bytes) -> None:
    measured = measure_source(source)
    assert measured.error.startswith("does not parse: ")
    assert (measured.functions, measured.classes) == (0, 0)


def test_long_functions_are_noticed() -> None:
    body = b"    pass\n" * LONG_FUNCTION_LINES
    assert [long.name for long in measure_source(b"def long():\n" + body).long_functions] == ["long"]
    assert measure_source(b"def short():\n" + body[9:]).long_functions == ()


def test_tools_measure_and_read(tmp_path: Path) -> None:
    content = b"line\n" * 100_000
    (tmp_path / "big.py").write_bytes(content)
    tools = SourceTools(tmp_path)
    size = tools.measure_file(MeasureFileRequest(path=b"big.py"), Call())
    assert (size.size, size.newlines) == (500_000, 100_000)
    first = tools.read_file(ReadFileRequest(path=b"big.py", length=MAX_PIECE_BYTES * 2), Call())
    rest = tools.read_file(ReadFileRequest(path=b"big.py", offset=MAX_PIECE_BYTES, length=MAX_PIECE_BYTES), Call())
    assert (first.end, rest.end) == (False, True)
    assert first.content + rest.content == content


@pytest.mark.parametrize(
    "path", [b"", b"/etc/passwd", b"../x.py", b"a/../../x", b"a\0b", b"gone.py", b"out.py", b"out/x", b".", b"pipe.py"]
)
def test_tools_stay_below_their_root_and_say_what_is_wrong(tmp_path: Path, path: bytes) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "x.py").write_text("secret")
    (root / "out.py").symlink_to(tmp_path / "x.py")
    (root / "out").symlink_to(tmp_path)
    os.mkfifo(root / "pipe.py")
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with pytest.raises(ToolFailed) as caught:
        SourceTools(root).measure_file(MeasureFileRequest(path=path), Call())
    assert caught.value.code
    assert not descriptors or len(os.listdir("/proc/self/fd")) == descriptors
