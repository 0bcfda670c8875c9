"""Readers of the event plane that run as processes of their own: metrics, audit and feed."""
