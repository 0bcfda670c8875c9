"""The runtime of an orki agent: the session with its orchestrator, task handlers, and tools over the hot path."""

from orki_agent.agent import Agent
from orki_agent.settings import RunSettings, ToolsAt

__all__ = ["Agent", "RunSettings", "ToolsAt"]
