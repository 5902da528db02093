"""What the compilers make of the kernels, without a GPU: their registers, memory accesses and instructions.

Compiles exactly what a launch would: the same arguments, constants and options. Run it in a process without
TRITON_INTERPRET (an interpreted function cannot be compiled): `python -m bench.machine_code` prints a table.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fusedopt import FusedOptimizer
from fusedopt.hyper import count_numbers
from fusedopt.options import option
from fusedopt.precision import is_stochastic, kept_state, state_dtype
from fusedopt.tables import LAUNCH_OPTIONS, PREPARE_BLOCK_SIZE, Signature, rule, squares_constants

from .assembly import Loop, MachineCode, accesses, aligned_loop, barriers, loops

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}

# Parameter, gradient and states.
DTYPES = {
    "fp32": (torch.float32, torch.float32, torch.float32),
    "fp64": (torch.float64, torch.float64, torch.float64),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16, torch.float16),
    "bf16-fp32states": (torch.bfloat16, torch.bfloat16, torch.float32),
    "fp32-bf16grad": (torch.float32, torch.bfloat16, torch.float32),
}

TABLES = {
    "groups_ptr": torch.int64,
    "grads_ptr": torch.int64,
    "scalar_states_ptr": torch.int64,
    "hyper_ptr": torch.float64,
    "hyper_tensors_ptr": torch.int64,
    "limits_ptr": torch.float64,
    "grad_scale_ptr": torch.float32,
    "found_inf_ptr": torch.float32,
    "partials_ptr": torch.float64,
    "scalars_ptr": torch.float64,
    "control_ptr": torch.float64,
    "grad_norm_ptr": torch.float64,
    "skipped_steps_ptr": torch.int64,
    "rows_ptr": torch.int64,
    "chunks_ptr": torch.int32,
}


@dataclass(frozen=True)
class Kernel:
    """An `update` kernel that a step launches: the rule of an optimizer for one signature."""

    optimizer: type[FusedOptimizer]
    signature: Signature
    dtypes: str  # a key of DTYPES, or the id of a mode
    n_hyper: int

    @property
    def rule(self) -> str:
        """The module of the rule and the states that its options call for, as a test is named."""
        present = [n for n, dtype in zip(self.optimizer.states, self.signature.states, strict=True) if dtype]
        return "-".join([self.optimizer.kernel, *present])

    @property
    def id(self) -> str:
        return f"{self.rule}-{self.dtypes}"

    @property
    def n_scalars(self) -> int:
        ones = (0.5,) * self.n_hyper, (0.5,) * len(self.optimizer.scalar_states)
        return len(self.optimizer.scalars(*ones)[0])

    @property
    def written(self) -> list[torch.dtype]:
        """The streams that are stored: all but the gradient."""
        return [self.signature.param, *self.signature.streams[2:]]

    @property
    def bytes_per_element(self) -> int:
        """What a step moves: every stream read, all but the gradient written."""
        return sum(dtype.itemsize for dtype in [*self.signature.streams, *self.written])


@dataclass(frozen=True)
class Report:
    """What there is to say about an `update` kernel, in numbers that JSON can hold."""

    name: str
    registers: int
    local_bytes: int
    shared_bytes: int
    barriers: int
    loops: list[dict[str, int]]  # the accesses of each loop over elements: {"load 16": 8}; the aligned one comes first
    elements: int  # that a thread updates in one turn of the aligned loop
    instructions: float  # of the aligned loop, per element
    fast_instructions: float  # without those of rare values
    table_loads: int  # in the aligned loop
    nan_dropping_maxima: int  # NVIDIA's fp32 maxima and minima that return the other operand for a NaN


def kernels_of(cases: Iterable[Any], modes: Iterable[Any] = ()) -> list[Kernel]:
    """Every distinct `update` kernel of the given cases, in every dtype signature and every mode of low precision."""
    cases = list(cases)
    found = [
        kernel_of(case.make([torch.zeros(1)]), dtypes, param, grad, state)
        for dtypes, (param, grad, state) in DTYPES.items()
        for case in cases
    ]
    found += [kernel_in(case, mode) for mode in modes for case in cases if not mode.asks_for_nothing(case)]
    distinct: dict[tuple[Any, Signature], Kernel] = {}
    for kernel in found:
        distinct.setdefault((kernel.optimizer.kernel, kernel.signature), kernel)
    return list(distinct.values())


def kernel_in(case: Any, mode: Any) -> Kernel:
    """The `update` kernel of a case in a mode of low precision, with gradients of the parameter's dtype."""
    param = torch.zeros(1, dtype=mode.dtype)
    optimizer = case.make([param], **mode.options)
    state = state_dtype(param, optimizer.param_groups[0])
    return kernel_of(optimizer, mode.id, mode.dtype, mode.dtype, state)


