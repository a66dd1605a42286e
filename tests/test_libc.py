"""Functions of the C library: arguments of their whole width, errno, and the lack of one."""

import ctypes
import subprocess
import sys
from errno import EBADF, EINVAL

import pytest

from srpcd import confine, libc


def test_arguments_and_results_keep_all_their_bits() -> None:
    absolute = libc.function("llabs", libc.Long, libc.Long)
    assert absolute(-(2**62) - 1) == 2**62 + 1
    assert libc.function("strlen", libc.UnsignedLong, libc.String)(b"four") == 4
    buffer = ctypes.create_string_buffer(b"abc")
    copy = libc.function("memset", libc.Pointer, libc.Pointer, libc.Int, libc.UnsignedLong)
    assert copy(ctypes.addressof(buffer), ord("x"), 2) == ctypes.addressof(buffer)
    assert buffer.value == b"xxc"


def test_a_failure_has_the_errno_of_the_call() -> None:
    assert libc.function("close", libc.Int, libc.Int)(-1) == -1
    with pytest.raises(OSError, match="closing it") as caught:
        libc.failed("closing it")
    assert caught.value.errno == EBADF
    with pytest.raises(OSError, match=r"prctl\(9999\)") as caught:
        confine.prctl(9999)
    assert caught.value.errno == EINVAL


def test_a_function_that_is_not_there_is_an_error_at_once() -> None:
    with pytest.raises(OSError, match="nonesuch"):
        libc.function("nonesuch", libc.Int)


USE = """
import resource, sys
from srpcd import libc
if sys.argv[1]:
    libc.keep_memory(int(sys.argv[1]))

def use():
    blocks = [bytearray(100_000) for _ in range(10)]

use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kept: str) -> int:
    """Page faults of a process that takes and frees a megabyte twenty times."""
    command = [sys.executable, "-c", USE, kept]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def test_memory_is_kept_for_what_comes_next() -> None:
    assert faults("") > 20 * 200
    assert faults(str(2**20)) < 20
    assert faults(str(400_000)) > 20 * 20, "no more is kept than was asked for"
