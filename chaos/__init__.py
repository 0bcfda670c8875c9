"""Fault injection against real processes: a rig, a TCP fault proxy, seeded schedules and an independent checker."""
