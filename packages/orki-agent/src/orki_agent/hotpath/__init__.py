"""The hot path: typed tool calls over Unix sockets."""

from orki_agent.hotpath.bridge import ToolBridge
from orki_agent.hotpath.client_async import AsyncToolClient
from orki_agent.hotpath.client_sync import SyncToolClient
from orki_agent.hotpath.options import BridgeOptions, ToolClientOptions
from orki_agent.hotpath.records import CallHook, ToolRecord

__all__ = [
    "AsyncToolClient",
    "BridgeOptions",
    "CallHook",
    "SyncToolClient",
    "ToolBridge",
    "ToolClientOptions",
    "ToolRecord",
]
