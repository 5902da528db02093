"""Compiles symmetric products for the targets and prints what came out as JSON. Not with TRITON_INTERPRET set."""

import json
import re

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from bench.static.machine_code import _file, _run
from fusedopt.kernels.symmetric import symmetric_product
from fusedopt.matrices.symmetric import arguments

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KINDS = ["rows", "columns", "unaligned"]  # what lies together in X
SIZES = [(8, 8), (16, 24), (128, 64), (1000, 4096), (2**16, 2**12)]


def batch(kind, rows=256, columns=512):
    """X, the result and C, without memory."""
    shape = {"rows": (2, rows, columns), "columns": (2, columns, rows), "unaligned": (2, rows + 1, columns + 1)}[kind]
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    x = x.mT if kind == "columns" else x
    out, c = (torch.empty(2, x.shape[1], x.shape[1], dtype=x.dtype, device="meta") for _ in range(2))
    return x, out, c


def specialization(target, kind, *sizes):
    """Of each argument its type and what the compiler is told of it, as a launch finds out; and what else it is told.

    A compiled kernel is known by this.
    """
    x, out, c = batch(kind, *sizes)
    _, values, options = arguments(x, out, c, x.shape[1] / 8, 1.0, target.warp_size)
    bind = create_function_from_signature(symmetric_product.signature, symmetric_product.params, make_backend(target))
    found = bind(*values, **options)[1]
    options = {name: value for name, value in options.items() if name not in symmetric_product.arg_names}
    return dict(zip(symmetric_product.arg_names, found, strict=True)), options


def report(target, kind):
    found, options = specialization(target, kind)
    source = ASTSource(
        symmetric_product,
        {name: kind for name, (kind, _) in found.items()},
        {name: value for name, (kind, value) in found.items() if kind == "constexpr"},
        {
            (i,): make_backend(target).parse_attr(value)
            for i, (kind, value) in enumerate(found.values())
            if kind != "constexpr" and isinstance(value, str)
        },
    )
    compiled = triton.compile(source, target=target, options=options)
    numbers = {"name": compiled.metadata.name, "shared": compiled.metadata.shared}
    if target.backend == "cuda":
        with _file(compiled.asm["cubin"]) as path:
            usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _run("cuobjdump", "--dump-resource-usage", path)))
        numbers |= {"registers": int(usage["REG"]), "spilled": int(usage["STACK"]) + int(usage["LOCAL"])}
        text = compiled.asm["ptx"]
        counted = {
            "tensor core": r"\b(?:mma\.sync|wgmma\.mma_async)\.\S*\.f32\.bf16\.bf16",
            "async 16": r"\bcp\.async\.cg\.\S+ \[.*?\], \[.*?\], 0x10\b",
            "async": r"\bcp\.async\.c[ag]\.",
            "load 16": r"\bld\.global\.\S*v4\.b32",
            "load": r"\bld\.global\b",
            "store 16": r"\bst\.global\.\S*v4\.b32",
            "store": r"\bst\.global\b",
            "local": r"\b(?:ld|st)\.local\b",
        }
    else:
        text = compiled.asm["amdgcn"]
        usage = dict(re.findall(r"^\s+(?:- )?\.(\w+):\s+(\S+)$", text, re.M))
        numbers |= {
            "registers": int(usage["vgpr_count"]),
            "spilled": int(usage["private_segment_fixed_size"]) + 4 * int(usage["vgpr_spill_count"]),
        }
        counted = {
            "tensor core": r"\bv_mfma_f32_\S*bf16",
            "load 16": r"\b(?:buffer|global)_load_dwordx4",
            "load": r"\b(?:buffer|global|flat)_load_",
            "store 16": r"\b(?:buffer|global)_store_dwordx4",
            "store": r"\b(?:buffer|global|flat)_store_",
            "local": r"\bscratch_",
        }
    return numbers | {name: len(re.findall(pattern, text)) for name, pattern in counted.items()}


def main():
    results = {f"{kind} {name}": report(target, kind) for name, target in TARGETS.items() for kind in KINDS}
    results["specializations"] = [str(specialization(TARGETS["sm_90"], "rows", *sizes)) for sizes in SIZES]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
