"""The task services of an agent: their handlers, their contracts, and what a handler needs of the agent."""

from __future__ import annotations

import functools
import inspect
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

from google.protobuf.message import Message

from orki.control.v1.attempt_pb2 import Budget, BudgetBalance
from orki.control.v1.session_pb2 import ServedService
from orki_agent._settings import ToolsAt
from orki_contract import (
    AsyncTaskService,
    EventStream,
    SyncTaskService,
    SyncToolChannel,
    Task,
    TaskChannel,
    ToolChannel,
)
from orki_contract.errors import InvalidContract, InvalidSetting, OrkiError
from orki_contract.trace import Span
from orki_control.session import AttemptKey

E = TypeVar("E", bound=Message)


class Subprocess:
    """A service whose blocking handlers run in child processes.

    A cancelled handler that does not end within its grace is killed with the programs that it has started, even if
    native code holds the interpreter lock. A crash ends only its attempt. Each of the agent's slots may have a child,
    which runs one attempt at a time and is used again.

    ```python
    agent = Agent("cruncher", Subprocess(Cruncher()), slots=4)
    ```

    Attributes:
        service: The service.
        pickled: The service, pickled for the children.
    """

    def __init__(self, service: SyncTaskService) -> None:
        """Wrap a service.

        Args:
            service: An instance of a class derived from a generated sync base. Each child gets a copy by `pickle`, so
                a child imports the module of its class.

        Raises:
            InvalidSetting: It is not such an instance, or it cannot be pickled.
        """
        given: object = service  # Callers without a type checker may pass anything.
        if not isinstance(given, SyncTaskService):
            raise InvalidSetting(f"Subprocess({service!r}): give an instance of a class derived from a sync base")
        self.service = service
        try:
            self.pickled = pickle.dumps(service)
        except Exception as error:
            place = place_of(type(service))
            raise InvalidSetting(f"{place}: {type(service).__qualname__} cannot be pickled: {error}") from error

    def __repr__(self) -> str:
        return f"Subprocess({type(self.service).__qualname__})"


TaskServices: TypeAlias = AsyncTaskService | SyncTaskService | Subprocess
OnStored: TypeAlias = Callable[[OrkiError | None], None]
"""Receives None when a checkpoint is stored, else why it is not. Called on the I/O thread."""


@dataclass(frozen=True, slots=True)
class Handler:
    """A method and its handler.

    Attributes:
        task: The method.
        name: Full name of the method, `package.Service/Method`.
        call: The bound handler.
        is_async: Whether the handler is a coroutine function. A blocking handler runs in a thread.
        subprocess: The service whose child processes run the handler; None if it runs in this process.
    """

    task: Task[Any, Any, Any, Any]
    name: str
    call: Callable[[Any, Any], Any]
    is_async: bool
    subprocess: Subprocess | None = None


class Offered(NamedTuple):
    """The input of a handler.

    Attributes:
        attempt: The attempt.
        request: The serialised request.
        span: The attempt's span.
        checkpoint: The task's last checkpoint, serialised; None without one.
        answer: The answer to the task's last suspension, serialised; None without one.
        answer_overdue: Whether that suspension ended without an answer.
        budgets: The budgets that the task is charged to.
    """

    attempt: AttemptKey
    request: bytes
    span: Span
    checkpoint: bytes | None = None
    answer: bytes | None = None
    answer_overdue: bool = False
    budgets: tuple[BudgetBalance, ...] = ()


class AgentServices(Protocol):
    """The agent as the contexts of its handlers see it, so that a handler can also run without an agent.

    Every method may be called from any thread. None blocks unless its docstring says so.
    """

    @property
    def agent_id(self) -> str:
        """The agent's name in the fleet."""
        ...

    @property
    def max_payload_bytes(self) -> int:
        """Maximum payload size that the orchestrator accepts."""
        ...

    def send_progress(self, attempt: AttemptKey, payload: bytes) -> None:
        """Queue progress; the attempt's credit returns when it is sent."""

    def report_usage(self, attempt: AttemptKey, total: Budget) -> None:
        """Report the usage of an attempt in all."""

    def save_checkpoint(self, attempt: AttemptKey, payload: bytes, on_stored: OnStored) -> None:
        """Send a checkpoint; `on_stored` is called on another thread."""

    def store_checkpoint(self, attempt: AttemptKey, payload: bytes) -> None:
        """Send a checkpoint, and block the calling thread until it is stored. Raises why it is not."""

    def collect(self, stream: EventStream[E, Any], event: E, span: Span) -> None:
        """Publish soon. Failures are counted and logged."""

    async def publish(self, stream: EventStream[E, Any], event: E, span: Span) -> None:
        """Publish and return once the server has the event. For the user's loop."""

    def publish_blocking(self, stream: EventStream[E, Any], event: E, span: Span) -> None:
        """Publish, and block the calling thread until the server has the event."""

    def tools_at(self) -> ToolsAt:
        """Return the tool bridge.

        Raises:
            InvalidSetting: The agent has no tools.
        """
        ...

    def tool_channel(self) -> ToolChannel:
        """Return the channel for async tool calls from the user's loop."""
        ...

    def sync_tool_channel(self) -> SyncToolChannel:
        """Return the channel for blocking tool calls."""
        ...

    def task_channel(self) -> TaskChannel:
        """Return the channel for submitting tasks from the user's loop."""
        ...


