"""Registered contracts in the store: changes, liveness, removal and the leading contract."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from redis import Redis

from orki.control.v1.session_pb2 import ServedService
from orki.control.v1.task_pb2 import AgentSnapshot
from orki_contract.errors import ContractMismatch, InvalidContract, InvalidSetting
from orki_contract.model import Backoff, TaskMethod
from orki_contract.trace import new_span
from orki_server._admission import Admission, ContractSet, ServiceContract, most_patient
from orki_server._store import operations
from orki_server._store.contracts import Contracts, RegisteredContract
from orki_server._store.fleet import Fleet, open_fleet
from orki_server._store.operations import Recipient, new_task_id
from orki_server._store.store import Store

SERVICE = "servertests.v1.WorkService"
Make = Callable[..., Any]


def add_field(file: FileDescriptorProto) -> None:
    field = file.message_type[0].field.add(name="note", number=2)
    field.type, field.label = FieldDescriptorProto.TYPE_STRING, FieldDescriptorProto.LABEL_OPTIONAL


def retype(file: FileDescriptorProto) -> None:
    file.message_type[0].field[0].type = FieldDescriptorProto.TYPE_INT64


def contract_of(served: ServedService) -> ServiceContract:
    return ServiceContract(service=served.service, digest=served.digest, image=served.image, version=served.version)


@pytest.fixture
def three(work: Make) -> tuple[ServiceContract, ServiceContract, ServiceContract]:
    """An old contract, a compatible new one, and an incompatible one."""
    made = [work(version="1.0.0"), work(version="1.1.0", edit=add_field), work(version="2.0.0", edit=retype)]
    old, new, broken = map(contract_of, made)
    return old, new, broken


@pytest.fixture
def admission(store: Store) -> Admission:
    return Admission(Contracts(store.connection, store.shards), Fleet(store.connection), lambda: time.time() - 60)


def row(contract: ServiceContract, *, ahead: bool = False) -> RegisteredContract:
    return RegisteredContract(
        service=contract.service,
        digest=contract.digest,
        image=contract.image,
        version=contract.version,
        ahead=ahead,
        registered=0.0,
        admissions=0,
    )


async def digests(store: Store) -> set[str]:
    return {each.digest for each in (await Contracts(store.connection, store.shards).registered([SERVICE]))[SERVICE]}


async def open_session(store: Store, agent_id: str, contract: ServiceContract, *, connected: bool = True) -> str:
    """Open an agent's session under a contract. Returns the service whose contract is missing, or an empty text."""
    agent = AgentSnapshot(
        agent_id=agent_id, services=[SERVICE], connected=connected, last_heartbeat_us=time.time_ns() // 1000
    )
    return (await Fleet(store.connection).open_session(agent, {SERVICE: contract.digest})).missing


async def test_a_change_based_on_an_outdated_view_does_nothing(store: Store, three: Any) -> None:
    old, new, _ = three
    first: dict[str, Any] = {"seen": [], "removed": [], "added": row(old), "leading": old.digest}
    assert await Contracts(store.connection, store.shards).change(SERVICE, **first)
    assert not await Contracts(store.connection, store.shards).change(SERVICE, **first), "it saw an empty store"
    (seen,) = (await Contracts(store.connection, store.shards).registered([SERVICE]))[SERVICE]
    exchange: dict[str, Any] = {"seen": [seen], "removed": [seen], "added": row(new), "leading": new.digest}
    assert await open_session(store, "a", old) == ""
    assert not await Contracts(store.connection, store.shards).change(SERVICE, **exchange), (
        "what goes was used since it was seen"
    )
    (seen,) = (await Contracts(store.connection, store.shards).registered([SERVICE]))[SERVICE]
    assert seen.admissions == 1
    before = await Contracts(store.connection, store.shards).revisions()
    again: dict[str, Any] = {"seen": [seen], "removed": [seen], "added": row(new), "leading": new.digest}
    assert await Contracts(store.connection, store.shards).change(SERVICE, **again)
    assert await digests(store) == {new.digest}
    assert before[SERVICE] != (await Contracts(store.connection, store.shards).revisions())[SERVICE]
    assert await open_session(store, "a", old) == SERVICE, "its contract is not registered any more"
    (service,) = await Contracts(store.connection, store.shards).leading()
    assert (service.digest, service.image) == (new.digest, new.image)


