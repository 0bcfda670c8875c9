"""The answers of an index, and the addresses and options of `publish`."""

from __future__ import annotations

import json

import pytest

from nox_sessions.release.upload import Address, AddressError, Options, open_index
from orki_contract.errors import InvalidSetting
from tests.release.stub_index import Answer, Request, answering

DIGEST = "ab" * 32


def digests(address: str) -> dict[str, str]:
    with open_index(Address.parse(address)) as index:
        return index.digests("orki-agent")


@pytest.mark.parametrize(
    ("index", "simple", "upload"),
    [
        ("http://localhost:8080", "http://localhost:8080/simple/", "http://localhost:8080/"),
        ("http://localhost:8080/", "http://localhost:8080/simple/", "http://localhost:8080/"),
        ("http://localhost:8080/simple", "http://localhost:8080/simple/", "http://localhost:8080/"),
        ("https://a.example/api/team/simple/", "https://a.example/api/team/simple/", "https://a.example/api/team/"),
        ("https://a.example/root/dev/+simple/", "https://a.example/root/dev/+simple/", "https://a.example/root/dev/"),
        ("https://a.example/simpler", "https://a.example/simpler/simple/", "https://a.example/simpler/"),
    ],
)
def test_the_missing_address_is_derived(index: str, simple: str, upload: str) -> None:
    assert Address.parse(index) == Address(simple, upload)


def test_an_upload_address_is_used_as_given() -> None:
    found = Address.parse("https://read.example/simple", "https://write.example/legacy/")
    assert found == Address("https://read.example/simple/", "https://write.example/legacy/")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("pypi", "not an address"),
        ("ftp://a.example/simple", "not an address"),
        ("https:///simple", "not an address"),
        ("https://ann:secret@a.example/simple", "UV_PUBLISH_PASSWORD"),
        ("https://a.example/simple?x=1", "query"),
        ("https://a.example/simple#x", "fragment"),
    ],
)
def test_an_invalid_address_is_refused(url: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AddressError, match=words) as caught:
        Address.parse(url)
    assert "secret" not in str(caught.value)
    with pytest.raises(SystemExit) as ended:
        Options.parse(["--index", "https://a.example/simple", "--upload", url])
    assert ended.value.code == 2
    assert "secret" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--force"],
        ["--inde", "http://a.example"],
        ["--tag", "orki-events"],
        ["--tag", "orki-events-v1.2.0.x"],
        ["--tag", "-v1.2.0"],
        ["--tag", "orki-events-v1.2.0", "--only", "orki-events"],
    ],
)
def test_wrong_options_are_refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORKI_INDEX", "http://a.example" if arguments else "")
    with pytest.raises(SystemExit) as ended:
        Options.parse(arguments)
    assert ended.value.code == 2


def test_the_addresses_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORKI_INDEX", "https://read.example/simple")
    monkeypatch.setenv("ORKI_UPLOAD", "")
    found = Options.parse(["--tag", "refs/tags/orki-events-v1.2.0"])
    assert found.address == Address("https://read.example/simple/", "https://read.example/")
    assert (found.only, str(found.version)) == (("orki-events",), "1.2.0")
    assert Options.parse(["--index", "https://other.example"]).address.upload == "https://other.example/"


def test_a_json_page_is_read() -> None:
    files = [{"filename": "x", "url": "../../files/orki_agent-1.0.tar.gz", "hashes": {"sha256": DIGEST}}]
    body = json.dumps({"meta": {"api-version": "1.0"}, "name": "orki-agent", "files": files}).encode()
    with answering(lambda _: (200, {"Content-Type": "application/vnd.pypi.simple.v1+json"}, body)) as address:
        assert digests(address) == {"orki_agent-1.0.tar.gz": DIGEST}


def test_an_html_page_is_read() -> None:
    body = f'<a href="/f/orki_agent-1.0%2Blocal.tar.gz#sha256={DIGEST.upper()}">x</a><a name="no-link">y</a>'.encode()
    with answering(lambda _: (200, {"Content-Type": "text/html; charset=utf-8"}, body)) as address:
        assert digests(address) == {"orki_agent-1.0+local.tar.gz": DIGEST}


def test_a_redirect_to_another_host_is_not_followed() -> None:
    """The name may belong to somebody else there; a redirect on the same host is followed."""
    body = f'<a href="orki_agent-1.0.tar.gz#sha256={DIGEST}">x</a>'.encode()

    def elsewhere(_: Request) -> Answer:
        return 200, {"Content-Type": "text/html"}, body

    def here(request: Request) -> Answer:
        return elsewhere(request) if "moved" in request.path else (302, {"Location": "/moved/orki-agent/"}, b"")

    with answering(elsewhere) as other, answering(lambda _: (302, {"Location": f"{other}x/"}, b"")) as address:
        assert digests(address) == {}
    with answering(here) as address:
        assert digests(address) == {"orki_agent-1.0.tar.gz": DIGEST}


@pytest.mark.parametrize(
    ("status", "kind", "body", "words"),
    [
        (500, "text/html", b"", "answers 500"),
        (401, "text/html", b"", "netrc"),
        (200, "image/png", b"", "cannot be read"),
        (200, "application/vnd.pypi.simple.v1+json", b"[]", "cannot be read"),
        (200, "application/vnd.pypi.simple.v1+json", b"{", "cannot be read"),
    ],
)
def test_an_invalid_page_is_an_error(status: int, kind: str, body: bytes, words: str) -> None:
    with answering(lambda _: (status, {"Content-Type": kind}, body)) as address:
        with pytest.raises(InvalidSetting, match=words):
            digests(address)


def test_an_unknown_project_has_no_files() -> None:
    with answering(lambda _: (404, {}, b"")) as address:
        assert digests(address) == {}


def test_a_broken_connection_is_an_error() -> None:
    with answering(lambda _: None) as address:
        with pytest.raises(InvalidSetting):
            digests(address)


def test_credentials_go_to_the_host_of_the_index_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_PUBLISH_USERNAME", "ann")
    monkeypatch.setenv("UV_PUBLISH_PASSWORD", "secret")
    monkeypatch.setenv("NETRC", "/dev/null")
    seen: dict[str, str | None] = {}

    def file(request: Request) -> Answer:
        seen["file"] = request.headers.get("Authorization")
        return 200, {"Content-Type": "application/octet-stream"}, b"content"

    def page(request: Request) -> Answer:
        seen["page"] = request.headers.get("Authorization")
        return 200, {"Content-Type": "text/html"}, f'<a href="{files}orki_agent-1.0.tar.gz">x</a>'.encode()

    with answering(file) as files, answering(page) as address:
        assert list(digests(address)) == ["orki_agent-1.0.tar.gz"]
    assert seen == {"page": "Basic YW5uOnNlY3JldA==", "file": None}
