"""Freed memory goes back to the system."""

import platform
import subprocess
import sys

import pytest

# Blocks of 5 MB with a small one between every two; then the large ones are freed.
PROGRAM = """
import sys
import numpy as np
from kedit_fast.basics.allocator import give_back_what_is_freed

def held():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1e3

if sys.argv[1] == "given back":
    assert give_back_what_is_freed()
first = np.ones(30_000_000, np.uint8)
del first
before, small, large = held(), [], []
for _ in range(50):
    large.append(np.ones(5_000_000, np.uint8))
    small.append(np.ones(60_000, np.uint8))
full = held()
for i in range(0, 50, 2):
    large[i] = None
print(full - before, full - held())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
@pytest.mark.parametrize(("way", "given_back"), [("given back", 125), ("as it is", 0)])
def test_freed_blocks_go_back_to_the_system(way, given_back):
    told = subprocess.run([sys.executable, "-c", PROGRAM, way], capture_output=True, text=True, check=True).stdout
    held, freed = map(float, told.split())
    assert held == pytest.approx(253, abs=8)
    assert freed == pytest.approx(given_back, abs=5)
