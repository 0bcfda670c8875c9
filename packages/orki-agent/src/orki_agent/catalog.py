"""What an agent serves: its handlers by method, and the contracts that its hello brings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from orki.control.v1.session_pb2 import ServedService
from orki_contract import AsyncTaskService, SyncTaskService, Task
from orki_contract.errors import InvalidContract, InvalidSetting
from orki_contract.images import image_of, package_version, service_digest

__all__ = ["Handler", "TaskServices", "find_handlers", "served_services"]

TaskServices = AsyncTaskService | SyncTaskService


@dataclass(frozen=True, slots=True)
class Handler:
    """One method and what handles it.

    Attributes:
        task: The method.
        call: The bound handler.
        is_async: Whether it is a coroutine function, for the event loop; else it blocks, in a thread.
    """

    task: Task[Any, Any, Any, Any]
    call: Callable[[Any, Any], Any]
    is_async: bool


def find_handlers(services: tuple[TaskServices, ...]) -> Mapping[str, Handler]:
    """The handlers of all services by `package.Service/Method`.

    Raises:
        InvalidSetting: No service, something that is none, or two of one contract.
    """
    if not services:
        raise InvalidSetting("an agent needs at least one task service, an instance derived from a generated base")
    handlers: dict[str, Handler] = {}
    for service in services:
        given: object = service  # whatever the type checker was told
        if not isinstance(given, AsyncTaskService | SyncTaskService) or not given.TASKS:
            hint = " (give an instance, not the class)" if isinstance(given, type) else ""
            raise InvalidSetting(f"{service!r} is no task service: derive it from a generated base{hint}")
        for task in service.TASKS:
            name = task.contract.full_name
            if name in handlers:
                raise InvalidSetting(f"two services handle {name}: give an agent one instance for each contract")
            handlers[name] = Handler(task, getattr(service, task.attribute), isinstance(service, AsyncTaskService))
    return handlers


def served_services(handlers: Mapping[str, Handler]) -> tuple[ServedService, ...]:
    """The contracts of the handlers' services, as the hello brings them, by name.

    Raises:
        InvalidContract: The package of generated code carries no image.
    """
    served = []
    for service in sorted({handler.task.contract.service for handler in handlers.values()}):
        package, _, _ = service.rpartition(".")
        if not package:
            raise InvalidContract(f"service {service} is in no proto package: give its file one")
        image = image_of(package)
        digest = service_digest(image, service)
        served.append(ServedService(service=service, digest=digest, image=image, version=package_version(package)))
    return tuple(served)
