"""Freed memory is used again instead of being mapped anew."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, threading
import torch
from dori.allocator import keep_freed_memory

def use():
    for _ in range(10):
        torch.ones(2**24)  # 64 MiB

def everywhere():
    use()
    other = threading.Thread(target=use)  # as the backward pass does
    other.start(); other.join()

torch.set_num_threads(1)
kept = sys.argv[1] == "kept" and keep_freed_memory()
for _ in range(5):  # until the heap has found its layout
    everywhere()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
everywhere()
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> tuple[int, int]:
    """Whether memory is kept, and the faults of twenty large tensors, one after another, in a new process."""
    ran = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
    kept, faults = map(int, ran.stdout.split())
    return kept, faults


def test_large_tensors_reuse_the_memory_of_those_before() -> None:
    kept, faults = page_faults("kept")
    if not kept:
        pytest.skip("the C library is not glibc")
    usual = page_faults("usual")[1]
    assert faults < usual / 10 or usual < 100  # of few, another allocator is preloaded
