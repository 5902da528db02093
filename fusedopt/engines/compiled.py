"""The kernels as machine code of this CPU: compiled when they are first asked for, kept on disk, called from here."""

from __future__ import annotations

import ctypes
import logging
import re
import time
from collections.abc import Callable, Sequence
from functools import cache
from itertools import count
from typing import Any, Protocol

import torch

from . import code_cache, threads
from .signature import Signature

Launch = Callable[..., None]  # of a kernel that has its first arguments, with the last ones

BLOCK_SIZE = 128  # tensors of a program of `prepare`
CHUNK_SIZE = 16384  # elements of the others': fits the cache of a core, and looking up a chunk does not show
SQUARES_PROGRAMS = 256  # fixed, so that the order of the sums is

_log = logging.getLogger("fusedopt")
_Function = ctypes.CFUNCTYPE(None, ctypes.c_int64)
_ordinals = count()
_libraries: list[Any] = []  # which own the code
_seconds = 0.0  # that compiling has taken


class Kernel(Protocol):
    """A kernel of any engine."""

    def bound(self, programs: int, elements: int, *args: Any) -> Launch:
        """A launch to be repeated, by one thread at a time: the first arguments stay the same, and where they are.

        Args:
            programs: how many there are.
            elements: how many they have in all.
            args: the first of its arguments, all if the launch is to be given none.
        """


class CompileError(RuntimeError):
    """A kernel cannot be compiled for this CPU; says why."""


class CompiledKernels:
    """The kernels of `fusedopt.kernels.cpu`, to be bound to their arguments.

    All raise `CompileError`.
    """

    prepare_block_size = BLOCK_SIZE
    squares_chunk_size = CHUNK_SIZE
    squares_programs = SQUARES_PROGRAMS

    def chunk_size(self, signature: Signature) -> int:
        """Elements of a program of `update`."""
        return CHUNK_SIZE

    def prepare(self, **constants: Any) -> CompiledKernel:
        """`prepare`, for the numbers of a rule."""
        return self._kernel("prepare", BLOCK_SIZE=BLOCK_SIZE, **constants)

    def update(self, signature: Signature, **constants: Any) -> CompiledKernel:
        """`update` for one signature."""
        return self._kernel("update", CHUNK_SIZE=CHUNK_SIZE, **signature.kinds, **constants)

    def sum_squares(self, grad: torch.dtype) -> CompiledKernel:
        """`sum_squares` for gradients of this dtype."""
        return self._kernel("sum_squares", GRAD=grad, CHUNK_SIZE=CHUNK_SIZE)

    def _kernel(self, name: str, **constants: Any) -> CompiledKernel:
        return _kernel(name, tuple((key, _plain(value)) for key, value in constants.items()))


def _plain(value: Any) -> Any:
    """A dtype by its name, a device function as Python's."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return getattr(value, "fn", value)


class CompiledKernel:
    """A kernel as machine code."""

    def __init__(self, address: int) -> None:
        from ..kernels.cpu import TAKEN

        self._address, self._function = address, _Function(address)
        self._taken, self._table = TAKEN, ctypes.c_int64 * (TAKEN + 1)

    def bound(self, programs: int, elements: int, *args: Any) -> Launch:
        """A launch, as `Kernel` has it."""
        function, address, taken = self._function, self._address, self._taken
        table = self._table(programs, *as_numbers(args))
        arguments, first = ctypes.addressof(table), 1 + len(args)

        def launch(*lasts: Any) -> None:
            if lasts:
                table[first : first + len(lasts)] = as_numbers(lasts)
            table[taken] = 0
            threads.run(function, address, arguments, elements)

        return launch


def as_numbers(args: Sequence[Any]) -> list[int]:
    """Tensors among the arguments of a kernel by their addresses."""
    return [arg if type(arg) is int else arg.data_ptr() for arg in args]


@cache
def _kernel(name: str, constants: tuple[tuple[str, Any], ...]) -> CompiledKernel:
    try:
        return CompiledKernel(_address(name, dict(constants)))
    except Exception as error:  # of Python's, numba's or LLVM's
        raise CompileError(_reason(error)) from error


def _address(name: str, constants: dict[str, Any]) -> int:
    """Where the machine code of a kernel is: from the disk, or compiled now and kept there."""
    key = code_cache.key_of(name, constants)
    code = code_cache.read(key)
    if code is not None:
        try:
            return _linked(*code)
        except RuntimeError:
            pass  # of a file that is whole, but no use here
    begin = time.perf_counter()
    from ..kernels.cpu.build import object_code

    code = object_code(name, constants)
    address = _linked(*code)
    is_kept = code_cache.write(key, code)
    _tell(time.perf_counter() - begin, is_kept)
    return address


def _reason(error: Exception) -> str:
    """What went wrong, and in which line, without numba's way there."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # numba writes in bold where colorama is installed
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Failed in ")]
    places = [line.rstrip(":") for line in lines if line.startswith("File ")]
    return f"{type(error).__name__}: {' in '.join(lines[:1] + places[:1])}"


def _linked(symbol: str, code: bytes) -> int:
    """The address of a function in object code. A symbol that is nowhere in this process is an error, not its end."""
    import llvmlite.binding as llvm

    builder = llvm.JITLibraryBuilder().add_object_img(code).export_symbol(symbol).add_current_process()
    library = builder.link(_linker(), f"fusedopt {next(_ordinals)}")
    _libraries.append(library)
    return int(library[symbol])


@cache
def _linker() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.create_lljit_compiler()


def _tell(seconds: float, is_kept: bool) -> None:
    """Say once why a step has taken so long."""
    global _seconds
    before, _seconds = _seconds, _seconds + seconds
    if before < 1 <= _seconds:
        where = f"They are kept in {code_cache.folder()} for later processes."
        nowhere = f"They are not kept: set {code_cache.VARIABLE} to a folder that can be written."
        _log.warning(
            "fusedopt has spent %.1f s on compiling optimizer steps for this CPU. %s",
            _seconds,
            where if is_kept else nowhere,
        )
