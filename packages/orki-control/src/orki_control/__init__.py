"""orki's control plane: submit tasks to an orchestrator, follow their progress, and get their results.

```python
from greenhouse.v1.watering_orki import WaterBedRequest, WateringServiceClient
from orki_control import Client

async with Client("127.0.0.1:50051") as orki:
    watering = WateringServiceClient(orki)
    response = await watering.water_bed(WaterBedRequest(bed="north"))
    task = await watering.water_bed.submit(WaterBedRequest(bed="south"), idempotency_key="south-monday")
    async for delta in task.progress():
        print(delta)
    response = await task.result(timeout=60)
```

`orki_control.session` contains the state machines of both ends of a session, without I/O. `orki_control.transport`
contains the gRPC settings and the error mapping that all processes share.
"""

from orki_contract.backoff import JitterOptions
from orki_control._client import Client
from orki_control._options import ClientOptions
from orki_control._submissions import CURRENT_ATTEMPT
from orki_control._task_handle import SubmittedTask, error_of
from orki_control.credentials import Credentials

__all__ = ["CURRENT_ATTEMPT", "Client", "ClientOptions", "Credentials", "JitterOptions", "SubmittedTask", "error_of"]
