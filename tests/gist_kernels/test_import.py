"""What importing gist_kernels costs."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys, torch
before = set(sys.modules)
import gist_kernels
added = {name for name in set(sys.modules) - before if not name.startswith("gist_kernels")}
print(len(added), "torch._dynamo" in sys.modules, *sorted(added))
"""


def test_imports_hardly_any_module_of_others_and_no_compiler():
    printed = subprocess.check_output([sys.executable, "-c", SCRIPT], text=True).split()
    assert int(printed[0]) <= 5, printed  # beside one per file of our own
    assert printed[1] == "False"
    assert not {"timm", "triton", "numpy"} & set(printed[2:])
