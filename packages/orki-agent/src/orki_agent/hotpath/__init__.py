"""The hot path: typed tool calls over Unix sockets."""

from orki_agent.hotpath._bridge import ToolBridge
from orki_agent.hotpath._clients import AsyncToolClient, SyncToolClient
from orki_agent.hotpath._options import BridgeOptions, CallHook, ToolClientOptions, ToolRecord

__all__ = [
    "AsyncToolClient",
    "BridgeOptions",
    "CallHook",
    "SyncToolClient",
    "ToolBridge",
    "ToolClientOptions",
    "ToolRecord",
]