async def test_withdrawing_the_last_contract_removes_the_keys_of_its_service(
    store: Store, admission: Admission, three: Any, redis_url: str
) -> None:
    old, _, _ = three
    await admission.admit(old, "test has")
    (seen,) = (await Contracts(store.connection, store.shards).registered([SERVICE]))[SERVICE]
    assert await admission.withdraw(seen)
    assert not await admission.withdraw(seen)
    assert await Contracts(store.connection, store.shards).leading() == []
    with Redis.from_url(redis_url) as redis:
        assert not [name for name in redis.scan_iter() if b":service:" in name]


async def test_tasks_without_a_digest_keep_every_contract_live(store: Store, admission: Admission, three: Any) -> None:
    old, new, broken = three
    await admission.admit(old, "test has")
    submit = operations.submit(
        task_id=new_task_id(1),
        method=TaskMethod(service=SERVICE, name="Do", request="q", response="r"),
        request=b"q",
        digest="0" * 64,
        idempotency_key="",
        span=new_span(),
        actor="t",
    )
    await store.apply(submit)
    with pytest.raises(ContractMismatch, match="1 task of it has not ended"):
        await admission.admit(broken, "test has")
    assert (await admission.admit(new, "test has")).leading.digest == new.digest
    assert await digests(store) == {old.digest, new.digest}
    await store.apply(operations.cancel(str(submit.arguments[0]), "", "t"))
    assert (await admission.admit(broken, "test has")).leading.digest == broken.digest


async def test_a_store_of_an_earlier_layout_is_refused(redis_url: str) -> None:
    with Redis.from_url(redis_url) as redis:
        redis.hset("orki:{of}:layout", mapping={"shards": 4, "version": 1, "generation": "x"})
    store = Store(redis_url, shards=4)
    with pytest.raises(
        InvalidSetting, match="has layout 1, this orchestrator writes 3; use orchestrators of one version"
    ):
        await store.open()
    await store.close()
    with pytest.raises(InvalidSetting, match="has layout 1, this command knows 3"):
        async with open_fleet(redis_url):
            pass


async def test_only_contracts_that_are_not_live_are_removed(store: Store, admission: Admission, three: Any) -> None:
    old, new, _ = three
    await admission.admit(old, "test has")
    assert not await admission.clean(SERVICE, 0), "the last one stays"
    assert await open_session(store, "a", old) == ""
    await admission.admit(new, "test has")
    assert await digests(store) == {old.digest, new.digest}
    assert not await admission.clean(SERVICE, 60.0), "it may have come a moment ago"
    assert await admission.clean(SERVICE, -1)
    assert await digests(store) == {old.digest}
    await admission.admit(new, "test has", ahead=True)
    assert not await admission.clean(SERVICE, -1), "what was applied ahead waits for its agents"
    assert await open_session(store, "b", new) == ""
    assert await open_session(store, "a", old, connected=False) == ""
    assert await admission.clean(SERVICE, -1)
    assert await digests(store) == {new.digest}


async def test_no_contract_is_removed_if_none_is_live(store: Store, admission: Admission, three: Any) -> None:
    """All agents may be disconnected for a moment, and reconnect with any of the contracts."""
    old, new, _ = three
    await admission.admit(old, "test has")
    assert await open_session(store, "a", old) == ""
    await admission.admit(new, "test has")
    await open_session(store, "a", old, connected=False)
    assert not await admission.clean(SERVICE, -1)
    assert await digests(store) == {old.digest, new.digest}


async def test_unfinished_tasks_are_counted_by_contract(store: Store) -> None:
    method = TaskMethod(service=SERVICE, name="Do", request="q", response="r")

    async def submit(shard: int, contract: str) -> str:
        task_id = new_task_id(shard)
        await store.apply(
            operations.submit(
                task_id=task_id,
                method=method,
                request=b"q",
                digest="0" * 64,
                idempotency_key="",
                span=new_span(),
                actor="t",
                contract=contract,
            )
        )
        return task_id

    tasks = [await submit(0, "sha256:a"), await submit(1, "sha256:a"), await submit(1, "sha256:b"), await submit(2, "")]
    assert await Contracts(store.connection, store.shards).unfinished(SERVICE) == {"sha256:a": 2, "sha256:b": 1, "": 1}
    assert await Contracts(store.connection, store.shards).unfinished("servertests.v1.Work") == {}
    await store.apply(operations.cancel(tasks[0], "", "t"))
    recipient = Recipient("a", "i", 1, (method.full_name,))
    (offered,) = (await store.offer(operations.offer(1, 60.0, (recipient,)))).offers
    await store.apply(operations.succeed("a", offered.attempt, b"r"))
    left = await Contracts(store.connection, store.shards).unfinished(SERVICE)
    assert sum(left.values()) == 2
    assert left.get("sha256:a", 0) + left.get("sha256:b", 0) == 1
    for task in tasks:
        await store.apply(operations.cancel(task, "", "t"))
    assert await Contracts(store.connection, store.shards).unfinished(SERVICE) == {}


