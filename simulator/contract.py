"""The contract of the simulated fleet. Its timeouts are short, so that a run covers many of them."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from orki.control.v1.session_pb2 import ServedService
from orki_contract import Task
from orki_contract.images import image_of, service_digest
from orki_contract.model import Backoff

PACKAGE: Final = "simulator.v1"
SERVICE: Final = f"{PACKAGE}.WorkService"
_MESSAGES: Final = {
    "WorkRequest": (("plan", 9),),
    "WorkResponse": (("attempt", 13), ("fence", 4), ("lines", 13)),
    "WorkProgress": (("number", 13),),
    "WorkDirective": (("text", 9),),
}
_SECONDS: Final = {"heartbeat_timeout": 3, "attempt_timeout": 20, "cancel_grace": 1}


@cache
def contract() -> SimpleNamespace:
    """Return the contract: `task`, the message classes by name, and `served` for an agent's hello."""
    own = descriptor_pb2.FileDescriptorSet.FromString(image_of("orki.events.v1"))
    needed = [each for each in own.file if each.name.startswith(("google/protobuf/", "orki/options/"))]
    pool = descriptor_pool.DescriptorPool()
    for each in needed:
        pool.Add(each)
    options = message_factory.GetMessageClass(pool.FindMessageTypeByName("google.protobuf.MethodOptions"))()
    extension: Any = pool.FindExtensionByName("orki.options.v1.task")
    task: Any = options.Extensions[extension]
    task.progress, task.directive, task.max_attempts = "WorkProgress", "WorkDirective", 3
    for name, seconds in _SECONDS.items():
        getattr(task, name).seconds = seconds
    task.retry_backoff.initial.nanos = 100_000_000
    file = descriptor_pb2.FileDescriptorProto(
        name="simulator/v1/work.proto", package=PACKAGE, syntax="proto3", dependency=["orki/options/v1/options.proto"]
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(fields, 1):
            message.field.add(name=field, number=number, type=kind, label=1)
    method = file.service.add(name="WorkService").method.add(
        name="Work", input_type=f".{PACKAGE}.WorkRequest", output_type=f".{PACKAGE}.WorkResponse"
    )
    method.options.ParseFromString(options.SerializeToString())
    image = descriptor_pb2.FileDescriptorSet(file=[*needed, file]).SerializeToString(deterministic=True)
    pool.Add(file)
    classes = {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in _MESSAGES
    }
    handle = Task.declare(
        f"{SERVICE}/Work",
        request=classes["WorkRequest"],
        response=classes["WorkResponse"],
        progress=classes["WorkProgress"],
        directive=classes["WorkDirective"],
        max_attempts=3,
        backoff=Backoff(initial=0.1),
        heartbeat_timeout=3.0,
        attempt_timeout=20.0,
        cancel_grace=1.0,
    )
    served = ServedService(service=SERVICE, digest=service_digest(image, SERVICE), image=image, version="1.0.0")
    return SimpleNamespace(task=handle, served=served, **classes)
