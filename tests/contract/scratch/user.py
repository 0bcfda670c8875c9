"""Uses all that was generated as a user would; what must not type-check is marked, and mypy minds unused marks."""

from __future__ import annotations

import asyncio
from typing import Any, assert_type

from acme.billing.v1 import readers_orki
from acme.ship.v1.ship_orki import (
    PARCELS,
    PackDirective,
    PackProgress,
    PackRequest,
    PackResponse,
    ParcelEvent,
    ScaleToolServiceBase,
    ScaleToolServiceClient,
    ScaleToolServiceSyncBase,
    ScaleToolServiceSyncClient,
    ShippingServiceBase,
    ShippingServiceClient,
    ShippingServiceSyncBase,
    Weight,
)

from orki.events.v1.agent_orki import AgentEvent
from orki_contract import (
    EventStream,
    SyncTaskContext,
    SyncToolChannel,
    Task,
    TaskChannel,
    TaskContext,
    TaskHandle,
    Tool,
    ToolCall,
    ToolChannel,
)


class Shipping(ShippingServiceBase):
    """Handlers that are coroutines."""

    async def pack(self, request: PackRequest, ctx: TaskContext[PackProgress, PackDirective]) -> PackResponse:
        scale = ctx.tools(ScaleToolServiceClient)
        weight = await scale.put(request)
        assert_type(weight, Weight)
        await ctx.progress(PackProgress(fraction=0.5))
        await ctx.progress(PackRequest())  # type: ignore[arg-type]
        await ctx.publish(PARCELS, ParcelEvent(order=request.order))
        await ctx.publish(PARCELS, PackRequest())  # type: ignore[misc]
        async for directive in ctx.directives():
            assert_type(directive, PackDirective)
        return PackResponse(boxes=weight.grams)

    async def weigh(self, request: PackRequest, ctx: TaskContext[None]) -> PackResponse:
        return PackResponse(boxes=1)


class BlockingShipping(ShippingServiceSyncBase):
    """Handlers that block."""

    def pack(self, request: PackRequest, ctx: SyncTaskContext[PackProgress, PackDirective]) -> PackResponse:
        weight = ctx.tools(ScaleToolServiceSyncClient).put(request, timeout=0.1)
        return PackResponse(boxes=weight.grams)

    def weigh(self, request: PackRequest, ctx: SyncTaskContext[None, None]) -> PackRequest:  # type: ignore[override]
        return request


class Scale(ScaleToolServiceBase):
    """Tools that are coroutines."""

    async def put(self, request: PackRequest, call: ToolCall) -> Weight:
        return Weight(grams=len(request.order), scale="one")


class BlockingScale(ScaleToolServiceSyncBase):
    """Tools that block."""

    def put(self, request: PackRequest, call: ToolCall) -> Weight:
        return Weight(grams="heavy")  # type: ignore[arg-type]


class Unfinished(ShippingServiceBase):
    """Forgets a method."""


def unfinished() -> None:
    """Cannot be made."""
    Unfinished()  # type: ignore[abstract]


async def submit(channel: TaskChannel) -> None:
    """Submits in every way."""
    shipping = ShippingServiceClient(channel)
    assert_type(await shipping.pack(PackRequest(order="a"), timeout=5), PackResponse)
    handle = await shipping.pack.submit(PackRequest(order="a"), idempotency_key="a")
    assert_type(handle, TaskHandle[PackResponse, PackProgress, PackDirective])
    await handle.direct(PackDirective(most_boxes=2))
    await shipping.pack(PackResponse())  # type: ignore[arg-type]


async def call(channel: ToolChannel, blocking: SyncToolChannel) -> None:
    """Calls tools in both ways."""
    task = asyncio.create_task(ScaleToolServiceClient(channel).put(PackRequest()))
    assert_type(await task, Weight)
    assert_type(ScaleToolServiceSyncClient(blocking).put(PackRequest()), Weight)


class Channel:
    """A channel of tools that answers by itself."""

    async def call(self, tool: Tool[Any, Any], request: Any, *, timeout: float | None = None) -> Any:
        return Weight.decode(Weight(grams=tool.contract.opcode, scale="own").encode(), 8)


def main() -> None:
    """What can be tried without a fleet."""
    event = AgentEvent(agent_id="a", region="north")
    assert AgentEvent.FromString(event.SerializeToString()).region == "north"
    groups = [group.name for group in PARCELS.contract.groups]
    assert groups == ["audit", "couriers", "labels"]
    assert [group.name for group in readers_orki.PARCELS.contract.groups] == ["billing"]
    assert readers_orki.PARCELS.message is PARCELS.message
    tasks: tuple[Task[Any, Any, Any, Any], ...] = Shipping().TASKS
    assert [task.contract.full_name for task in tasks] == [
        "acme.ship.v1.ShippingService/Pack",
        "acme.ship.v1.ShippingService/Weigh",
    ]
    weight = asyncio.run(ScaleToolServiceClient(Channel()).put(PackRequest()))
    assert weight == Weight(grams=0x3001, scale="own")
    assert Weight(7, "x").encode() == b"\x07\0\0\0\0\0\0\0x"
    print("used")


def wrong_group() -> EventStream[ParcelEvent, str]:
    """A stream of one message is no stream of another."""
    stream: EventStream[PackRequest, Any] = PARCELS  # type: ignore[assignment]
    return stream  # type: ignore[return-value]


if __name__ == "__main__":
    main()