async def test_incompatible_contracts_are_never_live_together(redis_url: str, store: Store, three: Any) -> None:
    """Agents of all versions connect to two orchestrators concurrently; all contracts in use are always compatible."""
    old, new, broken = three
    other = Store(redis_url, shards=4)
    await other.open()
    doors = [
        (each, Admission(Contracts(each.connection, each.shards), Fleet(each.connection), lambda: 0.0))
        for each in (store, other)
    ]
    chance = random.Random(7)
    entered: Counter[str] = Counter()
    seen: list[set[str]] = []

    async def live_once(number: int) -> None:
        for _ in range(12):
            at, admission = chance.choice(doors)
            contract = chance.choice([old, new, broken, broken])
            agent_id = f"a{number}"
            try:
                for _ in range(20):  # as a hello does, until the checked contracts are still registered
                    await admission.admit(contract, "test has", agent_id=agent_id)
                    if not await open_session(at, agent_id, contract):
                        break
                else:
                    raise AssertionError("no session was opened")
            except ContractMismatch:
                entered["refused"] += 1
                await asyncio.sleep(chance.uniform(0, 0.02))
                continue
            entered[contract.version] += 1
            agents = await Fleet(at.connection).agents()
            seen.append({each.digests[SERVICE] for each in agents if each.agent.connected})
            await asyncio.sleep(chance.uniform(0, 0.02))
            gone = AgentSnapshot(agent_id=agent_id, services=[SERVICE], connected=False)
            with Redis.from_url(redis_url) as redis:
                redis.hset(f"orki:{{of}}:agent:{agent_id}", "snapshot", gone.SerializeToString())

    async with asyncio.timeout(90):
        await asyncio.gather(*(live_once(number) for number in range(4)))
    await other.close()
    assert all(len(each) == 1 or broken.digest not in each for each in seen), seen
    assert entered["refused"], "no contract was ever refused, so the test proves nothing"
    assert min(entered["2.0.0"], entered["1.0.0"] + entered["1.1.0"]) > 0


# --- without a store ---


def test_merged_methods_have_the_most_patient_values() -> None:
    def task(**values: Any) -> TaskMethod:
        return TaskMethod(service=SERVICE, name="Do", request="q", response="r", **values)

    slow = Backoff(initial=0.01, maximum=90.0, multiplier=3.0)
    one = task(heartbeat_timeout=9.0, attempt_timeout=5.0, stall_timeout=0.0, max_attempts=2, backoff=slow)
    two = task(heartbeat_timeout=8.0, attempt_timeout=6.0, stall_timeout=4.0, progress="p", directive="d")
    both = most_patient([one, two])
    assert both == most_patient([two, one])
    assert (both.heartbeat_timeout, both.attempt_timeout, both.max_attempts) == (9.0, 6.0, 3)
    assert both.stall_timeout == 0, "no limit is the most patient one"
    assert most_patient([task(total_timeout=0.005), task(total_timeout=0.007)]).total_timeout == 0.007
    assert (both.backoff, both.progress, both.directive) == (slow, "p", "d")
    assert most_patient([one]) == one


def test_the_contract_that_evolves_all_others_leads(work: Make) -> None:
    def third(file: FileDescriptorProto) -> None:
        add_field(file)
        rpc = file.service[0].method.add()
        rpc.CopyFrom(file.service[0].method[0])
        rpc.name = "Extra"

    chain = [contract_of(each) for each in (work(), work(edit=add_field), work(edit=third))]
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        family = ContractSet([chain[at] for at in order])
        assert family.leading.digest == chain[2].digest
        assert set(family.methods) == set(chain[2].methods)


@pytest.mark.parametrize(
    ("image", "cause"),
    [(b"", "has no contract.binpb"), (b"\xff\xff", "image"), (b"\x0a\x00", "declares no task or tool service")],
)
def test_a_malformed_image_is_refused_with_the_cause(image: bytes, cause: str) -> None:
    contract = ServiceContract(service=SERVICE, digest="sha256:" + "0" * 64, image=image)
    with pytest.raises(InvalidContract, match=cause):
        contract.check()
