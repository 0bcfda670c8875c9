"""Where an index is read, and where it takes uploads."""

from __future__ import annotations

__all__ = ["Address", "AddressError"]

from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

# Both endings stand for the same: the pages of PEP 503. The second is what devpi calls them.
PAGES = ("simple", "+simple")


class AddressError(ValueError):
    """An address that cannot be used; the text says which, and what to give instead."""


@dataclass(frozen=True, slots=True)
class Address:
    """The two addresses of one index, both with a slash at their end.

    Attributes:
        simple: where pip reads: one page a project below it (PEP 503).
        upload: where a file is posted to.
    """

    simple: str
    upload: str

    @classmethod
    def parse(cls, index: str, upload: str | None = None) -> Address:
        """Derive what is not said.

        An index whose address ends in `/simple` takes uploads one level above, as most that a team runs itself do;
        of any other address the pages are taken to lie in `simple/` below it. An index that takes uploads on
        another host needs both.

        Raises:
            AddressError: an address is none of http or https, or carries a password, query or fragment.
        """
        base = _slashed(_checked("--index", index))
        last = base.rstrip("/").rpartition("/")[2]
        simple = base if last in PAGES else f"{base}simple/"
        if upload is not None:
            # An upload address is used as it was given: some mind a slash at the end, and some miss it.
            return cls(simple, _checked("--upload", upload))
        return cls(simple, base.rstrip("/").removesuffix(last) if last in PAGES else base)

    def page(self, project: str) -> str:
        """Return where the page of a project is, given its normal name, as `orki-agent`."""
        return f"{self.simple}{project}/"


def _checked(option: str, url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise AddressError(f"{option} {url}: not an address that begins with http:// or https://")
    if parts.username is not None or parts.password is not None:
        bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        raise AddressError(
            f"{option} {bare}: carries a name or password, which others on this machine can read from a command line."
            " They go into UV_PUBLISH_USERNAME and UV_PUBLISH_PASSWORD, or UV_PUBLISH_TOKEN; for reading, into ~/.netrc"
        )
    if parts.query or parts.fragment:
        raise AddressError(f"{option} {url}: ends in a query or fragment, which no index has")
    return url


def _slashed(url: str) -> str:
    return url if url.endswith("/") else f"{url}/"
