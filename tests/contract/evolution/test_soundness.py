"""No break goes unfound: thousands of random edits, judged by running the old version against the new one.

The oracle knows no rule. It lets each side's classes read what the other one's wrote, calls old opcodes on new tables,
hands failing entries to the delivery machine under both limits, shows old secrets through the new contract, and so on.
What it finds broken, findings must call major. What it finds unharmed and findings call major all the same is the price
of judging without running, and is printed.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

import mutations_layouts
import mutations_options
import mutations_shapes
import oracle_frames
import oracle_messages
import oracle_planes
import pytest
from drafts import Draft, compilable
from evolution_pairs import OPTIONS

from orki_contract.errors import InvalidContract
from orki_contract.findings import Bump, findings
from orki_contract.read import ReadContract, read_image
from orki_contract.validate import validate

pytestmark = pytest.mark.timeout(3600)

MUTATIONS = mutations_options.MUTATIONS + mutations_shapes.MUTATIONS + mutations_layouts.MUTATIONS
WEIGHTS = [weight for weight, _ in MUTATIONS]
# Edits of what a long run has to have touched: every field of every option, and every kind of field.
SWEEP = [
    weight if edit in (*map(itemgetter(1), mutations_options.MUTATIONS), mutations_shapes.retype_field) else 0
    for weight, edit in MUTATIONS
]


@dataclass
class Tally:
    """What came of a run."""

    mutants: int = 0
    refused: int = 0
    broken: int = 0
    harmless: int = 0
    alarms: int = 0
    missed: list[str] = field(default_factory=list)
    alarm_rules: Counter[str] = field(default_factory=Counter)
    rules: Counter[str] = field(default_factory=Counter)
    touched: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        rate = 100 * self.alarms / max(self.harmless, 1)
        share = 100 * self.alarms / max(self.mutants, 1)
        usual = ", ".join(f"{rule} {count}" for rule, count in self.alarm_rules.most_common(8))
        return (
            f"{self.mutants} mutants ({self.refused} more that no compiler or lint rule lets through): "
            f"{self.broken} broken, {len(self.missed)} of them missed; {self.harmless} unharmed, "
            f"{self.alarms} of them called major ({rate:.1f} % of the unharmed, {share:.1f} % of all): {usual}"
        )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The image of the contract from which mutants are made."""
    root = tmp_path_factory.mktemp("base")
    shutil.copytree(Path(__file__).with_name("base"), root / "proto")
    (root / "buf.yaml").write_text("version: v2\nmodules:\n  - path: proto\n", encoding="utf-8")
    home = root / "proto/orki/options/v1"
    home.mkdir(parents=True)
    shutil.copy(OPTIONS, home)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    command = ["buf", "build", "--as-file-descriptor-set", "--output", "-"]
    ran = subprocess.run(command, cwd=root, env={**os.environ, "PATH": path}, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr.decode()
    image = Draft(ran.stdout).image()
    assert validate(read_image(image)) == ()
    return image


def mutant(image: bytes, rng: random.Random, weights: Sequence[int] = WEIGHTS) -> tuple[Draft, ReadContract] | None:
    """The image with one to three random edits; None where it is none that anybody could release."""
    draft = Draft(image)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        for _ in range(20):
            edit = rng.choices(MUTATIONS, weights)[0][1]
            if edit(draft, rng):
                break
    try:
        read = read_image(draft.image()) if compilable(draft) else None
        if read is None or validate(read):
            return None
    except (InvalidContract, TypeError, KeyError):
        return None
    return draft, read


def breaks(old: ReadContract, new: ReadContract, rng: random.Random) -> Iterator[tuple[bool, str]]:
    """All that the oracle finds broken."""
    yield from oracle_messages.judge(old, new, rng)
    yield from oracle_frames.judge(old, new, rng)
    yield from oracle_planes.judge(old, new, rng)


def judge(tally: Tally, old: ReadContract, new: ReadContract, told: list[str], rng: random.Random) -> bool:
    """Holds the findings against the oracle; returns whether findings let the change pass."""
    found = findings(old, new)
    major = [each for each in found if each.bump is Bump.MAJOR]
    broken = sorted(set(breaks(old, new, rng)))
    tally.mutants += 1
    tally.rules.update({each.rule for each in found})
    if broken:
        tally.broken += 1
        if not major:
            tally.missed.append(f"{told}: {broken[:3]}; found {[each.rule for each in found]}")
        elif any(wire for wire, _ in broken) and not any(each.wire for each in major):
            tally.missed.append(f"{told}: {broken[:3]}; found on the wire nothing, but {[each.rule for each in major]}")
    else:
        tally.harmless += 1
        if major:
            tally.alarms += 1
            tally.alarm_rules.update({each.rule for each in major})
    return not major


def test_no_break_goes_unfound(base: bytes, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    wanted, seed = request.config.getoption("--mutants"), request.config.getoption("--mutant-seed")
    rng = random.Random(seed)
    old = read_image(base)
    tally = Tally()
    known = {f"kind {number}" for number in mutations_shapes.KINDS} | mutations_options.option_fields(old.schema)
    # A long run goes on until every field of every option, and every kind of field, has had its turn.
    while tally.mutants < wanted or (1000 <= wanted > tally.mutants // 2 and not known <= tally.touched):
        made = mutant(base, rng, WEIGHTS if tally.mutants < wanted else SWEEP)
        if made is None:
            tally.refused += 1
            continue
        draft, new = made
        tally.touched |= draft.touched
        judge(tally, old, new, draft.told, rng)
    with capsys.disabled():
        print(f"\nsoundness, seed {seed}: {tally}")
    assert not tally.missed, "\n".join(tally.missed)
    assert tally.broken > wanted / 4
    assert tally.harmless > wanted / 20
    if wanted >= 1000:
        assert known <= tally.touched


def test_no_step_by_step_break_goes_unfound(base: bytes, request: pytest.FixtureRequest) -> None:
    """Steps that findings let pass do not add up to a break: entries and processes of any of them are still about."""
    wanted, seed = request.config.getoption("--mutants"), request.config.getoption("--mutant-seed")
    rng = random.Random(seed + 1)
    first = read_image(base)
    tally = Tally()
    long = 0
    for _ in range(max(5, wanted // 100)):
        image, old, told, steps = base, first, list[str](), 0
        for _ in range(30):
            made = mutant(image, rng)
            if made is None:
                continue
            draft, new = made
            if any(each.bump is Bump.MAJOR for each in findings(old, new)):
                continue
            image, old, told, steps = draft.image(), new, told + draft.told, steps + 1
            if steps == 4:
                break
        long += steps == 4
        broken = sorted(set(breaks(first, old, rng)))
        if broken:
            tally.missed.append(f"{told}: {broken[:3]}")
    assert not tally.missed, "\n".join(tally.missed)
    assert long > 0


def test_the_oracle_sees_what_it_is_there_for(base: bytes) -> None:
    """A break of each kind, and none in a contract against itself."""
    rng = random.Random(1)
    old = read_image(base)
    assert list(breaks(old, read_image(base), rng)) == []
    seen = set()
    for _ in range(200):
        made = mutant(base, rng)
        if made is not None:
            seen |= {text.split(" ")[0] for _, text in breaks(old, made[1], rng)}
    assert {"stream", "group", "task", "tool", "frame", "rpc", "enum"} <= seen
