"""The contract model, and the classes that generated code and runtimes share. Depends only on protobuf.

Generated modules declare streams, tasks, tools and frames with these classes. `read_image` reads the same model from an
image:

```python
from orki_contract.images import image_of
from orki_contract.read import read_image

contract = read_image(image_of("orki.events.v1")).contract
for stream in contract.streams:
    print(stream.name, stream.retention.max_entries, [group.name for group in stream.groups])
```

`orki_contract.findings` compares two versions of a contract, and `orki_contract.errors` defines the errors of all orki
packages.
"""

from orki_contract._channels import (
    AsyncTaskService,
    AsyncToolService,
    ProgressGap,
    SyncTaskContext,
    SyncTaskService,
    SyncToolChannel,
    SyncToolService,
    SyncToolStub,
    TaskChannel,
    TaskContext,
    TaskHandle,
    TaskStub,
    ToolCall,
    ToolChannel,
    ToolStub,
)
from orki_contract._frames import FrameBase, at, frame, tail
from orki_contract._handles import EventStream, FrameType, Payload, SubmitSettings, Task, Tool
from orki_contract.model import (
    AUDIT_GROUP,
    Backoff,
    Budget,
    BudgetLeft,
    Contract,
    Durability,
    ExternalGroup,
    Frame,
    FrameField,
    Group,
    Overflow,
    ProgressPolicy,
    Retention,
    Scalar,
    SensitiveField,
    Start,
    Stream,
    TaskMethod,
    ToolMethod,
)

__all__ = [
    "AUDIT_GROUP",
    "AsyncTaskService",
    "AsyncToolService",
    "Backoff",
    "Budget",
    "BudgetLeft",
    "Contract",
    "Durability",
    "EventStream",
    "ExternalGroup",
    "Frame",
    "FrameBase",
    "FrameField",
    "FrameType",
    "Group",
    "Overflow",
    "Payload",
    "ProgressGap",
    "ProgressPolicy",
    "Retention",
    "Scalar",
    "SensitiveField",
    "Start",
    "Stream",
    "SubmitSettings",
    "SyncTaskContext",
    "SyncTaskService",
    "SyncToolChannel",
    "SyncToolService",
    "SyncToolStub",
    "Task",
    "TaskChannel",
    "TaskContext",
    "TaskHandle",
    "TaskMethod",
    "TaskStub",
    "Tool",
    "ToolCall",
    "ToolChannel",
    "ToolMethod",
    "ToolStub",
    "at",
    "frame",
    "tail",
]
