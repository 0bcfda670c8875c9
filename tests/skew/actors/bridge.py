"""Serves the probe's tools until its input ends."""

from __future__ import annotations

import sys
from typing import Any

from garden.v1 import garden_orki, garden_pb2
from values import known, report

from orki_agent.hotpath import ToolBridge


class Probe(garden_orki.ProbeToolServiceSyncBase):
    """Copies the requests into its replies."""

    def measure(self, request: Any, call: Any) -> Any:
        reply = {"fraction": request.times / 1_024, "depth": request.depth, "probe": request.probe}
        if hasattr(request, "temperature"):
            # A field behind the received block is None, because the caller does not know it.
            reply["correction"] = -1.0 if request.temperature is None else float(request.temperature)
        return garden_orki.MeasureResponse(**reply)

    def describe(self, request: Any, call: Any) -> Any:
        language = getattr(request, "language", "unknown here")
        fields = {"words": f"{request.probe} in {language!r}", "built": -7, "maker": "orki"}
        return garden_pb2.DescribeResponse(**known(garden_pb2.DescribeResponse, fields))

    def calibrate(self, request: Any, call: Any) -> Any:
        return garden_pb2.DescribeResponse(words=f"calibrated {request.probe}")


def main() -> None:
    with ToolBridge(Probe()) as bridge:
        report(ready={"path": bridge.path, "token": bridge.token.hex()})
        sys.stdin.read()
    report(done=True)


if __name__ == "__main__":
    main()
