"""The hot path: typed tool calls over Unix sockets."""

from orki_agent.hotpath._async_client import AsyncToolClient
from orki_agent.hotpath._bridge import ToolBridge
from orki_agent.hotpath._options import BridgeOptions, CallHook, ToolClientOptions, ToolRecord
from orki_agent.hotpath._sync_client import SyncToolClient

__all__ = [
    "AsyncToolClient",
    "BridgeOptions",
    "CallHook",
    "SyncToolClient",
    "ToolBridge",
    "ToolClientOptions",
    "ToolRecord",
]
