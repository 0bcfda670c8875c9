"""The orchestrator's settings: precedence, and everything that is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from orki_contract.errors import InvalidSetting
from orki_server._settings import OrchestratorOptions, load_options, parse_listen
from orki_server.cli.root import root


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "orki.toml"
    file.write_text(text)
    return file


def test_a_flag_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, '[orchestrator]\nshards = 2\nretention_ms = 5\nlisten = "127.0.0.1:1"\n')
    environment = {"ORKI_RETENTION_MS": "6", "ORKI_LISTEN": "127.0.0.1:2", "ORKI_OTHER": "x"}
    options = load_options({"listen": "127.0.0.1:3", "shards": None}, environment, file)
    assert (options.shards, options.retention_ms, options.listen) == (2, 6, "127.0.0.1:3")
    assert options.accept_timeout_ms == OrchestratorOptions().accept_timeout_ms


def test_a_secret_comes_by_environment_or_file_and_not_by_flag(tmp_path: Path) -> None:
    url = "redis://user:secret@127.0.0.1:6379/0"
    assert load_options({}, {"ORKI_REDIS_URL": url}).redis_url == url
    assert load_options({}, {}, written(tmp_path, f'[orchestrator]\nredis_url = "{url}"\n')).redis_url == url
    with pytest.raises(InvalidSetting, match="ORKI_REDIS_URL") as caught:
        load_options({"redis_url": url}, {})
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[orchestrator]\nshrads = 2\n", "shrads under .orchestrator. is unknown; known: listen, redis_url"),
        ("[orchestra]\n", "unknown entry 'orchestra'; known: .orchestrator."),
        ("shards = 2\n", "unknown entry 'shards'"),
        ("orchestrator = 2\n", "must be a table"),
        ('[orchestrator]\nshards = "2"\n', "shards under .orchestrator. must be a number"),
        ("[orchestrator]\nshards = true\n", "must be a number"),
        ("[orchestrator]\nlisten = 2\n", "must be text"),
        ("[orchestrator]\nshards = 0\n", "shards 0: use a number from 1 to 1024"),
        ("[orchestrator\n", "is not TOML"),
        ("\xff", "is not TOML"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "orki.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidSetting, match=words):
        load_options({}, {}, file)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="cannot be read"):
        load_options({}, {}, tmp_path / "none.toml")


@pytest.mark.parametrize("text", ["", "x", "1.5", "0x10", "1" * 5000])
def test_a_wrong_number_in_the_environment_is_refused(text: str) -> None:
    with pytest.raises(InvalidSetting, match="ORKI_SHARDS"):
        load_options({}, {"ORKI_SHARDS": text})


def test_an_unknown_flag_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="unknown option 'nope'"):
        load_options({"nope": 1}, {})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("listen", "127.0.0.1"),
        ("listen", "127.0.0.1:65536"),
        ("listen", ":50051"),
        ("listen", "unix:/tmp/x"),
        ("redis_url", "http://x"),
        ("redis_url", ""),
        ("events_url", "x"),
        ("orchestrator_id", ""),
        ("orchestrator_id", "a b"),
        ("shards", 0),
        ("heartbeat_interval_ms", 1),
        ("max_message_bytes", 1),
        ("retention_ms", 0),
        ("max_sessions", 0),
    ],
)
def test_values_out_of_their_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidSetting):
        OrchestratorOptions(**{name: value})


@pytest.mark.parametrize("listen", ["0.0.0.0:50051", "[::]:50051", "192.168.1.1:50051", "example.org:50051"])
def test_plaintext_stays_on_loopback(listen: str) -> None:
    with pytest.raises(InvalidSetting, match="only loopback"):
        parse_listen(listen)


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:50051", "[::1]:50051", "127.9.9.9:1"])
def test_loopback_is_allowed(listen: str) -> None:
    assert parse_listen(listen)[1] >= 0


def test_the_command_shows_every_setting_with_its_default_and_its_variable() -> None:
    shown = CliRunner().invoke(root, ["serve", "--help"])
    assert shown.exit_code == 0
    for name in OrchestratorOptions.__dataclass_fields__:
        assert f"ORKI_{name.upper()}" in shown.output.replace("\n", "").replace(" ", "") or name in shown.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--listen", "0.0.0.0:1"], "only loopback"),
        (["--shards", "0"], "shards 0"),
        (["--redis", "redis://u:secret@127.0.0.1/0"], "can be read by anybody"),
        (
            ["--redis", "redis://127.0.0.1:1/0"],
            "did not start: the store at 127.0.0.1:1 does not answer",
        ),
        (["--redis", "redis://127.0.0.1:1/0"], "); is that Redis running? check --redis"),
        (["--config", "/nonexistent.toml"], "cannot be read"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    arguments: list[str], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    ran = CliRunner().invoke(root, ["serve", *arguments])
    assert ran.exit_code == 1
    assert words in ran.output
    assert "secret" not in ran.output
    assert "Traceback" not in ran.output
    assert "nothing new is taken" not in caplog.text


def test_the_command_refuses_unknown_options() -> None:
    ran = CliRunner().invoke(root, ["serve", "--nope"])
    assert ran.exit_code == 2
    assert "No such option" in ran.output
