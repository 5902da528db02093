"""Runs compiled functions on the threads that torch computes with: no second pool that could compete or hang."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

GRAIN = 32768  # elements that are not worth a second thread, as in ATen
LIBRARIES = {"linux": "libtorch_cpu.so", "darwin": "libtorch_cpu.dylib"}

_forked = False


def run(function: Callable[[int], None], address: int, arguments: int, elements: int) -> None:
    """Call a function, which divides its work among those who call it at once.

    Args:
        function: as Python calls it.
        address: of the same function.
        arguments: the address that it gets.
        elements: how much work there is.
    """
    if elements >= GRAIN and (threads := torch.get_num_threads()) > 1 and not _forked:
        parallel = _parallel()
        if parallel is not None:
            parallel(address, arguments, threads, 0)
            return
    function(arguments)


@cache
def _parallel() -> Any:
    """`GOMP_parallel` of the OpenMP that torch has loaded, GNU's or LLVM's; None without it, as on Windows."""
    if sys.platform not in LIBRARIES:
        return None
    try:
        function = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / LIBRARIES[sys.platform])).GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return function


def _after_fork() -> None:
    global _forked  # OpenMP's threads are not in the child, which would wait for them
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