def kernel_of(
    optimizer: FusedOptimizer, name: str, param: torch.dtype, grad: torch.dtype, state: torch.dtype
) -> Kernel:
    """The `update` kernel of an optimizer for these dtypes; `name` is what they are called."""
    (group,) = optimizer.param_groups
    signature = Signature(
        param,
        grad,
        tuple(state if optimizer.uses(name, group) else None for name in optimizer.states),
        kept_state(torch.empty(0, dtype=param), group),
        is_stochastic(group),
        option(group, "ema_decay") is not None,
    )
    n_hyper = count_numbers(optimizer.defaults[name] for name in optimizer.hyperparameters)
    return Kernel(type(optimizer), signature, name, n_hyper)


def compile_update(kernel: Kernel, target: str) -> MachineCode:
    """The `update` kernel of a signature."""
    from fusedopt.kernels import multi_tensor

    return _compile(multi_tensor.update, {"first_tensor": 17, **_update_constants(kernel)}, target)


def compile_prepare(kernel: Kernel, target: str, *, hyper_tensors: bool) -> MachineCode:
    """The `prepare` kernel of the same rule, which has but one signature."""
    from fusedopt.kernels import multi_tensor

    return _compile(
        multi_tensor.prepare, {"n_tensors": 17, "n_partials": 17, **_prepare_constants(kernel, hyper_tensors)}, target
    )


def compile_sum_squares(grad: torch.dtype, target: str) -> MachineCode:
    """The kernel that reads gradients of a dtype before the step."""
    from fusedopt.kernels import gate

    return _compile(gate.sum_squares, {"n_chunks": 17, **squares_constants(grad)}, target)


def specializations(kernel: Kernel, target: str, number: int) -> list[str]:
    """What Triton's cache of compiled kernels knows a launch by, where every argument that may change is `number`."""
    from fusedopt.kernels import gate, multi_tensor

    update, prepare = _update_constants(kernel), _prepare_constants(kernel, hyper_tensors=False)
    return [
        str(_specialization(multi_tensor.update, {"first_tensor": number, **update}, target)),
        str(_specialization(multi_tensor.prepare, {"n_tensors": number, "n_partials": number, **prepare}, target)),
        str(_specialization(gate.sum_squares, {"n_chunks": number, **squares_constants(torch.float32)}, target)),
    ]


def elements_per_iteration(kernel: Kernel, loop: Loop) -> int:
    """How many elements one thread updates in one turn of the loop."""
    stored = sum(count * width for (access, width), count in accesses(loop).items() if access == "store")
    return stored // sum(dtype.itemsize for dtype in kernel.written)


def table_loads(kernel: Kernel, loop: Loop) -> int:
    """Loads in the loop that are none of the streams': of the tables, which belong before it."""
    scalar = sum(bool(re.match(r"(@!?U?P\d+ )?(LDC|ULDC|s_load|s_buffer_load)", text)) for text in loop.instructions)
    loaded = sum(count * width for (access, width), count in accesses(loop).items() if access == "load")
    streams = sum(dtype.itemsize for dtype in kernel.signature.streams) * elements_per_iteration(kernel, loop)
    return scalar + (loaded > streams)


def report(kernel: Kernel, target: str) -> Report:
    """Compile the `update` kernel and answer every question below about it."""
    code = compile_update(kernel, target)
    loop = aligned_loop(code)
    elements = elements_per_iteration(kernel, loop)
    others = [other for other in loops(code) if accesses(other) and other != loop]
    return Report(
        name=code.name,
        registers=code.registers,
        local_bytes=code.local_bytes,
        shared_bytes=code.shared_bytes,
        barriers=barriers(code),
        nan_dropping_maxima=len(re.findall(r"\bFMNMX3?(?!\S*\.NAN)", code.text)),
        loops=[
            {f"{access} {width}": n for (access, width), n in sorted(accesses(each).items())}
            for each in (loop, *others)
        ],
        elements=elements,
        instructions=len(loop.instructions) / elements,
        fast_instructions=loop.fast / elements,
        table_loads=table_loads(kernel, loop),
    )


