"""The orki orchestrator, its observers and the command `orki`. `orki_server.embedded` is the only public module.

```python
from orki_control import Client
from orki_server.embedded import EmbeddedServer

with EmbeddedServer() as server:  # Valkey for development and tests
    print(server.url)  # for `orki serve --redis URL` and `orki_events.connect(URL)`

async with Client("127.0.0.1:50051") as orki:  # an orchestrator, started by `orki up` or `orki serve`
    print(await orki.list_agents())
```
"""

import os

# As in `orki_control.transport`; modules of this package import gRPC before that one.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
