"""Registers contracts ahead of their use: task services, streams, and the consumer groups of readers.

All declarations of a source are checked first; if one is incompatible, nothing is written. Then services, streams and
groups are registered and the groups are created, so that they receive events published before any consumer runs.
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
from orki_contract.images import Image, images_in, package_images, package_version, service_digest
from orki_contract.model import ExternalGroup, Stream
from orki_contract.read import ReadContract, read_image
from orki_contract.validate import validate
from orki_events.connection import Connection as EventConnection
from orki_events.groups import ConsumerGroups
from orki_events.registry import StreamRegistry, StreamVersion
from orki_server._admission import Admission, ServiceContract
from orki_server._store.contracts import Contracts
from orki_server._store.fleet import Fleet, open_fleet

_SILENCE_TIMEOUT: Final = 60.0
"""Time without a heartbeat after which an agent counts as disconnected, for any interval of its orchestrator."""
_SUBJECT: Final = "the given contract"


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """The declarations of a source that can be registered.

    Attributes:
        services: Task services.
        streams: Streams, with their owners' groups.
        external_groups: Groups that a reader declares on another package's stream, with its version of the stream.
    """

    services: tuple[ServiceContract, ...]
    streams: tuple[StreamVersion, ...]
    external_groups: tuple[tuple[ExternalGroup, StreamVersion], ...]


@dataclass(frozen=True, slots=True)
class Applied:
    """The outcome of one declaration.

    Attributes:
        kind: `service`, `stream` or `group`.
        name: Name of the service or stream; `STREAM/GROUP` for a group.
        version: Version of its package; empty if unknown.
        digest: Digest of the contract.
        outcome: `applied`, `in use` (registered and used already) or `older` (a newer version is registered).
    """

    kind: str
    name: str
    version: str
    digest: str
    outcome: str


@asynccontextmanager
async def open_admission(redis_url: str) -> AsyncIterator[tuple[Admission, Contracts, Fleet]]:
    """Open the contracts of an existing store for a command.

    Raises:
        InvalidSetting: The URL is malformed, or the store has the layout of another version.
        StoreUnavailable: The store is down.
    """
    async with open_fleet(redis_url) as (contracts, fleet):
        yield Admission(contracts, fleet, lambda: time.time() - _SILENCE_TIMEOUT), contracts, fleet


def read_declared(source: str, version: str = "") -> Declared:
    """Read the declarations of a source.

    Args:
        source: Path of an image, a wheel or a folder; or an installed distribution or proto package.
        version: Version of its packages; if empty, it is taken from the source where possible.

    Raises:
        InvalidContract: The source does not exist, cannot be read, breaks a rule, or declares nothing to register.
    """
    services: list[ServiceContract] = []
    streams: list[StreamVersion] = []
    external_groups: list[tuple[ExternalGroup, StreamVersion]] = []
    for image in images_in(source):
        for package, content in _packages(image):
            release = version or _version(source, package)
            read = _read(image.place, content, package)
            own = [file for file in read.files if file.package == package]
            names = sorted({task.service for file in own for task in file.contract.tasks})
            services += [
                ServiceContract(service=name, digest=service_digest(content, name), image=content, version=release)
                for name in names
            ]
            digest = f"sha256:{sha256(content).hexdigest()}"
            streams += [
                StreamVersion(
                    contract=stream, package=package, digest=digest, image=content, version=release, ahead=True
                )
                for file in own
                for stream in file.contract.streams
            ]
            for file in own:
                external_groups += [
                    (each, _stream_of(read, each, content, release)) for each in file.contract.external_groups
                ]
    if not services and not streams and not external_groups:
        raise InvalidContract(f"{source} declares no task service, no stream and no reader's group; nothing to apply")
    return Declared(services=tuple(services), streams=tuple(streams), external_groups=tuple(external_groups))


async def check_declared(
    declared: Declared, admission: Admission, registry: StreamRegistry, connection: EventConnection
) -> list[str]:
    """Return one reason for each declaration that is incompatible with a live or registered contract.

    Raises:
        OrkiError: A server does not answer or refuses the request.
    """
    refusals = []
    for service in declared.services:
        try:
            await admission.check(service, f"{_SUBJECT} has")
        except ContractMismatch as error:
            refusals.append(error.message)
    for version in [*declared.streams, *(stream for _, stream in declared.external_groups)]:
        try:
            await registry.check(connection, version, _SUBJECT)
        except ContractMismatch as error:
            refusals.append(error.message)
    return list(dict.fromkeys(refusals))


async def apply(
    declared: Declared, admission: Admission, registry: StreamRegistry, connection: EventConnection
) -> list[Applied]:
    """Register checked declarations and create the groups.

    Raises:
        ContractMismatch: An incompatible contract was registered meanwhile.
        OrkiError: A server does not answer or refuses the request. Written declarations stay; apply again to finish.
    """
    groups = ConsumerGroups(lambda gap: None)
    done: list[Applied] = []
    for service in declared.services:
        contracts = await admission.admit(service, f"{_SUBJECT} has", ahead=True)
        live = await admission.in_use(service)
        outcome = "in use" if live else "applied" if contracts.leading.digest == service.digest else "older"
        done.append(Applied("service", service.service, service.version, service.digest, outcome))
    for version in declared.streams:
        registered = await registry.register_version(connection, version, _SUBJECT, replaces=True)
        await groups.ensure(connection, version.contract, version.contract.groups)
        outcome = "older" if registered.digest != version.digest else "applied" if registered.ahead else "in use"
        done.append(Applied("stream", version.contract.name, version.version, version.digest, outcome))
    for external, version in declared.external_groups:
        await registry.declare_group(connection, version.contract, external.group)
        await groups.ensure(connection, version.contract, (external.group,))
        name = f"{external.stream}/{external.group.name}"
        done.append(Applied("group", name, version.version, version.digest, "applied"))
    return done


def _packages(image: Image) -> Iterator[tuple[str, bytes]]:
    """Yield the proto packages that an image declares, each with its own image."""
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


def _stream_of(read: ReadContract, external: ExternalGroup, content: bytes, version: str) -> StreamVersion:
    """Return the stream that a reader subscribes to, in the version of the reader's image."""
    stream: Stream | None = next((each for each in read.contract.streams if each.name == external.stream), None)
    if stream is None:
        raise InvalidContract(
            f'{external.package} reads the stream "{external.stream}", which its image does not declare'
        )
    package = read.schema.messages[stream.message].file.package
    digest = f"sha256:{sha256(content).hexdigest()}"
    return StreamVersion(contract=stream, package=package, digest=digest, image=content, version=version)


def _version(source: str, package: str) -> str:
    """Return the version of a source's packages, from its name or its installation; empty if unknown."""
    path = Path(source)
    if path.suffix == ".whl":
        # A wheel's name consists of distribution, version and tags.
        return path.name.split("-")[1] if path.name.count("-") >= 4 else ""
    if path.exists():
        return ""
    try:
        return metadata.version(source)
    except (metadata.PackageNotFoundError, ValueError):
        return package_version(package)
