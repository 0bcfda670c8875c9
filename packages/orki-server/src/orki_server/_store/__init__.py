"""The store: tasks, agents and contracts in Redis."""
