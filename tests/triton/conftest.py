"""These tests run Triton's interpreter, which has to be chosen before Triton is imported: run this folder alone.

`pytest tests/triton` sets TRITON_INTERPRET=1 itself. In a run of all tests Triton is there already, and the folder
is left out, which the header says.
"""

import importlib.util
import os
import sys

if "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")
interpreted = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if interpreted else ["test_*.py"]


def pytest_configure(config):
    if interpreted and importlib.util.find_spec("triton"):
        import row_by_row

        row_by_row.install()


def pytest_report_header(config):
    return None if interpreted else "tests/triton: left out, run `pytest tests/triton` by itself"


def pytest_collection_modifyitems(config, items):
    """Of the shared tests those on Triton; the cases of many rows and of many words, slow here, not in every way."""
    long = {
        "tiles-of-N": {("torch.bfloat16", "fast"), ("torch.float16", None)},
        "tiles-of-V": {("torch.float16", "fast"), ("torch.bfloat16", "low"), ("torch.float32", None)},
    }

    def wanted(item):
        if item.path.name != "test_shared_triton.py":
            return True
        given = item.callspec.params if hasattr(item, "callspec") else {}
        ways = long.get(str(given.get("case")))
        return given.get("backend") == "triton" and (
            ways is None or (str(given["dtype"]), given.get("memory")) in ways
        )

    left_out = [item for item in items if not wanted(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if wanted(item)]
