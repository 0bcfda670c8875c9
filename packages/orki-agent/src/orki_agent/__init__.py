"""orki's agent runtime: write handlers of tasks, and run them as an agent.

```python
from greenhouse.v1.watering_orki import WaterBedRequest, WaterBedResponse, WateringServiceBase
from orki_agent import Agent, TaskContext

class Gardener(WateringServiceBase):
    async def water_bed(self, request: WaterBedRequest, ctx: TaskContext[None]) -> WaterBedResponse:
        return WaterBedResponse(millilitres=250)

agent = Agent("gardener", Gardener(), slots=4)
```

`orki-agent run gardener:agent` connects to the orchestrator and runs the handlers. The runtime renews leases, delivers
cancels and publishes events about the agent. `orki_agent.testing` runs one handler in a test. `orki_agent.hotpath`
contains the tool bridge and its clients.
"""

from orki_agent._agent import Agent
from orki_agent._budget import BudgetUsedUp
from orki_agent._services import Subprocess
from orki_agent._settings import RunSettings, ToolsAt
from orki_contract import SyncTaskContext, TaskChannel, TaskContext, TaskHandle, ToolCall
from orki_contract.errors import Cancelled, HandlerFailed, HandlerRejected, OrkiError, ToolFailed

__all__ = [
    "Agent",
    "BudgetUsedUp",
    "Cancelled",
    "HandlerFailed",
    "HandlerRejected",
    "OrkiError",
    "RunSettings",
    "Subprocess",
    "SyncTaskContext",
    "TaskChannel",
    "TaskContext",
    "TaskHandle",
    "ToolCall",
    "ToolFailed",
    "ToolsAt",
]
