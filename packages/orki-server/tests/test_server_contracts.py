"""Contracts of connecting agents: which are accepted or refused, and how tasks run while several are live."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet
from redis import Redis

from orki.control.v1.attempt_pb2 import TaskState
from orki.control.v1.session_pb2 import ServedService
from orki.control.v1.task_pb2 import Submission, TaskSnapshot
from orki.events.v1.task_orki import TASKS
from orki_contract.errors import ContractMismatch, UnknownMethod
from orki_contract.images import image_of
from orki_control import Client
from orki_events.registry import StreamVersion
from orki_server._orchestrator import Orchestrator
from orki_server._store.contracts import Contracts
from orki_server._store.store import Store

SERVICE = "servertests.v1.WorkService"
Make = Callable[..., Any]
Launch = Callable[[Any], Awaitable[Orchestrator]]


@pytest.fixture
async def client(orchestrator: Orchestrator) -> Any:
    async with Client(orchestrator.address) as opened:
        yield opened


async def submit(client: Client, method: str = "Do", request: bytes = b"\n\x01q") -> str:
    (task,) = await client.submit_raw([Submission(method=f"{SERVICE}/{method}", request=request)])
    return task.task_id


async def ended(client: Client, task_id: str) -> TaskSnapshot:
    async with asyncio.timeout(20):
        while (task := await client.get(task_id)).ended_us == 0:
            await asyncio.sleep(0.02)
    return task


async def kill(agent: Any, agent_id: str, orchestrator: Orchestrator) -> None:
    """End an agent without notice, and wait until the orchestrator has seen the end of its stream."""
    await agent.close()
    await agent.until(lambda: agent_id not in orchestrator._sessions._sessions)


async def refused(agent: Any) -> str:
    """Return the reason why an agent is refused."""
    await agent.until(lambda: agent.closed is not None or agent.opened)
    assert isinstance(agent.closed, ContractMismatch), agent.closed
    return agent.closed.message


def older(work: Make) -> ServedService:
    contract: ServedService = work(version="1.0.0")
    return contract


def newer(work: Make) -> ServedService:
    def edit(file: FileDescriptorProto) -> None:
        field = file.message_type[0].field.add(name="note", number=2)
        field.type, field.label = FieldDescriptorProto.TYPE_STRING, FieldDescriptorProto.LABEL_OPTIONAL
        rpc = file.service[0].method.add()
        rpc.CopyFrom(file.service[0].method[0])
        rpc.name = "Extra"

    contract: ServedService = work(version="1.1.0", edit=edit, max_attempts=7)
    return contract


def broken(work: Make) -> ServedService:
    def edit(file: FileDescriptorProto) -> None:
        file.message_type[0].field[0].type = FieldDescriptorProto.TYPE_INT64

    contract: ServedService = work(version="2.0.0", edit=edit)
    return contract


def check_refusal(message: str, newcomer: ServedService, live: ServedService, why: str) -> None:
    """Check that a refusal names the rule, its subject, both versions, and why the other one is live."""
    for part in (
        SERVICE,
        "ORKI_FIELD_RETYPED",
        "servertests.v1.DoRequest.body",
        f"{newcomer.version} ({newcomer.digest[:19]})",
        f"{live.version} ({live.digest[:19]})",
        why,
    ):
        assert part in message, (part, message)


# --- two versions that fit ---


@pytest.mark.parametrize("first_is_older", [True, False], ids=["new agent, old live", "old agent, new live"])
async def test_compatible_versions_serve_together_in_either_order(
    orchestrator: Orchestrator, client: Client, stand_in: Make, work: Make, first_is_older: bool
) -> None:
    pair = [older(work), newer(work)]
    first, second = pair if first_is_older else pair[::-1]
    one = stand_in(orchestrator.address, [first], agent_id="one", slots=1)
    await one.ready()
    two = stand_in(orchestrator.address, [second], agent_id="two", slots=1)
    await two.ready()
    tasks = [await submit(client) for _ in range(12)]
    states = [(await ended(client, each)).state for each in tasks]
    assert set(states) == {TaskState.TASK_STATE_SUCCEEDED}
    assert one.offers
    assert two.offers
    (service,) = await client.list_services()
    assert service.digest == pair[1].digest, "the newer one leads in either order"
    assert sorted(service.agent_ids) == ["one", "two"]


async def test_a_task_that_an_old_agent_lacks_is_not_offered_to_it(
    orchestrator: Orchestrator, client: Client, stand_in: Make, work: Make
) -> None:
    old = stand_in(orchestrator.address, [older(work)], agent_id="old")
    await old.ready()
    with pytest.raises(UnknownMethod, match="has no task"):
        await submit(client, "Extra")
    new = stand_in(orchestrator.address, [newer(work)], agent_id="new", slots=1)
    await new.ready()
    tasks = [await submit(client, "Extra") for _ in range(6)]
    assert {(await ended(client, each)).agent_id for each in tasks} == {"new"}
    assert {offer.offer.method for offer in old.offers} <= {f"{SERVICE}/Do"}
    await kill(new, "new", orchestrator)
    waiting = await submit(client, "Extra")
    taken = await submit(client)
    assert (await ended(client, taken)).agent_id == "old"
    assert (await client.get(waiting)).state == TaskState.TASK_STATE_QUEUED


async def test_the_most_patient_values_apply_while_several_versions_are_live(
    orchestrator: Orchestrator, client: Client, stand_in: Make, work: Make
) -> None:
    def lease(contract: ServedService, heartbeat_s: int, attempt_s: int) -> ServedService:
        made: ServedService = work(
            version=contract.version,
            heartbeat_timeout={"seconds": heartbeat_s},
            attempt_timeout={"seconds": attempt_s},
        )
        return made

    quick = stand_in(orchestrator.address, [lease(older(work), 10, 60)], agent_id="quick", slots=1)
    await quick.ready()
    await ended(client, await submit(client))
    patient = stand_in(orchestrator.address, [lease(newer(work), 30, 900)], agent_id="patient", slots=1)
    await patient.ready()
    await asyncio.gather(*[ended(client, await submit(client)) for _ in range(8)])
    assert (quick.offers[0].offer.lease_ms, quick.offers[0].offer.attempt_timeout_ms) == (10_000, 60_000)
    later = [each.offer for each in [*quick.offers[1:], *patient.offers]]
    assert {(each.lease_ms, each.attempt_timeout_ms) for each in later} == {(30_000, 900_000)}


# --- two that do not ---


@pytest.mark.parametrize("first_is_older", [True, False], ids=["new agent, old live", "old agent, new live"])
async def test_incompatible_versions_are_refused_in_either_order(
    orchestrator: Orchestrator, stand_in: Make, work: Make, first_is_older: bool
) -> None:
    pair = [older(work), broken(work)]
    first, second = pair if first_is_older else pair[::-1]
    one = stand_in(orchestrator.address, [first], agent_id="one")
    await one.ready()
    two = stand_in(orchestrator.address, [second], agent_id="two")
    message = await refused(two)
    check_refusal(message, second, first, "agent one serves it")
    # The change is described from the older to the newer version, in either order of arrival.
    change = message.partition("From ")[2]
    assert change.index(pair[0].version) < change.index(f"to {pair[1].version}")
    assert "bytes → int64" in change
    await kill(one, "one", orchestrator)
    three = stand_in(orchestrator.address, [second], agent_id="three")
    await three.until(lambda: bool(three.opened or three.closed))
    assert three.closed is None, "nothing is live any more"


async def test_a_new_version_is_checked_against_every_live_one(
    orchestrator: Orchestrator, stand_in: Make, work: Make
) -> None:
    """The new version is compatible with the leading one and incompatible with the other."""

    def branch(name: str, kind: Any) -> ServedService:
        def edit(file: FileDescriptorProto) -> None:
            field = file.message_type[0].field.add(name=name, number=2)
            field.type, field.label = kind, FieldDescriptorProto.LABEL_OPTIONAL

        made: ServedService = work(version=name, edit=edit)
        return made

    base, text = older(work), branch("text", FieldDescriptorProto.TYPE_STRING)
    for agent_id, contract in (("base", base), ("text", text)):
        await stand_in(orchestrator.address, [contract], agent_id=agent_id).ready()
    number = branch("number", FieldDescriptorProto.TYPE_INT64)
    message = await refused(stand_in(orchestrator.address, [number], agent_id="number"))
    assert "agent text serves it" in message
    assert "ORKI_FIELD_RE" in message


async def test_unfinished_tasks_keep_only_their_contract_live(
    orchestrator: Orchestrator, client: Client, stand_in: Make, work: Make
) -> None:
    first = stand_in(orchestrator.address, [older(work)], taking=False)
    await first.ready()
    task = await submit(client)
    await kill(first, "agent-1", orchestrator)
    message = await refused(stand_in(orchestrator.address, [broken(work)]))
    check_refusal(message, broken(work), older(work), "1 task of it has not ended")
    await client.cancel(task)
    await ended(client, task)
    last = stand_in(orchestrator.address, [broken(work)], agent_id="last")
    await last.until(lambda: bool(last.opened or last.closed))
    assert last.closed is None


async def test_an_agent_s_own_earlier_session_does_not_block_its_new_contract(
    orchestrator: Orchestrator, client: Client, stand_in: Make, work: Make
) -> None:
    await stand_in(orchestrator.address, [older(work)]).ready()
    await stand_in(orchestrator.address, [broken(work)]).ready()
    (service,) = await client.list_services()
    assert service.digest == broken(work).digest


async def test_changes_without_effect_on_the_wire_are_accepted(
    orchestrator: Orchestrator, stand_in: Make, work: Make
) -> None:
    """Messages that the service does not use may change, and a reserved field may be removed."""

    def unrelated(file: FileDescriptorProto) -> None:
        field = file.message_type.add(name="Elsewhere").field.add(name="x", number=1)
        field.type, field.label = FieldDescriptorProto.TYPE_STRING, FieldDescriptorProto.LABEL_OPTIONAL

    def changed(file: FileDescriptorProto) -> None:
        unrelated(file)
        file.message_type[-1].field[0].type = FieldDescriptorProto.TYPE_INT64
        del file.message_type[2].field[0]
        file.message_type[2].reserved_range.add(start=1, end=2)

    await stand_in(orchestrator.address, [work(edit=unrelated)], agent_id="one").ready()
    two = stand_in(orchestrator.address, [work(edit=changed)], agent_id="two")
    await two.until(lambda: bool(two.opened or two.closed))
    assert two.closed is None


# --- several orchestrators, and time ---


async def test_of_two_incompatible_contracts_only_one_enters_by_two_orchestrators(
    redis_url: str, options: Make, launch: Launch, stand_in: Make, work: Make
) -> None:
    running = [await launch(options(redis_url, orchestrator_id=name)) for name in ("o1", "o2")]
    contracts = [older(work), broken(work)]
    for turn in range(6):
        agents = [
            stand_in(running[(turn + at) % 2].address, [contract], agent_id=f"a{turn}{at}")
            for at, contract in enumerate(contracts)
        ]
        for agent in agents:
            await agent.until(lambda agent=agent: bool(agent.opened or agent.closed))
        assert sorted(agent.closed is None for agent in agents) == [False, True]
        await refused(next(agent for agent in agents if agent.closed))
        for agent in agents:
            await agent.close()


async def test_an_agent_of_another_orchestrator_keeps_its_contract_live(
    redis_url: str, options: Make, launch: Launch, stand_in: Make, work: Make
) -> None:
    here = await launch(options(redis_url, orchestrator_id="o1"))
    there = await launch(options(redis_url, orchestrator_id="o2"))
    await stand_in(there.address, [older(work)], agent_id="far").ready()
    message = await refused(stand_in(here.address, [broken(work)], agent_id="near"))
    check_refusal(message, broken(work), older(work), "agent far serves it")
    # A client of the other orchestrator reaches a task that only the new contract here has.
    await stand_in(here.address, [newer(work)], agent_id="near").ready()
    async with Client(there.address) as client:
        assert (await ended(client, await submit(client, "Extra"))).agent_id == "near"


async def test_an_orchestrator_with_incompatible_streams_does_not_start(redis_url: str, options: Make) -> None:
    image = FileDescriptorSet.FromString(image_of("orki.events.v1"))
    (file,) = [each for each in image.file if each.name == "orki/events/v1/task.proto"]
    (event,) = [each for each in file.message_type if each.name == "TaskEvent"]
    event.field[0].type = FieldDescriptorProto.TYPE_FIXED64
    event.field[0].ClearField("type_name")
    content = image.SerializeToString()
    other = StreamVersion(
        contract=TASKS.contract, package="orki.events.v1", digest="sha256:other", image=content, version="9.0.0"
    )
    with Redis.from_url(redis_url) as redis:
        redis.hset("orki:images", "sha256:other", content)
        redis.hset("orki:streams", "tasks", other.record())
    refused = Orchestrator(options(redis_url))
    with pytest.raises(ContractMismatch, match=r"ORKI_FIELD_RETYPED.*orki contract withdraw tasks"):
        await refused.start()
    with Redis.from_url(redis_url) as redis:
        assert redis.hdel("orki:streams", "tasks") == 1
    running = Orchestrator(options(redis_url))
    await running.start()
    await running.stop()


async def test_registered_contracts_survive_a_restart(
    redis_url: str, options: Make, launch: Launch, stand_in: Make, work: Make
) -> None:
    first = await launch(options(redis_url))
    agents = [stand_in(first.address, [make(work)], agent_id=name) for name, make in (("old", older), ("new", newer))]
    for agent in agents:
        await agent.ready()
    for agent in agents:
        await agent.close()
    await first.stop()
    again = await launch(options(redis_url))
    async with Client(again.address) as client:
        task = await submit(client, "Extra")
        await stand_in(again.address, [newer(work)], agent_id="new").ready()
        assert (await ended(client, task)).agent_id == "new"


async def test_a_rolling_upgrade_and_its_rollback(
    orchestrator: Orchestrator, store: Store, client: Client, stand_in: Make, work: Make
) -> None:
    """Agents are replaced one by one while tasks run; then the old version is removed, and may return."""
    names = ("a", "b", "c")
    agents = {name: stand_in(orchestrator.address, [older(work)], agent_id=name) for name in names}
    for agent in agents.values():
        await agent.ready()
    tasks = []
    for make in (newer, older):
        for name in names:
            tasks += [await submit(client) for _ in range(3)]
            agents[name] = stand_in(orchestrator.address, [make(work)], agent_id=name)
            await agents[name].ready()
            assert agents[name].closed is None
            tasks += [await submit(client) for _ in range(3)]
    states = {(await ended(client, each)).state for each in tasks}
    assert states == {TaskState.TASK_STATE_SUCCEEDED}
    registered = (await Contracts(store.connection, store.shards).registered([SERVICE]))[SERVICE]
    assert {each.digest for each in registered} == {older(work).digest, newer(work).digest}
    # No agent serves the newer contract any more, so it is removed.
    await kill(agents["a"], "a", orchestrator)
    away = stand_in(orchestrator.address, [work(max_attempts=9)], agent_id="a")
    await away.ready()
    registered = (await Contracts(store.connection, store.shards).registered([SERVICE]))[SERVICE]
    assert newer(work).digest not in {each.digest for each in registered}