def _update_constants(kernel: Kernel) -> dict[str, Any]:
    return {"UPDATE": rule(kernel.optimizer)[1], "N_SCALARS": kernel.n_scalars, **kernel.signature.constants}


def _prepare_constants(kernel: Kernel, hyper_tensors: bool) -> dict[str, Any]:
    return {
        "SCALARS": rule(kernel.optimizer)[0],
        "N_HYPER": kernel.n_hyper,
        "N_SCALAR_STATES": len(kernel.optimizer.scalar_states),
        "N_SCALARS": kernel.n_scalars,
        "HYPER_TENSORS": hyper_tensors,
        "BLOCK_SIZE": PREPARE_BLOCK_SIZE,
    }


def _specialization(function: Any, arguments: dict[str, Any], target: str) -> list[tuple[str, Any]]:
    """Of each argument the type and what the compiler is told of its value, as a launch finds them out."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    tables = {name: torch.empty(16, dtype=dtype) for name, dtype in TABLES.items() if name in function.arg_names}
    bind = create_function_from_signature(function.signature, function.params, make_backend(_gpu(target)))
    return bind(**tables, **arguments, **LAUNCH_OPTIONS)[1]


def _compile(function: Any, arguments: dict[str, Any], target: str) -> MachineCode:
    import triton
    from triton.compiler import ASTSource, make_backend

    specialization = dict(zip(function.arg_names, _specialization(function, arguments, target), strict=True))
    parse_attr = make_backend(_gpu(target)).parse_attr
    source = ASTSource(
        function,
        {name: kind for name, (kind, _) in specialization.items()},
        {name: value for name, (kind, value) in specialization.items() if kind == "constexpr"},
        {
            (i,): parse_attr(value)
            for i, (kind, value) in enumerate(specialization.values())
            if kind != "constexpr" and isinstance(value, str)
        },
    )
    compiled = triton.compile(source, target=_gpu(target), options=dict(LAUNCH_OPTIONS))
    warp_size = TARGETS[target][2]
    read = _read_nvidia if target.startswith("sm_") else _read_amd
    return read(target, compiled, LAUNCH_OPTIONS["num_warps"] * warp_size)


def _read_nvidia(target: str, compiled: Any, threads: int) -> MachineCode:
    text = _cuobjdump(compiled.asm["cubin"])
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return MachineCode(
        target=target,
        name=re.findall(r"Function\s*:\s*(\S+)", text)[-1],
        text=text,
        threads=threads,
        registers=int(usage["REG"]),
        local_bytes=int(usage["STACK"]) + int(usage["LOCAL"]),
        shared_bytes=compiled.metadata.shared,
    )


def _read_amd(target: str, compiled: Any, threads: int) -> MachineCode:
    text = compiled.asm["amdgcn"]
    usage = dict(re.findall(r"^\s+(?:- )?\.(\w+):\s+(\S+)$", text, re.M))
    return MachineCode(
        target=target,
        name=usage["name"],
        text=text,
        threads=threads,
        registers=int(usage["vgpr_count"]),
        local_bytes=int(usage["private_segment_fixed_size"]) + 4 * int(usage["vgpr_spill_count"]),
        shared_bytes=compiled.metadata.shared,
    )


def _cuobjdump(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _gpu(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget(*TARGETS[target])


def main() -> None:
    """Print instructions per element of the aligned loop and registers, for every kernel."""
    from tests.cases import AVERAGED, CASES, MODES

    for target in TARGETS:
        print(f"\n{target:<75} per element  fast path  registers")
        for kernel in kernels_of(CASES, [*MODES, *AVERAGED]):
            result = report(kernel, target)
            numbers = f"{result.instructions:>11.1f} {result.fast_instructions:>10.1f} {result.registers:>10}"
            print(f"{kernel.id:<75} {numbers}", flush=True)


if __name__ == "__main__":
    main()
