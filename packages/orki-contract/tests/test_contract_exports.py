"""The public names of orki-contract, and what importing it loads."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from orki.errors.v1.errors_pb2 import Reason
from orki_contract import errors

EXPORTS = {
    "orki_contract": (
        "AUDIT_GROUP AsyncTaskService AsyncToolService Backoff Budget BudgetLeft Contract Durability EventStream "
        "ExternalGroup "
        "Frame FrameBase FrameField FrameType Group Overflow Payload ProgressGap ProgressPolicy "
        "Retention Scalar SensitiveField Start Stream SubmitSettings "
        "SyncTaskContext SyncTaskService SyncToolChannel SyncToolService SyncToolStub Task TaskChannel "
        "TaskContext TaskHandle TaskMethod TaskStub Tool ToolCall ToolChannel ToolMethod ToolStub at frame "
        "tail"
    ),
    "orki_contract.backoff": "Jitter JitterOptions",
    "orki_contract.descriptors": (
        "Location MessageNode MethodNode OPTIONS_PACKAGE Path Schema ServiceNode field_path is_repeated reachable"
        " without_source"
    ),
    "orki_contract.findings": (
        "Bump CATEGORIES Category Finding Fit Plane RULES Rule findings required_bump service_fit stream_fit"
    ),
    "orki_contract.images": (
        "IMAGE_NAME Image image_of images_in message_class package_images package_version "
        "service_digest source_folder stream_digest"
    ),
    "orki_contract.masking": "MASK is_sensitive mask masked_trace",
    "orki_contract.model": (
        "AUDIT_GROUP Backoff Budget BudgetLeft Contract DURATIONS Durability ExternalGroup Frame FrameField Group "
        "Overflow ProgressPolicy Retention "
        "Scalar SensitiveField Start Stream TASK_MESSAGES TaskMethod ToolMethod dump duration_text milliseconds to_json"
    ),
    "orki_contract.naming": "class_name constant_name frame_class module_path reference snake_name unused",
    "orki_contract.printing": "print_line",
    "orki_contract.read": (
        "FileContract PROGRESS_POLICIES ReadContract merged read_image read_schema resolve seconds_of"
    ),
    "orki_contract.trace": "Span SpanSource current_span defer_span new_span parse_traceparent use_span",
    "orki_contract.transitions": "Transitions",
    "orki_contract.validate": "OWNER_RULES Owners RULES Violation check validate",
    "orki_contract.versions": "ContractVersion checked_out commit_of version_at",
}


@pytest.mark.parametrize("module", sorted(EXPORTS))
def test_a_module_exports_exactly_these_names(module: str) -> None:
    imported = importlib.import_module(module)
    assert sorted(imported.__all__) == EXPORTS[module].split()
    assert all(hasattr(imported, name) for name in imported.__all__)


def test_errors_exports_one_class_for_each_reason() -> None:
    others = {"OrkiError", "Reason", "Status", "error_for", "status_of"}
    classes = [getattr(errors, name) for name in errors.__all__ if name not in others]
    assert others < set(errors.__all__)
    assert sorted(each.reason for each in classes) == sorted(set(Reason.values()) - {Reason.REASON_UNSPECIFIED})


def test_the_public_modules_are_declared_and_all_others_have_an_underscore() -> None:
    root = Path(__file__).parents[1]
    declared = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["orki"]["api"]
    plain = {
        f"orki_contract.{path.stem}"
        for path in (root / "src/orki_contract").iterdir()
        if not path.stem.startswith("_") and path.suffix == ".py"
    }
    assert set(declared) == {"orki_contract", *plain} == {*EXPORTS, "orki_contract.errors"}


def test_importing_the_package_loads_no_tools() -> None:
    program = "import sys, orki_contract; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(ran.stdout.split())
    assert "orki_contract" in loaded
    tools = ("findings", "validate", "descriptors", "read", "images", "versions", "__main__", "_findings", "_rules")
    unwanted = {f"orki_contract.{name}" for name in tools} | {"argparse", "asyncio", "grpc", "redis", "zipfile"}
    assert not unwanted & loaded
