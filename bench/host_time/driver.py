"""A driver for Triton on a machine without a GPU: kernels are compiled for one, launched in earnest, and run nowhere.

Triton's dispatch is the real one, and so is its launcher in C, above a library of the driver's name that says yes to
everything (`libcuda.c`). Without a C compiler a function of Python's stands in for the launcher.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver

from fusedopt.engines import choice

TARGET = GPUTarget("cuda", 90, 32)
IN_C, IN_PYTHON = "Triton's launcher in C", "a stand-in for Triton's launcher in Python"
SOURCE = Path(__file__).with_name("libcuda.c")


class Driver(CudaDriver):
    """What Triton asks of the driver of a GPU, for one that is not there.

    Args:
        library: what stands for the driver's, None to have no launcher in C.

    Attributes:
        launcher: which launcher stands above it.
        launches: tells how many kernels have been launched.
    """

    launcher: str
    launches: Callable[[], int]

    def __init__(self, library: ctypes.CDLL | None) -> None:
        self.launcher, self.launches = IN_PYTHON, lambda: _Launcher.launches
        self.utils, self.launcher_cls = _Utils(), _Launcher
        if library is not None:
            with suppress(ImportError):  # of a Triton that calls more of the driver than there is
                super().__init__()
                self.launcher, self.launches = IN_C, library.bench_launches
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.get_device_capability = lambda device: divmod(TARGET.arch, 10)

    def get_current_target(self) -> GPUTarget:
        return TARGET


class _Launcher:
    """Takes what Triton's launcher takes."""

    launches = 0

    def __init__(self, src: Any, metadata: Any) -> None:
        pass

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: int, packed: Any, metadata: Any, enter: Any, exit: Any,
        *args: Any,
    ) -> None:  # fmt: skip
        if enter is not None:
            enter(metadata)
        _Launcher.launches += 1
        if exit is not None:
            exit(metadata)


class _Utils(SimpleNamespace):
    """Takes what `CudaUtils` takes, before the first launch of a kernel."""

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 16}

    def unload_module(self, module: int) -> None:
        pass


def libcuda() -> ctypes.CDLL | None:
    """The library, compiled and loaded so that Triton's modules find it; None without a compiler."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    folder = Path(tempfile.mkdtemp(prefix="libcuda-"))
    path = folder / "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", "-O2", "-w", "-Wl,-soname,libcuda.so.1", str(SOURCE), "-o", str(path)]
    try:
        subprocess.run(command, check=True, capture_output=True)
        triton.knobs.nvidia.libcuda_path = str(folder)
        return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except (OSError, subprocess.CalledProcessError):
        return None


@contextmanager
def driven(driver: Driver) -> Iterator[Driver]:
    """Within the context Triton launches for tensors on the CPU, and fusedopt lets it."""
    interprets = choice.triton_interprets
    choice.triton_interprets = lambda: True  # lets tensors on the CPU through
    triton.runtime.driver.set_active(driver)
    try:
        yield driver
    finally:
        choice.triton_interprets = interprets
        triton.runtime.driver._active = None
