"""Keeps what has been compiled for the CPU on disk, as object code that needs llvmlite only."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

Code = tuple[str, bytes]  # the symbol of a function, and object code that has it

VARIABLE = "FUSEDOPT_CACHE_DIR"
NUMBERS = (bool, int, float, str, type(None))
LIBRARIES = ("builtins", "math", "numpy", "triton")  # whose objects are what their names say


def folder() -> Path | None:
    """Where the code is kept; None if ``FUSEDOPT_CACHE_DIR`` is empty, or if there is no home."""
    told = os.environ.get(VARIABLE)
    if told is not None:
        return Path(told).expanduser() if told else None
    try:
        parents = {"win32": Path("AppData/Local"), "darwin": Path("Library/Caches")}
        default = Path.home() / parents.get(sys.platform, Path(".cache"))
    except RuntimeError:
        return None
    return Path(os.environ.get("XDG_CACHE_HOME") or default) / "fusedopt"


def key_of(kernel: str, constants: dict[str, Any]) -> str:
    """What the code of a kernel follows from: its constants, the sources of their functions, the compiler, the CPU."""
    parts = [(name, _identity(value)) for name, value in sorted(constants.items())]
    return hashlib.sha256(repr((_surroundings(), kernel, parts)).encode()).hexdigest()


def read(key: str) -> Code | None:
    """The code that is kept under a key. None if it is not there, or not what was written."""
    path = folder()
    if path is None:
        return None
    try:
        data = (path / f"{key}.o").read_bytes()
    except OSError:
        return None
    digest, content = data[:32], data[32:]
    if hashlib.sha256(content).digest() != digest:
        return None
    symbol, _, code = content.partition(b"\0")
    return symbol.decode(), code


def write(key: str, code: Code) -> bool:
    """Keep code for later processes, which see the whole file or none; whether there is a place to."""
    path = folder()
    if path is None:
        return False
    content = code[0].encode() + b"\0" + code[1]
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, suffix=".tmp", delete=False) as file:
            try:
                file.write(hashlib.sha256(content).digest() + content)
                file.close()
                os.replace(file.name, path / f"{key}.o")
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError:
        return False
    return True


def _identity(value: Any) -> Any:
    """What a value is in any process: a function by its source and all that this uses.

    Raises:
        TypeError: nobody can tell.
    """
    from ..kernels.cpu.source import text, unwrapped, used

    value = unwrapped(value)
    if isinstance(value, NUMBERS):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return list(map(_identity, value))
    if isinstance(value, dict):
        return [(key, _identity(item)) for key, item in value.items()]
    if isinstance(value, ModuleType):
        return value.__name__
    module = str(getattr(value, "__module__", "")).partition(".")[0]
    if isinstance(value, FunctionType) and module != "triton":
        defaults = _identity((value.__defaults__, value.__kwdefaults__))
        return text(value)[0], defaults, [(name, _identity(item)) for name, item in used(value).items()]
    if module in LIBRARIES and hasattr(value, "__qualname__"):
        return module, value.__qualname__
    raise TypeError(f"it uses {value!r}, of which nobody can tell whether it has changed")


@cache
def _surroundings() -> str:
    import llvmlite.binding as llvm

    from ..kernels import cpu

    here = Path(cpu.__file__).parent
    sources = [path.read_bytes() for path in (*sorted(here.parent.glob("*.py")), *sorted(here.glob("*.py")))]
    processor = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    settings = sorted((name, value) for name, value in os.environ.items() if name.startswith("NUMBA_"))
    return repr((sys.version_info[:2], version("numba"), version("llvmlite"), settings, processor, sources))
