"""Compiles kernels for GPUs that are not there, exactly as a launch would, and disassembles them.

Needs a process without TRITON_INTERPRET: an interpreted function cannot be compiled.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fusedopt.engines.signature import THREADS, launch_options

from .assembly import MachineCode
from .kernels import Kernel
from .targets import Target

TABLES = {
    "groups_ptr": torch.int64,
    "grads_ptr": torch.int64,
    "scalar_states_ptr": torch.int64,
    "hyper_ptr": torch.float64,
    "hyper_tensors_ptr": torch.int64,
    "limits_ptr": torch.float64,
    "limit_tensors_ptr": torch.int64,
    "grad_scale_ptr": torch.float32,
    "found_inf_ptr": torch.float32,
    "partials_ptr": torch.float64,
    "scalars_ptr": torch.float64,
    "control_ptr": torch.float64,
    "grad_norm_ptr": torch.float64,
    "skipped_steps_ptr": torch.int64,
    "rounding_step_ptr": torch.int64,
    "rows_ptr": torch.int64,
    "chunks_ptr": torch.int32,
}


def machine_codes(kernels: Sequence[Kernel], target: Target) -> list[MachineCode]:
    """What becomes of each kernel."""
    compiled = [_compile(kernel, target) for kernel in kernels]
    if not target.is_nvidia:
        return [_read_amd(target, each) for each in compiled]
    cubins = [each.asm["cubin"] for each in compiled]
    return [_read_nvidia(target, each, text) for each, text in zip(compiled, _disassemble(cubins, target), strict=True)]


def specialization(kernel: Kernel, target: Target, number: int = 17) -> dict[str, tuple[str, Any]]:
    """Of each argument the type and what the compiler is told of its value, as a launch finds them out.

    Triton's cache knows a compiled kernel by this. Every argument that may be any number is `number`.
    """
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    function = kernel.function
    tables = {name: torch.empty(16, dtype=dtype) for name, dtype in TABLES.items() if name in function.arg_names}
    integers = dict.fromkeys(kernel.integers, number)
    bind = create_function_from_signature(function.signature, function.params, make_backend(target.gpu_target))
    found = bind(**tables, **integers, **kernel.constants, **launch_options(target.warp_size))[1]
    return dict(zip(function.arg_names, found, strict=True))


def _compile(kernel: Kernel, target: Target) -> Any:
    import triton
    from triton.compiler import ASTSource, make_backend

    arguments = specialization(kernel, target)
    parse_attr = make_backend(target.gpu_target).parse_attr
    source = ASTSource(
        kernel.function,
        {name: kind for name, (kind, _) in arguments.items()},
        {name: value for name, (kind, value) in arguments.items() if kind == "constexpr"},
        {
            (i,): parse_attr(value)
            for i, (kind, value) in enumerate(arguments.values())
            if kind != "constexpr" and isinstance(value, str)
        },
    )
    try:
        return triton.compile(source, target=target.gpu_target, options=launch_options(target.warp_size))
    except Exception as error:
        raise RuntimeError(f"{kernel.id} cannot be compiled for {target.name}") from error


def _read_nvidia(target: Target, compiled: Any, text: str) -> MachineCode:
    with _file(compiled.asm["cubin"]) as path:
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _run("cuobjdump", "--dump-resource-usage", path)))
    return MachineCode(
        target=target.name,
        name=compiled.metadata.name,
        text=text,
        threads=THREADS,
        registers=int(usage["REG"]),
        local_bytes=int(usage["STACK"]) + int(usage["LOCAL"]),
        shared_bytes=compiled.metadata.shared,
    )


def _read_amd(target: Target, compiled: Any) -> MachineCode:
    text = compiled.asm["amdgcn"]
    usage = dict(re.findall(r"^\s+(?:- )?\.(\w+):\s+(\S+)$", text, re.M))
    return MachineCode(
        target=target.name,
        name=usage["name"],
        text=text,
        threads=THREADS,
        registers=int(usage["vgpr_count"]),
        local_bytes=int(usage["private_segment_fixed_size"]) + 4 * int(usage["vgpr_spill_count"]),
        shared_bytes=compiled.metadata.shared,
    )


def _disassemble(cubins: Sequence[bytes], target: Target) -> Iterator[str]:
    """The SASS of each. All in one go, since the disassembler takes a third of a second to start."""
    codes = list(map(_code, cubins))
    with _file(b"".join(codes)) as path:
        lines = iter(_run("nvdisasm", "--binary", target.name.upper().replace("_", ""), path).splitlines())
    end = 0
    for code in codes:
        end += len(code)
        yield "\n".join(_until(lines, end))


def _until(lines: Iterator[str], end: int) -> Iterator[str]:
    """The lines before that of the last instruction (of 16 bytes) that begins before an address, and that one."""
    for line in lines:
        yield line
        match = re.match(r"\s+/\*([0-9a-f]{4,})\*/", line)
        if match and int(match[1], 16) == end - 16:
            return


def _code(cubin: bytes) -> bytes:
    """The instructions: the section .text.<name> of an ELF file of 64 bits."""
    (offset,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, of_names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, offset + i * size) for i in range(count)]
    names = sections[of_names][4]
    (code,) = (
        cubin[start : start + length]
        for name, _, _, _, start, length in sections
        if cubin.startswith(b".text.", names + name)
    )
    return code


def _run(tool: str, *arguments: str) -> str:
    """What a tool of NVIDIA's, which Triton brings along, prints."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


@contextmanager
def _file(content: bytes) -> Iterator[str]:
    """The path of a temporary file for a tool."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        yield file.name