def find_handlers(services: tuple[TaskServices, ...]) -> Mapping[str, Handler]:
    """Return the handlers of all services by `package.Service/Method`.

    Raises:
        InvalidSetting: There is no service, an object is not a service, two services have the same contract, or a
            method is no handler of its base.
    """
    if not services:
        raise InvalidSetting("an agent needs at least one task service, an instance derived from a generated base")
    handlers: dict[str, Handler] = {}
    for service in services:
        subprocess, service = (service, service.service) if isinstance(service, Subprocess) else (None, service)
        given: object = service  # Callers without a type checker may pass anything.
        if not isinstance(given, AsyncTaskService | SyncTaskService) or not given.TASKS:
            hint = " (give an instance, not the class)" if isinstance(given, type) else ""
            raise InvalidSetting(f"{service!r} is not a task service: derive it from a generated base{hint}")
        for task in service.TASKS:
            name = task.contract.full_name
            if name in handlers:
                raise InvalidSetting(f"two services handle {name}: give an agent one instance for each contract")
            handlers[name] = _handler(service, task, subprocess)
    return handlers


def place_of(call: object) -> str:
    """Return `file:line` of a function or class, also behind decorators; its name where that is unknown."""
    found: Any = inspect.unwrap(call) if callable(call) else call
    while isinstance(found, functools.partial):
        found = found.func
    code = getattr(found, "__code__", None)
    if code is not None:
        return f"{code.co_filename}:{code.co_firstlineno}"
    kind = found if isinstance(found, type) else type(found)
    try:
        return f"{inspect.getsourcefile(kind)}:{inspect.getsourcelines(kind)[1]}"
    except (TypeError, OSError):
        return f"{kind.__module__}.{kind.__qualname__}"


def _handler(
    service: AsyncTaskService | SyncTaskService, task: Task[Any, Any, Any, Any], subprocess: Subprocess | None
) -> Handler:
    """Return the handler of a method.

    Raises:
        InvalidSetting: The service has none, or none that can be called with a request and a context.
    """
    name = task.contract.full_name
    call = getattr(service, task.attribute, None)
    is_async = isinstance(service, AsyncTaskService)
    fault = _fault(call, is_async)
    if fault:
        place = place_of(call if callable(call) else type(service))
        raise InvalidSetting(f"{place}: {type(service).__qualname__}.{task.attribute}, the handler of {name}, {fault}")
    assert callable(call)
    return Handler(task, name, call, is_async, subprocess)


def _fault(call: object, is_async: bool) -> str:
    """Return why a handler cannot be run; empty if it can."""
    if not callable(call):
        return "is missing" if call is None else f"is a {type(call).__name__}, not a method"
    # A decorator that keeps `__wrapped__` passes on what the function inside returns.
    outer, inner = _function(call), _function(inspect.unwrap(call))
    if inspect.isgeneratorfunction(outer) or inspect.isasyncgenfunction(outer):
        return "is a generator: return the response, and send progress with ctx.progress()"
    if is_async and not (inspect.iscoroutinefunction(outer) or inspect.iscoroutinefunction(inner)):
        return "is not a coroutine function: write `async def`, or derive the service from its sync base"
    if not is_async and inspect.iscoroutinefunction(outer):
        return "is a coroutine function in a sync base: write `def`, or derive the service from its async base"
    try:
        signature = inspect.signature(call)
    except ValueError:
        return ""  # Compiled functions may have no signature.
    try:
        signature.bind(None, None)
    except TypeError:
        return f"cannot be called with a request and a context: its parameters are {signature}"
    return ""


def _function(call: Any) -> Any:
    """Return the function that runs when an object is called."""
    if isinstance(call, functools.partial):
        return _function(call.func)
    return call if inspect.isroutine(call) else type(call).__call__


def served_services(handlers: Mapping[str, Handler]) -> tuple[ServedService, ...]:
    """Return the contracts of the handlers' services for the hello, sorted by name.

    Raises:
        InvalidContract: The package of generated code carries no image.
    """
    from orki_contract.images import image_of, package_version, service_digest

    served = []
    for service in sorted({handler.task.contract.service for handler in handlers.values()}):
        package, _, _ = service.rpartition(".")
        if not package:
            raise InvalidContract(f"service {service} has no proto package: give its file one")
        image = image_of(package)
        digest = service_digest(image, service)
        served.append(ServedService(service=service, digest=digest, image=image, version=package_version(package)))
    return tuple(served)
