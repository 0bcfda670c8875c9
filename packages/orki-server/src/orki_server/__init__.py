"""The orki orchestrator and its commands."""
