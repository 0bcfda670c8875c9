"""Read the pages of an index: which files of a project it has, and what their bytes are."""

from __future__ import annotations

__all__ = ["IndexUnreadable", "Pages"]

import base64
import hashlib
import json
import netrc
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html.parser import HTMLParser
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

from nox_sessions.release.address import Address

JSON = "application/vnd.pypi.simple.v1+json"
HTML = ("application/vnd.pypi.simple.v1+html", "text/html")
ACCEPT = f"{JSON}, {HTML[0]};q=0.2, {HTML[1]};q=0.1"
TIMEOUT = 30.0


class IndexUnreadable(Exception):
    """An index did not answer, or not as an index does; the text says where and how."""


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Follow no redirect to another host.

    Some indexes send whoever asks for a project that they lack to a public one. What is published there is not
    published here, and may be somebody else's project of the same name.
    """

    def redirect_request(self, req: urllib.request.Request, *rest: Any) -> urllib.request.Request | None:
        """Return the request to make instead, or None where the redirect leaves the host."""
        if urlsplit(rest[-1]).netloc != urlsplit(req.full_url).netloc:
            raise _ElsewhereError
        return super().redirect_request(req, *rest)


class _ElsewhereError(Exception):
    """The index knows the project by another index alone."""


class Pages:
    """One index, read."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._opener = urllib.request.build_opener(_SameHost)
        self._places: dict[str, str] = {}

    def digests(self, project: str) -> Mapping[str, str]:
        """Return the SHA-256 of each file that the index has of a project; none where it does not know the project.

        A digest that the page does not tell is taken from the file's own bytes.

        Raises:
            IndexUnreadable: there was no answer, or it is not a page of an index.
        """
        url = self._address.page(project)
        try:
            with self._opened(url, ACCEPT) as answer:
                kind = answer.headers.get_content_type()
                body = answer.read()
                base = answer.url
        except (FileNotFoundError, _ElsewhereError):
            return {}
        found: dict[str, str] = {}
        for link, digest in _json_links(url, body) if kind == JSON else _html_links(url, kind, body):
            name = unquote(urlsplit(link).path.rpartition("/")[2])
            self._places[name] = urljoin(base, link)
            found[name] = digest or hashlib.sha256(self.fetch(name)).hexdigest()
        return found

    def fetch(self, name: str) -> bytes:
        """Return the bytes of a file that a page has listed.

        Raises:
            IndexUnreadable: it cannot be fetched.
        """
        url = self._places[name]
        try:
            with self._opened(url, "*/*") as answer:
                return answer.read()
        except (FileNotFoundError, _ElsewhereError):
            raise IndexUnreadable(f"{url}: is listed by the index, and cannot be fetched from it") from None

    @contextmanager
    def _opened(self, url: str, accept: str) -> Iterator[HTTPResponse]:
        request = urllib.request.Request(url, headers={"Accept": accept, "User-Agent": "orki-publish"})
        if (login := self._login(url)) is not None:
            request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
        try:
            with self._opener.open(request, timeout=TIMEOUT) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            with error:
                if error.code in {404, 410}:
                    raise FileNotFoundError(url) from None
                hint = " (credentials for reading go into ~/.netrc)" if error.code in {401, 403} else ""
                raise IndexUnreadable(f"{url}: the index answers {error.code} {error.reason}{hint}") from None
        except urllib.error.URLError as error:
            raise IndexUnreadable(f"{url}: the index does not answer: {error.reason}") from None
        except (HTTPException, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise IndexUnreadable(f"{url}: the answer broke off: {error!r}") from None

    def _login(self, url: str) -> str | None:
        """Return `name:password` for a host, as pip and uv find it; the upload's own is for the upload's own host."""
        host = urlsplit(url).hostname or ""
        try:
            known = netrc.netrc().authenticators(host)
        except (FileNotFoundError, netrc.NetrcParseError):
            known = None
        if known is not None:
            return f"{known[0]}:{known[2]}"
        name, password = os.environ.get("UV_PUBLISH_USERNAME"), os.environ.get("UV_PUBLISH_PASSWORD")
        same = urlsplit(url).netloc == urlsplit(self._address.upload).netloc
        return f"{name}:{password}" if same and name and password else None


def _json_links(url: str, body: bytes) -> list[tuple[str, str | None]]:
    """Read a page as PEP 691 has it."""
    try:
        return [(each["url"], each.get("hashes", {}).get("sha256")) for each in json.loads(body)["files"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise IndexUnreadable(f"{url}: the answer is said to be a page of an index, and is none") from None


def _html_links(url: str, kind: str, body: bytes) -> list[tuple[str, str | None]]:
    """Read a page as PEP 503 has it."""
    if kind not in HTML:
        raise IndexUnreadable(f"{url}: the answer is {kind}, and no page of an index. Is --index the address for pip?")
    links = _Links()
    links.feed(body.decode("utf-8", errors="replace"))
    found = []
    for link in links.found:
        bare, fragment = urldefrag(link)
        algorithm, _, digest = fragment.partition("=")
        found.append((bare, digest.lower() if algorithm == "sha256" else None))
    return found


class _Links(HTMLParser):
    """The places that a page's anchors lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an anchor."""
        if tag == "a" and (link := dict(attrs).get("href")):
            self.found.append(link)
