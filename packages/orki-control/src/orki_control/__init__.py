"""orki's control plane: submit tasks to an orchestrator, follow them, cancel them.

A generated client takes a `Client` and gives each task method as a callable:

```python
from orki_control import Client
from greenhouse.v1.watering_orki import WaterBedRequest, WateringServiceClient

async with Client("127.0.0.1:50051") as orki:
    watering = WateringServiceClient(orki)
    response = await watering.water_bed(WaterBedRequest(bed="north"))
    task = await watering.water_bed.submit(WaterBedRequest(bed="south"), idempotency_key="south-monday")
    async for delta in task.progress():
        print(delta)
    response = await task.result(timeout=60)
```

`orki_control.session` holds the session as two state machines without I/O. `orki_control.transport` holds the gRPC
settings and the mapping of errors that both ends share.
"""

from orki_contract.backoff import JitterOptions
from orki_control._client import Client, ClientOptions
from orki_control._task_handle import SubmittedTask, error_of

__all__ = ["Client", "ClientOptions", "JitterOptions", "SubmittedTask", "error_of"]
