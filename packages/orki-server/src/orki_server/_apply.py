"""Contracts registered ahead of those who use them: task services for agents, streams and groups for the event plane.

Everything that a source declares is judged first; where anything does not fit, nothing is written. Then the services
are registered, the streams and the groups that readers declare likewise, and the groups are created: what is
published from now on waits for its consumers, whenever they come.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Final

from orki_contract.errors import ContractMismatch, InvalidContract
from orki_contract.images import package_images, service_digest
from orki_contract.model import ExternalGroup, Stream
from orki_contract.provenance import package_version
from orki_contract.read import ReadContract, read_image
from orki_contract.sources import Image, images_in
from orki_contract.validate import validate
from orki_events.connection import Connection as EventConnection
from orki_events.groups import ConsumerGroups
from orki_events.registry import StreamRegistry, StreamVersion
from orki_server._admission import Admission, ServiceContract
from orki_server._store.contracts import Contracts
from orki_server._store.fleet import Fleet
from orki_server._store.store import open_fleet

_SILENT_S: Final = 60
"""Time without a heartbeat after which an agent counts as gone, whatever interval its orchestrator has."""
_WHO: Final = "the given contract"


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """What a source declares that can be registered.

    Attributes:
        services: Task services.
        streams: Streams, with their owners' groups.
        subscriptions: Groups that readers declare on streams of others, each with the stream as they know it.
    """

    services: tuple[ServiceContract, ...]
    streams: tuple[StreamVersion, ...]
    subscriptions: tuple[tuple[ExternalGroup, StreamVersion], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """What became of one declaration.

    Attributes:
        kind: `service`, `stream` or `group`.
        name: Of the service or stream; `STREAM/GROUP` of a group.
        version: Version of its package; empty where nobody knows.
        digest: Of the contract.
        outcome: `applied`, `in use` (it is registered, and used already) or `older` (what is registered evolves it).
    """

    kind: str
    name: str
    version: str
    digest: str
    outcome: str


@asynccontextmanager
async def open_admission(redis_url: str) -> AsyncIterator[tuple[Admission, Contracts, Fleet]]:
    """The store of a fleet, for an operator's command.

    Raises:
        InvalidSetting: The URL cannot be used, or the store was laid out by another version.
        StoreUnavailable: The store is away.
    """
    async with open_fleet(redis_url) as (contracts, fleet):
        yield Admission(contracts, fleet, _silent_since), contracts, fleet


def read_declared(source: str, version: str = "") -> Declared:
    """Reads a source.

    Args:
        source: Path of an image, a wheel or a folder; or an installed distribution or proto package.
        version: Version of its packages; found out where it is empty, if the source tells.

    Raises:
        InvalidContract: There is no such source, it cannot be read, breaks a rule, or declares nothing to register.
    """
    services: list[ServiceContract] = []
    streams: list[StreamVersion] = []
    subscriptions: list[tuple[ExternalGroup, StreamVersion]] = []
    for image in images_in(source):
        for package, content in _packages(image):
            told = version or _version(source, package)
            read = _read(image.place, content, package)
            own = [file for file in read.files if file.package == package]
            names = sorted({task.service for file in own for task in file.contract.tasks})
            services += [
                ServiceContract(service=name, digest=service_digest(content, name), image=content, version=told)
                for name in names
            ]
            digest = f"sha256:{sha256(content).hexdigest()}"
            streams += [
                StreamVersion(stream=stream, package=package, digest=digest, image=content, version=told, ahead=True)
                for file in own
                for stream in file.contract.streams
            ]
            for file in own:
                subscriptions += [
                    (each, _stream_of(read, each, content, told)) for each in file.contract.external_groups
                ]
    if not services and not streams and not subscriptions:
        raise InvalidContract(f"{source} declares no task service, no stream and no reader's group: nothing to apply")
    return Declared(services=tuple(services), streams=tuple(streams), subscriptions=tuple(subscriptions))


async def judge(declared: Declared, admission: Admission, registry: StreamRegistry, link: EventConnection) -> list[str]:
    """Why declarations do not fit what is live or registered, each in words; empty where all fit.

    Raises:
        OrkiError: A server does not answer or refuses.
    """
    refusals = []
    for service in declared.services:
        try:
            await admission.judge(service, f"{_WHO} has")
        except ContractMismatch as error:
            refusals.append(error.message)
    for version in [*declared.streams, *(stream for _, stream in declared.subscriptions)]:
        try:
            await registry.check(link, version, _WHO)
        except ContractMismatch as error:
            refusals.append(error.message)
    return list(dict.fromkeys(refusals))


async def apply(
    declared: Declared, admission: Admission, registry: StreamRegistry, link: EventConnection
) -> list[Applied]:
    """Registers declarations that were judged, and creates the groups.

    Raises:
        ContractMismatch: Something that does not fit came in between.
        OrkiError: A server does not answer or refuses. What was written stays; applying again does the rest.
    """
    keeper = ConsumerGroups(lambda gap: None)
    done: list[Applied] = []
    for service in declared.services:
        family = await admission.admit(service, f"{_WHO} has", ahead=True)
        live = await admission.in_use(service)
        outcome = "in use" if live else "applied" if family.leading.digest == service.digest else "older"
        done.append(_applied("service", service.service, service.version, service.digest, outcome))
    for version in declared.streams:
        stands = await registry.register_version(link, version, _WHO, replaces=True)
        await keeper.ensure(link, version.stream, version.stream.groups)
        outcome = "older" if stands.digest != version.digest else "applied" if stands.ahead else "in use"
        done.append(_applied("stream", version.stream.name, version.version, version.digest, outcome))
    for subscription, version in declared.subscriptions:
        await registry.declare_group(link, version.stream, subscription.group)
        await keeper.ensure(link, version.stream, (subscription.group,))
        name = f"{subscription.stream}/{subscription.group.name}"
        done.append(_applied("group", name, version.version, version.digest, "applied"))
    return done


def _applied(kind: str, name: str, version: str, digest: str, outcome: str) -> Applied:
    return Applied(kind=kind, name=name, version=version, digest=digest, outcome=outcome)


def _packages(image: Image) -> Iterator[tuple[str, bytes]]:
    """The proto packages that an image speaks for, each with its own image."""
    try:
        schema = read_image(image.content).schema
    except InvalidContract as error:
        raise InvalidContract(f"{image.place}: {error.message}") from error
    packages = {file.package for file in schema.files.values()}
    if not image.shipped:
        yield from sorted(package_images(image.content, packages).items())
        return
    home = image.place.replace("!", "/").rpartition("/")[0]
    placed = {each for each in packages if each and f"/{home}".endswith("/" + each.replace(".", "/"))}
    imported = {
        schema.files[path].package
        for file in schema.files.values()
        for path in file.dependency
        if schema.files[path].package != file.package
    }
    for package in sorted(placed or packages & {image.place} or packages - imported):
        yield package, image.content


def _read(place: str, content: bytes, package: str) -> ReadContract:
    read = read_image(content)
    paths = {file.path for file in read.files if file.package == package}
    for violation in validate(read):
        if violation.location.file in paths:
            raise InvalidContract(f"{place}: {violation}")
    return read


def _stream_of(read: ReadContract, subscription: ExternalGroup, content: bytes, version: str) -> StreamVersion:
    """The stream that a reader subscribes to, as the reader's image knows it."""
    stream: Stream | None = next((each for each in read.contract.streams if each.name == subscription.stream), None)
    if stream is None:
        raise InvalidContract(
            f'{subscription.package} reads the stream "{subscription.stream}", which its image does not declare'
        )
    package = read.schema.messages[stream.message].file.package
    digest = f"sha256:{sha256(content).hexdigest()}"
    return StreamVersion(stream=stream, package=package, digest=digest, image=content, version=version)


def _version(source: str, package: str) -> str:
    """Version of a source's packages, where its name tells, or who installed it."""
    path = Path(source)
    if path.suffix == ".whl":
        # The name of a wheel: distribution, version, and tags.
        return path.name.split("-")[1] if path.name.count("-") >= 4 else ""
    if path.exists():
        return ""
    try:
        return metadata.version(source)
    except (metadata.PackageNotFoundError, ValueError):
        return package_version(package)


def _silent_since() -> int:
    return time.time_ns() // 1000 - _SILENT_S * 1_000_000
