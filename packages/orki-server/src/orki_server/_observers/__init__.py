"""Readers of the event plane that people run: metrics, audit and feed, each a process of its own."""
