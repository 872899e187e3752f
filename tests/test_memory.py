"""What the commands tell malloc has the effect that they want."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import sys
import torch
from eqnet.command import keep_freed_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
if sys.argv[1] == "keep":
    keep_freed_memory()
before = resident()
x = torch.ones(64, 2**18)  # 64 MiB
del x
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_freed_memory_stays_with_the_process() -> None:
    left = {}
    for word in ("keep", "return"):
        done = subprocess.run([sys.executable, "-c", CODE, word], capture_output=True, text=True, check=True)
        left[word] = float(done.stdout)
    assert left["keep"] > 60  # MiB
    assert left["return"] < 10
