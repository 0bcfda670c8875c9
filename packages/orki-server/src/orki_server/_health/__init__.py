"""The health of servers and streams: one set of findings for the orchestrator, `orki doctor` and the metrics."""
