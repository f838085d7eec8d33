"""What a batch process keeps of the memory that it frees."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from workers.heap import keep_freed_memory
if sys.argv[1] == "keeps":
    keep_freed_memory()
def rounds(count):
    for _ in range(count):
        held = [bytearray(600_000) for _ in range(16)]
        del held
rounds(3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
rounds(20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(what: str) -> int:
    """How many pages a fresh process had to ask for again."""
    return int(subprocess.check_output([sys.executable, "-c", PROGRAM, what], text=True))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_used_again_without_a_fault() -> None:
    """Twenty times sixteen tiles: without it nearly every page of them is new each time."""
    assert faults("keeps") < 100
    assert faults("as it is") > 1000
