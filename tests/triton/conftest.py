"""These tests run Triton's interpreter, which has to be chosen before Triton is imported: run this folder alone.

`pytest tests/triton` sets TRITON_INTERPRET=1 itself. In a run of all tests Triton is there already, and the folder
is left out, which the header says.
"""

import os
import sys

if "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")
interpreted = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if interpreted else ["test_*.py"]


def pytest_report_header(config):
    return None if interpreted else "tests/triton: left out, run `pytest tests/triton` by itself"
