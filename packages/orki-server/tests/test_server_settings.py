"""The orchestrator's settings: precedence and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from orki_contract.errors import InvalidSetting
from orki_server._cli.root import root
from orki_server._settings import OrchestratorOptions, load_options, parse_listen


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "orki.toml"
    file.write_text(text)
    return file


def test_a_flag_takes_precedence_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, '[orchestrator]\nshards = 2\nretention_ms = 5\nlisten = "127.0.0.1:1"\n')
    environment = {"ORKI_RETENTION_MS": "6", "ORKI_LISTEN": "127.0.0.1:2", "ORKI_OTHER": "x"}
    options = load_options({"listen": "127.0.0.1:3", "shards": None}, environment, file)
    assert (options.shards, options.retention, options.listen) == (2, 0.006, "127.0.0.1:3")
    assert options.accept_timeout == OrchestratorOptions().accept_timeout


def test_a_password_is_accepted_from_environment_or_file_but_not_from_a_flag(tmp_path: Path) -> None:
    url = "redis://user:secret@127.0.0.1:6379/0"
    assert load_options({}, {"ORKI_REDIS_URL": url}).redis_url == url
    assert load_options({}, {}, written(tmp_path, f'[orchestrator]\nredis_url = "{url}"\n')).redis_url == url
    with pytest.raises(InvalidSetting, match="ORKI_REDIS_URL") as caught:
        load_options({"redis_url": url}, {})
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "message"),
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
def test_an_invalid_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "orki.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidSetting, match=message):
        load_options({}, {}, file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="cannot be read"):
        load_options({}, {}, tmp_path / "none.toml")


@pytest.mark.parametrize("text", ["", "x", "1.5", "0x10", "1" * 5000])
def test_an_invalid_number_in_the_environment_is_refused(text: str) -> None:
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
        ("heartbeat_interval", 0.001),
        ("max_message_bytes", 1),
        ("retention", 0),
        ("max_sessions", 0),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidSetting):
        OrchestratorOptions(**{name: value})


@pytest.mark.parametrize("listen", ["0.0.0.0:50051", "[::]:50051", "192.168.1.1:50051", "example.org:50051"])
def test_addresses_other_than_loopback_are_refused(listen: str) -> None:
    with pytest.raises(InvalidSetting, match="set server_certificate and server_key, and client_ca or tokens_file"):
        OrchestratorOptions(listen=listen)


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:50051", "[::1]:50051", "127.9.9.9:1"])
def test_loopback_is_allowed(listen: str) -> None:
    assert parse_listen(listen)[1] >= 0


def test_the_command_shows_every_setting_with_its_default_and_its_variable() -> None:
    shown = CliRunner().invoke(root, ["serve", "--help"])
    assert shown.exit_code == 0
    for name in OrchestratorOptions.__dataclass_fields__:
        assert f"ORKI_{name.upper()}" in shown.output.replace("\n", "").replace(" ", "") or name in shown.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--listen", "0.0.0.0:1"], 2, "nothing is served to them without TLS and identity"),
        (["--shards", "0"], 2, "shards 0"),
        (["--redis", "redis://u:secret@127.0.0.1/0"], 2, "is visible to all users"),
        (["--redis", "redis://[::1/0"], 2, "the store's URL cannot be read"),
        (["--redis", "redis://u:secret@[::1/0"], 2, "the store's URL cannot be read"),
        (["--redis", "redis://127.0.0.1:1/fleet"], 2, "the store's URL must end in the number of a database"),
        (["--redis", "redis://127.0.0.1:1/0?health_check_interval=5"], 2, 'unknown option "health_check_interval"'),
        (["--redis", "redis://127.0.0.1:1/0?client_name=x"], 2, 'unknown option "client_name"'),
        (["--events", "redis://[::1/0"], 2, "the event server's URL cannot be read"),
        (["--config", "/nonexistent.toml"], 2, "cannot be read"),
        (
            ["--redis", "redis://127.0.0.1:1/0"],
            1,
            "did not start: the store at 127.0.0.1:1 does not answer",
        ),
        (["--redis", "redis://127.0.0.1:1/0"], 1, "; is that Redis running? check --redis"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    arguments: list[str], code: int, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    ran = CliRunner().invoke(root, ["serve", *arguments])
    assert ran.exit_code == code
    assert message in ran.output
    assert len(ran.output.splitlines()) == 1
    assert "secret" not in ran.output
    assert "Traceback" not in ran.output
    assert isinstance(ran.exception, SystemExit)
    assert "new requests are refused" not in caplog.text


@pytest.mark.parametrize(
    "url", ["redis://[::1/0", "redis://h/fleet", "redis://h/0?health_check_interval=5", "redis://h/0?client_name=x"]
)
def test_the_store_and_the_event_plane_refuse_the_same_urls(url: str) -> None:
    messages = []
    for field in ("redis_url", "events_url"):
        with pytest.raises(InvalidSetting) as caught:
            OrchestratorOptions(**{field: url})  # type: ignore[arg-type]
        messages.append(caught.value.message.partition("'s URL ")[2])
    assert messages[0] == messages[1]


def test_the_command_refuses_unknown_options() -> None:
    ran = CliRunner().invoke(root, ["serve", "--nope"])
    assert ran.exit_code == 2
    assert "No such option" in ran.output
