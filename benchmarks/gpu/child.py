"""`python -m benchmarks.gpu.child ORDER`: one step of the GPU suite. ORDER is JSON, written by runner.Processes."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

from benchmarks.gpu.device import DeviceLost
from benchmarks.gpu.session import Session


def main(text: str) -> int:
    order = json.loads(text)
    step = order["step"]
    session = Session(Path(order["out"]), order["rehearse"], order["without"], order["limit_s"])
    module, _, name = step["run"].partition(":")
    function = getattr(importlib.import_module(module), name)
    try:
        function(session, *step["arguments"])
    except DeviceLost as error:
        session.fails(str(error))
        sys.stdout.flush()
        os._exit(70)  # a broken context hangs or raises again where Python would tidy up
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
