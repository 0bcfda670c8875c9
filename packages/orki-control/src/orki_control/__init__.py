"""The control plane: its contract, the session machine, and the client for whoever submits tasks."""

from orki_contract.backoff import JitterOptions
from orki_control.client import Client, ClientOptions
from orki_control.handle import SubmittedTask

__all__ = ["Client", "ClientOptions", "JitterOptions", "SubmittedTask"]
