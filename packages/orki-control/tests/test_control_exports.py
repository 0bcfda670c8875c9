"""The public names of `orki_control`."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys

import pytest

import orki_control

PUBLIC = {
    "orki_control": [
        "CURRENT_ATTEMPT",
        "Client",
        "ClientOptions",
        "Credentials",
        "JitterOptions",
        "SubmittedTask",
        "error_of",
    ],
    "orki_control.credentials": ["VARIABLES", "Credentials", "Metadata", "TokenChannel", "read_pem", "read_secret"],
    "orki_control.session": [
        *(
            "AGENT",
            "AGENT_ID",
            "ATTEMPT",
            "DEFAULT_MESSAGE_BYTES",
            "DEFAULT_PROGRESS_BYTES",
            "KEY",
            "MAX_CHECKPOINT_BYTES",
            "MAX_SLOTS",
            "ORCHESTRATOR",
        ),
        *("AgentDraining", "AgentEvent", "AgentSession", "AgentSessionOptions", "AgentState"),
        *("ArrivedBudgets", "ArrivedCancel", "ArrivedCheckpoint", "ArrivedDirective", "ArrivedOffer"),
        *("ArrivedProgress", "ArrivedResult", "ArrivedUsage"),
        *(
            "AttemptKey",
            "AttemptState",
            "AttemptsRevoked",
            "BatchBounds",
            "BudgetsChanged",
            "CancelsAcknowledged",
            "CancelsArrived",
        ),
        *(
            "CheckpointsArrived",
            "CheckpointsStored",
            "Decline",
            "DirectiveAnswer",
            "DirectivesAcknowledged",
            "DirectivesArrived",
            "DrainCompleted",
            "HeartbeatArrived",
            "HelloArrived",
            "LeasesLost",
        ),
        *("OffersAccepted", "OffersArrived", "OffersDeclined", "OffersExpired", "OrchestratorDraining"),
        *("OrchestratorEvent", "OrchestratorSession", "OrchestratorSessionOptions", "OrchestratorState", "Outcome"),
        *(
            "ProgressAcknowledged",
            "ProgressArrived",
            "ReportsRefused",
            "ResultsAcknowledged",
            "ResultsArrived",
            "Revocation",
        ),
        *(
            "SessionClosed",
            "SessionEnded",
            "SessionLost",
            "SessionOpened",
            "StoredCheckpoint",
            "UsageArrived",
            "bad_labels",
        ),
    ],
    "orki_control.submitter": [
        *("CLIENT", "REQUEST", "SERVING", "Answered", "CancelArrived", "ClientEvent", "ClientSession"),
        *("ClientSessionOptions", "ClientState", "CreditArrived", "DirectiveArrived", "Failed"),
        *("OrchestratorDraining", "Request", "RequestState", "ServingEvent", "ServingOptions", "ServingSession"),
        *("ServingState", "SessionEnded", "SessionLost", "SessionOpened", "SubmissionsArrived", "Updated"),
        *("WatchArrived", "WatchClosed"),
    ],
    "orki_control.transport": [
        *("MESSAGE_CHARACTERS", "REASON_KEY", "Addresses", "ChannelOptions", "LaterCall", "Peer", "abort"),
        *(
            "channel_options",
            "check_target",
            "check_targets",
            "error_from",
            "is_loopback",
            "open_channel",
            "server_options",
            "typed_error",
        ),
    ],
}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_module_exports_exactly_these_names(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__all__ == PUBLIC[name]
    assert [each for each in module.__all__ if not hasattr(module, each)] == []


def test_every_other_module_is_internal() -> None:
    found = {each.name for each in pkgutil.walk_packages(orki_control.__path__, "orki_control.")}
    public = {name for name in found if not any(part.startswith("_") for part in name.split("."))}
    assert public == set(PUBLIC) - {"orki_control"}


@pytest.mark.parametrize("name", PUBLIC)
def test_importing_a_public_module_stays_cheap(name: str) -> None:
    script = (
        f"import json, sys; before = set(sys.modules); import {name}; print(json.dumps([*set(sys.modules) - before]))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded: list[str] = json.loads(run.stdout)
    packages = {each.partition(".")[0] for each in loaded}
    assert packages.isdisjoint({"click", "grpc", "opentelemetry", "redis", "rich"})
    assert len(loaded) < 230
