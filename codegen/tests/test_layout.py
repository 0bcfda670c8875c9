"""Layout: what is written is what `ruff format` would write, whatever the lengths of names and comments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.compiler.plugin_pb2 import CodeGeneratorRequest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from orki_codegen import plugin
from orki_codegen._buf import Buf
from orki_codegen._code import Call, Raw, Sequence, docstring, expression, lay, quote, signature, width
from orki_contract.model import Backoff, Group, Start

ROOT = Path(__file__).resolve().parents[2]

STREAM = """
// {comment}
message {message} {{
  option (orki.options.v1.stream) = {{
    name: "{name}"
    retention: {{max_entries: 1}}
    groups: [
      {{name: "{group}"}}
    ]
  }};
  // {comment}
  string id = 1;
}}
"""

SERVICE = """
// {comment}
service {name}Service {{
  // {comment}
  rpc {name}(R{name}) returns (R{name}) {{
    option (orki.options.v1.{option};
  }}
}}

// {comment}
message R{name} {{}}

// {comment}
message F{name} {{
  option (orki.options.v1.frame) = {{
    version: 2
    block_length: 16
  }};
  // {comment}
  M{name} f{field} = 1 [(orki.options.v1.offset) = 0];
  // {comment}
  uint64 g{field} = 2 [
    (orki.options.v1.offset) = 8,
    (orki.options.v1.since) = 2
  ];
  // {comment}
  bytes t{field} = 3;
}}

// {comment}
enum M{name} {{
  // Zero.
  ZERO_OF_{name} = 0;
}}
"""


def padded(text: str, length: int) -> str:
    return (text + "x" * length)[:length]


def comment(length: int) -> str:
    """Words up to a length, with what needs care at their end."""
    words = 'Say "why", it\\\\is so and """no""" other 漢字 naïve; '
    text = (words * 8)[:length].rstrip()
    return text + ('"' if length % 3 == 0 else "\\\\" if length % 3 == 1 else ".")


def protos() -> str:
    parts = ['syntax = "proto3";\npackage kitchen.v1;\nimport "orki/options/v1/options.proto";\n']
    for length in range(3, 65):
        name = padded(f"s{length}-", length)
        message = padded(f"E{length}x", length + length % 40)
        parts.append(STREAM.format(comment=comment(length * 3), message=message, name=name, group=name))
    for length in range(4, 90):
        option = 'task) = {progress: "R%s"}' if length % 2 else "tool) = {opcode: %d}"
        name = padded(f"N{length}x", length)
        option %= name if length % 2 else 0x0100 + length
        parts.append(SERVICE.format(comment=comment(length * 4), name=name, option=option, field=padded("y", length)))
    return "".join(parts)


@pytest.mark.timeout(300)
def test_any_length_of_names_and_comments_comes_out_formatted(fresh: Path) -> None:
    (fresh / "proto/kitchen/v1/lengths.proto").write_text(protos(), encoding="utf-8")
    files = FileDescriptorSet.FromString(Buf(fresh).image()).file
    response = plugin.respond(CodeGeneratorRequest(proto_file=files, file_to_generate=["kitchen/v1/lengths.proto"]))
    assert not response.error
    (made,) = response.file
    compile(made.content, made.name, "exec")
    module = fresh / "lengths_orki.py"
    module.write_text(made.content, encoding="utf-8")
    for command in (["format", "--diff"], ["check"]):
        program = [sys.executable, "-m", "ruff", *command, "--no-cache", "--config", str(ROOT / "pyproject.toml")]
        done = subprocess.run([*program, str(module)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_a_call_stands_on_one_line_where_it_fits_and_else_on_several() -> None:
    call = Call("name", (Raw("a" * 50),), (("key", Raw("b" * 50)),))
    assert lay("x = ", call) == f"x = name({'a' * 50}, key={'b' * 50})"
    assert lay("longer = ", call, "", 4) == (
        f"longer = name({'a' * 50}, key={'b' * 50})"
        if 4 + len(f"longer = name({'a' * 50}, key={'b' * 50})") <= 120
        else f"longer = name(\n        {'a' * 50},\n        key={'b' * 50},\n    )"
    )
    wide = Call("name", (Raw("a" * 60),), (("key", Raw("b" * 60)),))
    assert lay("x = ", wide, ",", 4) == f"x = name(\n        {'a' * 60},\n        key={'b' * 60},\n    ),"


def test_tuples_keep_their_comma_and_subscripts_have_none() -> None:
    assert lay("", Sequence((Raw("a"),))) == "(a,)"
    assert lay("", Sequence((Raw("a"), Raw("b")))) == "(a, b)"
    assert lay("", Sequence((Raw("a"),), "Literal")) == "Literal[a]"
    assert lay("", Sequence(())) == "()"


def test_values_of_the_model_become_the_calls_that_make_them() -> None:
    group = Group(name="a", start=Start.LATEST, max_deliveries=1_000)
    assert lay("", expression(group, "oc")) == 'oc.Group(name="a", start=oc.Start.LATEST, max_deliveries=1_000)'
    assert lay("", expression((Backoff(multiplier=1.5), True), "oc")) == "(oc.Backoff(multiplier=1.5), True)"


@pytest.mark.parametrize(
    ("text", "literal"),
    [("plain", '"plain"'), ("it's", '"it\'s"'), ('a "b"', "'a \"b\"'"), ("\\", '"\\\\"'), ("é", '"é"')],
)
def test_quotes(text: str, literal: str) -> None:
    assert quote(text) == literal


def test_signatures_grow_in_three_steps() -> None:
    def made(length: int) -> str:
        return signature("def f", (("self", Raw("")), ("a", Raw("T" * length))), "R", 4, " ...")

    assert made(10) == f"def f(self, a: {'T' * 10}) -> R: ..."
    assert made(100) == f"def f(\n        self, a: {'T' * 100}\n    ) -> R: ..."
    assert made(110) == f"def f(\n        self,\n        a: {'T' * 110},\n    ) -> R: ..."


@pytest.mark.parametrize(
    ("comment", "expected"),
    [
        (" One line.\n", '"""One line."""'),
        ("", '"""Else."""'),
        (" \n \n", '"""Else."""'),
        (' Ends with a "quote"', '"""Ends with a "quote\\""""'),
        (' Has """ three', '"""Has \\"\\"\\" three"""'),
        (" A \\n backslash\\", '"""A \\\\n backslash\\\\"""'),
        (" First.\n\n Second.\n", '"""First.\n\n    Second.\n    """'),
        (" Zero\u200bwidth, bell\a, right\u202eto left", '"""Zero width, bell , right to left"""'),
        ("\tTab.\n\t  In.\n", '"""Tab.\n      In.\n    """'),
    ],
)
def test_comments_become_docstrings(comment: str, expected: str) -> None:
    assert docstring(comment, 4, "Else.") == expected


def test_wide_characters_take_two_columns() -> None:
    assert width("漢字") == 4
    assert width("e\u0301") == 1
    assert all(width(line) <= 120 for line in docstring("漢字 " * 100, 4, "").split("\n"))
