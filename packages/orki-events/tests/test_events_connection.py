"""The Redis connection: URLs, the classification of errors, time limits and broken connections."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orki_contract.errors import (
    EventsLoading,
    EventsNotPersisting,
    EventsOutOfMemory,
    EventsReadOnly,
    EventsRefused,
    EventsUnavailable,
    InvalidSetting,
    LocalProtocolError,
    OrkiError,
    StoreFull,
    StoreUnavailable,
)
from orki_events import connect
from orki_events.connection import (
    Connection,
    GroupExists,
    GroupMissing,
    Role,
    ScriptMissing,
    parse_address,
)

ROLES: tuple[Role, ...] = ("event server", "store")

ACCEPTED = [
    ("redis://127.0.0.1", "127.0.0.1:6379", "redis://127.0.0.1:6379"),
    ("redis://", "localhost:6379", "redis://localhost:6379"),
    ("redis:///3", "localhost:6379", "redis://localhost:6379/3"),
    ("redis://127.0.0.1:7000/0", "127.0.0.1:7000", "redis://127.0.0.1:7000/0"),
    ("redis://127.0.0.1/", "127.0.0.1:6379", "redis://127.0.0.1:6379"),
    ("redis://127.0.0.1?db=2", "127.0.0.1:6379", "redis://127.0.0.1:6379/2"),
    ("redis://127.0.0.1/2?db=2", "127.0.0.1:6379", "redis://127.0.0.1:6379/2"),
    ("redis://[::1]:7000/1", "[::1]:7000", "redis://[::1]:7000/1"),
    ("redis://alice:s3cret@example.test:7000/2", "example.test:7000", "redis://example.test:7000/2"),
    ("redis://:s3cret@example.test", "example.test:6379", "redis://example.test:6379"),
    ("redis://alice:p%2Fw%40@example.test", "example.test:6379", "redis://example.test:6379"),
    ("rediss://example.test", "example.test:6379", "rediss://example.test:6379"),
    ("rediss://example.test?ssl_check_hostname=false", "example.test:6379", "rediss://example.test:6379"),
    ("rediss://h/1?ssl_ca_certs=/ca.pem&ssl_cert_reqs=optional", "h:6379", "rediss://h:6379/1"),
    ("unix:///run/valkey.sock", "/run/valkey.sock", "unix:///run/valkey.sock"),
    ("unix://alice:s3cret@/run/valkey.sock?db=3", "/run/valkey.sock", "unix:///run/valkey.sock?db=3"),
    ("unix:///run/a%40b.sock", "/run/a@b.sock", "unix:///run/a%40b.sock"),
    ("unix:///run/a%20b.sock", "/run/a b.sock", "unix:///run/a%20b.sock"),
]

REFUSED = [
    ("", "must begin with redis://"),
    ("127.0.0.1:6379", "must begin with redis://"),
    ("http://127.0.0.1", "must begin with redis://"),
    ("redis:127.0.0.1", "must begin with redis://"),
    ("redis://[::1/0", "cannot be read"),
    ("redis://[x]/0", "cannot be read"),
    ("redis://127.0.0.1:port", "cannot be read"),
    ("redis://127.0.0.1:70000", "cannot be read"),
    ("redis://127.0.0.1:0", "cannot be read"),
    ("redis://alice:s3/cret@127.0.0.1", "cannot be read"),
    ("redis://alice:#s3cret@127.0.0.1", "cannot be read"),
    ("redis://alice:12/s3cret@127.0.0.1", "cannot be read"),
    ("redis://alice:12?s3cret@127.0.0.1", "cannot be read"),
    ("redis://alice:12?s3cret", "cannot be read"),
    ("redis://alice:12?s3cret&db=1", "cannot be read"),
    ("redis://alice:12?s3cret=x", r"unknown option \(known"),
    ("rediss://h?ssl_cert_reqs=s3cret", "none, optional, required"),
    ("rediss://h?ssl_check_hostname=s3cret", "true or false"),
    ("unix://:/s3cret@/tmp/x.sock", "cannot be read"),
    ("unix://:/s3cret/x.sock", "unix:///PATH"),
    ("unix:///s3cret@/tmp/x.sock", "cannot be read"),
    ("redis://two words", "space or a control character"),
    ("redis://127.0.0.1\n", "space or a control character"),
    ("redis://127.0.0.1/fleet", "number of a database"),
    ("redis://127.0.0.1/0/1", "number of a database"),
    ("redis://127.0.0.1/-1", "number of a database"),
    ("redis://127.0.0.1/²", "number of a database"),
    ("redis://127.0.0.1?db=x", "number of a database"),
    ("redis://127.0.0.1?db=", "number of a database"),
    ("redis://127.0.0.1/1?db=2", "two databases"),
    ("redis://127.0.0.1?db=2&db=2", "an option twice"),
    ("redis://127.0.0.1/0?health_check_interval=5", 'unknown option "health_check_interval"'),
    ("redis://127.0.0.1/0?client_name=x", 'unknown option "client_name"'),
    ("redis://127.0.0.1/0?socket_timeout=1", 'unknown option "socket_timeout"'),
    ("redis://127.0.0.1/0?retry_on_timeout=yes", 'unknown option "retry_on_timeout"'),
    ("redis://127.0.0.1?ssl_ca_certs=/ca.pem", "requires rediss://"),
    ("rediss://127.0.0.1?ssl_cert_reqs=maybe", "none, optional, required"),
    ("rediss://127.0.0.1?ssl_check_hostname=perhaps", "true or false"),
    ("rediss://127.0.0.1?ssl_keyfile=", "without a path"),
    ("unix://", "unix:///PATH"),
    ("unix://run/valkey.sock", "unix:///PATH"),
]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("url", "location", "public"), ACCEPTED)
def test_each_role_accepts_the_same_urls(url: str, location: str, public: str, role: Role) -> None:
    address = parse_address(url, role=role)
    assert (address.location, address.url) == (location, public)
    assert address.shown == f"the {role} at {location}"
    assert "s3cret" not in repr(address)
    assert parse_address(address.url, role=role).location == location


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("url", "complaint"), REFUSED)
def test_each_role_refuses_the_same_urls(url: str, complaint: str, role: Role) -> None:
    with pytest.raises(InvalidSetting, match=complaint) as refused:
        parse_address(url, role=role)
    assert refused.value.message.startswith(f"the {role}'s URL ")
    assert "s3" not in refused.value.message
    with pytest.raises(InvalidSetting, match=complaint):
        connect(url)


PARTS = st.text(alphabet="redisunx:/?#[]@%&=.0123456789-_~abé²\x00\n \\", max_size=30)


@given(st.text() | st.tuples(st.sampled_from(["redis://", "rediss://", "unix://"]), PARTS | st.text()).map("".join))
def test_every_url_is_read_or_refused(url: str) -> None:
    try:
        address = parse_address(url)
    except InvalidSetting:
        return
    again = parse_address(address.url)
    assert (again.url, again.location) == (address.url, address.location)


CANARY = "s3cr3tPW"


@given(
    st.sampled_from(["redis", "rediss", "unix"]),
    st.sampled_from(["", ":", "user:", "12?", "user:12?", "user:12/", "user:12#", "ssl_cert_reqs="]),
    PARTS,
    PARTS,
    st.sampled_from(["host", "host/0", "host/x", "host?db=1", "host?x=1", "/tmp/x.sock", "/tmp/x.sock?db=1", ""]),
)
def test_neither_an_address_nor_an_error_shows_a_part_of_a_password(
    scheme: str, user: str, before: str, after: str, rest: str
) -> None:
    assert CANARY.lower() not in shown_of(f"{scheme}://{user}{before}{CANARY}{after}@{rest}")


@given(
    st.sampled_from(["redis", "rediss", "unix"]),
    st.sampled_from(["?", "#", "/"]),
    st.text(alphabet="ab12:/?#&=%", max_size=8),
    st.text(alphabet="ab12:/?#&=%", max_size=8),
)
def test_a_password_without_its_host_is_not_shown(scheme: str, mark: str, before: str, after: str) -> None:
    """The user and the port-like start of the password read as host and port."""
    for user in ("user:12", ":12", ":"):
        assert CANARY.lower() not in shown_of(f"{scheme}://{user}{mark}{before}{CANARY}{after}")


def shown_of(url: str) -> str:
    """Return everything that an address of this URL, or its refusal, shows, in lower case."""
    try:
        address = parse_address(url)
        shown = repr(address) + address.shown + address.error("ERR no").message + address.unavailable("down").message
    except InvalidSetting as error:
        shown = error.message
    return shown.lower()


def test_credentials_can_be_passed_apart_from_the_url() -> None:
    for address in (
        parse_address("redis://example.test", username="alice", password="s3cr/t"),
        parse_address("redis://alice:s3cr%2Ft@example.test"),
        parse_address("redis://eve:other@example.test", username="alice", password="s3cr/t"),
    ):
        assert (address.settings["username"], address.settings["password"]) == ("alice", "s3cr/t")


REPLIES: list[tuple[str, type[OrkiError], type[OrkiError]]] = [
    ("OOM command not allowed when used memory > 'maxmemory'.", EventsOutOfMemory, StoreFull),
    ("READONLY You can't write against a read only replica.", EventsReadOnly, StoreUnavailable),
    ("MASTERDOWN Link with MASTER is down", EventsReadOnly, StoreUnavailable),
    ("NOREPLICAS Not enough good replicas to write.", EventsReadOnly, StoreUnavailable),
    ("MISCONF Errors writing to the AOF file", EventsNotPersisting, StoreUnavailable),
    ("LOADING Redis is loading the dataset in memory", EventsLoading, StoreUnavailable),
    ("CLUSTERDOWN Hash slot not served", EventsUnavailable, StoreUnavailable),
    ("TRYAGAIN Multiple keys request during rehashing of slot", EventsUnavailable, StoreUnavailable),
    ("BUSY Redis is busy running a script.", EventsUnavailable, StoreUnavailable),
    ("ERR max number of clients reached", EventsUnavailable, StoreUnavailable),
    ("NOAUTH Authentication required.", EventsRefused, StoreUnavailable),
    ("WRONGPASS invalid username-password pair", EventsRefused, StoreUnavailable),
    ("NOPERM this user has no permissions", EventsRefused, StoreUnavailable),
    ("ERR unknown command 'XAD'", EventsRefused, LocalProtocolError),
    ("ERR Protocol error", EventsRefused, LocalProtocolError),
    ("WRONGTYPE Operation against a key", EventsRefused, LocalProtocolError),
    ("MOVED 3999 127.0.0.1:6381", EventsRefused, StoreUnavailable),
    ("something without a code", EventsRefused, LocalProtocolError),
    ("", EventsRefused, LocalProtocolError),
    ("NOSCRIPT No matching script.", ScriptMissing, ScriptMissing),
    ("NOGROUP No such key", GroupMissing, GroupMissing),
    ("UNBLOCKED the stream key no longer exists", GroupMissing, GroupMissing),
    ("BUSYGROUP Consumer Group name already exists", GroupExists, GroupExists),
    (
        "ERR Error running script (call to f_1): @user_script:4: -OOM command not allowed when used memory",
        EventsOutOfMemory,
        StoreFull,
    ),
    ("@user_script: 12: -READONLY You can't write against a read only replica.", EventsReadOnly, StoreUnavailable),
    ("OOM command not allowed. script: 4f, on @user_script:4.", EventsOutOfMemory, StoreFull),
    ("user_script:3: Script attempted to access nonexistent global variable 'x'", EventsRefused, LocalProtocolError),
]


@pytest.mark.parametrize(("text", "events", "store"), REPLIES)
def test_error_replies_are_classified_by_role(text: str, events: type[OrkiError], store: type[OrkiError]) -> None:
    for role, expected in (("event server", events), ("store", store)):
        error = parse_address("redis://127.0.0.1", role=role).error(text)  # type: ignore[arg-type]
        assert type(error) is expected
        assert error.message.startswith(f"the {role} at 127.0.0.1:6379 ")
        assert text in error.message or "maxclients" in error.message


def test_out_of_memory_advice_depends_on_the_role() -> None:
    for role, advice in (("event server", "orki streams tune"), ("store", "retention of finished tasks")):
        error = parse_address("redis://h", role=role).error("OOM command not allowed")  # type: ignore[arg-type]
        assert f"the {role} at h:6379 is out of memory; raise maxmemory, or " in error.message
        assert advice in error.message


@pytest.fixture
async def opened_connection() -> AsyncIterator[Callable[..., Connection]]:
    """Creates connections and closes them after the test."""
    async with contextlib.AsyncExitStack() as stack:

        def create(url: str, role: Role = "event server", timeout: float = 5.0) -> Connection:
            address = parse_address(url, role=role)
            found = Connection(address, name="test", connect_timeout=timeout, answer_timeout=timeout)
            stack.push_async_callback(found.close)
            return found

        yield create


@pytest.mark.parametrize(("role", "expected"), [("event server", EventsUnavailable), ("store", StoreUnavailable)])
async def test_a_busy_server_is_retryable_for_each_role(
    own_server: Any, opened_connection: Any, until: Any, role: Role, expected: type[OrkiError]
) -> None:
    server = own_server("--lua-time-limit", "100")
    runs = opened_connection(server.url, timeout=20.0)
    endless = asyncio.create_task(runs.execute((b"EVAL", "while true do end", 0)))
    asks = opened_connection(server.url, role)
    replies: list[Any] = []

    async def ask() -> bool:
        (reply,) = await asks.pipeline((b"SET", "key", "value"))
        replies.append(reply)
        return isinstance(reply, OrkiError)

    for _ in range(200):
        if await ask():
            break
        await asyncio.sleep(0.01)
    assert type(replies[-1]) is expected
    assert replies[-1].retryable
    assert "is running a long script" in replies[-1].message
    await asks.execute((b"SCRIPT", b"KILL"))
    with pytest.raises(EventsRefused):
        await endless
    assert await asks.execute((b"SET", "key", "value")) == b"OK"


async def test_error_replies_stay_in_their_positions(server: Any, opened_connection: Any) -> None:
    connection = opened_connection(server.url, "store")
    first, second, third, fourth = await connection.pipeline(
        ["PING"], ("EVALSHA", "0" * 40, 0), (b"NO-SUCH-COMMAND",), (b"ECHO", "ü")
    )
    assert (first, fourth) == (b"PONG", "ü".encode())
    assert type(second) is ScriptMissing
    assert type(third) is LocalProtocolError


async def test_an_error_inside_a_transaction_stays_in_its_position(server: Any, opened_connection: Any) -> None:
    connection = opened_connection(server.url)
    one, two = await connection.transaction((b"SET", "key", "value"), (b"XLEN", "key"))
    assert one == b"OK"
    assert type(two) is EventsRefused
    assert "WRONGTYPE" in two.message
    with pytest.raises(EventsRefused):
        await connection.transaction((b"NO-SUCH-COMMAND",))


async def test_an_exchange_ends_at_its_time_limit_and_the_next_one_uses_a_new_connection(
    server: Any, opened_connection: Any
) -> None:
    connection = opened_connection(server.url, "store")
    await connection.fetch_client_id()
    first = connection.client_id
    with pytest.raises(StoreUnavailable, match=r"does not answer: no reply within 0\.05 s"):
        await connection.execute((b"BLPOP", "nothing", 5), timeout=0.05)
    assert await connection.execute((b"ECHO", "again")) == b"again"
    await connection.fetch_client_id()
    assert connection.client_id != first


async def test_a_cancelled_exchange_leaves_no_replies_for_the_next(server: Any, opened_connection: Any) -> None:
    connection = opened_connection(server.url)
    waits = asyncio.create_task(connection.execute((b"BLPOP", "nothing", 5)))
    await asyncio.sleep(0.05)
    waits.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waits
    assert await connection.execute((b"ECHO", "again")) == b"again"


async def test_an_ended_connection_opens_no_more(server: Any, opened_connection: Any) -> None:
    connection = opened_connection(server.url)
    waits = asyncio.create_task(connection.execute((b"BLPOP", "nothing", 5)))
    await asyncio.sleep(0.05)
    await connection.end()
    with pytest.raises(EventsUnavailable):
        await waits
    with pytest.raises(LocalProtocolError, match="was ended"):
        await connection.execute((b"PING",))


@pytest.mark.parametrize(("role", "expected"), [("event server", EventsRefused), ("store", StoreUnavailable)])
async def test_a_refused_password_is_classified_by_role(
    own_server: Any, opened_connection: Any, role: Role, expected: type[OrkiError]
) -> None:
    server = own_server()
    with server.client as client:
        client.config_set("requirepass", "opensesame")
    for user, words in (("", "requires a password"), (":wrong@", "rejects this user and password")):
        connection = opened_connection(server.url.replace("redis://", f"redis://{user}"), role)
        with pytest.raises(expected, match=words):
            await connection.execute((b"PING",))
    connection = opened_connection(server.url.replace("redis://", "redis://:opensesame@"), role)
    assert await connection.execute((b"PING",)) == b"PONG"


async def test_a_server_without_free_connections_is_unavailable(own_server: Any, opened_connection: Any) -> None:
    server = own_server()
    with server.client as client:
        client.config_set("maxclients", 1)
    await opened_connection(server.url).execute((b"PING",))
    with pytest.raises(StoreUnavailable, match="maxclients"):
        await opened_connection(server.url, "store").execute((b"PING",))
