"""What there is to say about the machine code of a kernel, and the tables that say it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .assembly import Loop, MachineCode, accesses, barriers, element_loops
from .kernels import SCALE_BYTES, Kernel, Update
from .machine_code import machine_codes
from .targets import TARGETS, Target


@dataclass(frozen=True)
class ElementLoop:
    """The loop over elements whose streams are all aligned, as nearly every element passes it."""

    elements: int  # of a thread in one turn
    bytes_loaded: float  # for an element
    bytes_stored: float
    declared_bytes: float
    instructions: float  # for an element
    fast_instructions: float  # without those of rare values
    budget: float  # of instructions for an element, beyond which not the memory is the limit
    table_loads: int  # of what belongs before the loop
    spills: int  # loads and stores of what did not fit into registers


@dataclass(frozen=True)
class Report:
    """Numbers that JSON can hold."""

    kernel: str
    target: str
    name: str
    registers: int
    local_bytes: int
    shared_bytes: int
    barriers: int
    occupancy: float  # at most, given registers and shared memory
    nan_dropping_maxima: int  # NVIDIA's fp32 maxima and minima that return the other operand for a NaN
    loops: list[dict[str, int]]  # the accesses of each loop over elements: {"load 16": 8}; the aligned one comes first
    element_loop: ElementLoop | None
    waste: list[str]


def reports(kernels: Sequence[Kernel], target: Target) -> list[Report]:
    """Compile kernels, and read their machine code."""
    codes = machine_codes(kernels, target)
    return [_report(kernel, target, code) for kernel, code in zip(kernels, codes, strict=True)]


def _report(kernel: Kernel, target: Target, code: MachineCode) -> Report:
    found = element_loops(code) if kernel.read else []
    element_loop = _element_loop(kernel, target, found[0]) if kernel.read else None
    numbers = {
        "registers": code.registers,
        "local_bytes": code.local_bytes,
        "shared_bytes": code.shared_bytes,
        "barriers": barriers(code),
        "nan_dropping_maxima": len(re.findall(r"\bFMNMX3?(?!\S*\.NAN)", code.text)),
        "loops": list(map(_named, found)),
    }
    return Report(
        kernel=kernel.id,
        target=target.name,
        name=code.name,
        occupancy=target.occupancy(code.registers, code.shared_bytes, code.threads),
        element_loop=element_loop,
        waste=_waste(kernel, numbers, element_loop),
        **numbers,
    )


def _named(loop: Loop) -> dict[str, int]:
    return {f"{access} {width}": count for (access, width), count in sorted(accesses(loop).items())}


def _element_loop(kernel: Kernel, target: Target, loop: Loop) -> ElementLoop:
    moved = Counter({"load": 0, "store": 0})
    for (access, width), count in accesses(loop).items():
        moved[access] += width * count
    for access in moved:  # the threads of a warp share a scale
        moved[access] -= torch.float32.itemsize * kernel.scales
    sizes = {"load": _size(kernel.read), "store": _size(kernel.written)}
    access = "store" if kernel.written else "load"  # a stray load may be one of a table
    elements = moved[access] // sizes[access]
    scalar = sum(bool(re.match(r"(@!?U?P\d+ )?(LDC|ULDC|s_load|s_buffer_load)", text)) for text in loop.instructions)
    spills = sum(bool(re.search(r"\b(LDL|STL|scratch_\w+)\b", text)) for text in loop.instructions)
    return ElementLoop(
        elements=elements,
        bytes_loaded=moved["load"] / elements + kernel.scales * SCALE_BYTES,
        bytes_stored=moved["store"] / elements + kernel.scales * SCALE_BYTES,
        declared_bytes=kernel.bytes_per_element,
        instructions=len(loop.instructions) / elements,
        fast_instructions=loop.fast / elements,
        budget=target.instructions_per_byte * kernel.bytes_per_element,
        table_loads=scalar + (moved["load"] > sizes["load"] * elements),
        spills=spills,
    )


def _size(dtypes: Sequence[Any]) -> int:
    return sum(dtype.itemsize for dtype in dtypes)


def _waste(kernel: Kernel, numbers: dict[str, Any], loop: ElementLoop | None) -> list[str]:
    """What a kernel should not do."""
    found = []
    if numbers["local_bytes"]:
        outside = ", but not in the loop" if loop is not None and not loop.spills else ""
        found.append(f"spills {numbers['local_bytes']} bytes{outside}")
    if isinstance(kernel, Update):  # the others add up across threads
        if numbers["shared_bytes"]:
            found.append(f"converts layouts through {numbers['shared_bytes']} bytes of shared memory")
        if numbers["barriers"]:
            found.append(f"waits at {numbers['barriers']} barriers")
    if numbers["nan_dropping_maxima"]:
        found.append("has maxima that drop NaN")
    if loop is None:
        return found
    moved = loop.bytes_loaded + loop.bytes_stored
    if not math.isclose(moved, loop.declared_bytes):
        found.append(f"moves {moved:g} bytes an element, not {loop.declared_bytes:g}")
    if numbers["loops"][0] != kernel.accesses():
        found.append(f"has accesses {numbers['loops'][0]}, not {dict(kernel.accesses())}")
    if loop.table_loads:
        found.append("reads tables for every block")
    # What states in 8 bits save in bytes over those of fp32, they may take in instructions.
    budget = loop.budget * kernel.full_bytes_per_element / kernel.bytes_per_element
    if loop.instructions > budget:
        found.append(f"has {loop.instructions:.0f} instructions an element, more than {budget:.0f}")
    return found


READING = f"""Every kernel is compiled as a launch compiles it, and its machine code is read: the loop over elements
whose streams are all aligned, as nearly every element passes it. Bytes are those that a thread loads and stores there
for an element. Instructions are all in that loop, also those that only rare values run, for an element; in brackets
their share of the budget: how many there may be before a GPU spends more time on taking instructions than on moving the
bytes. It follows from the makers' numbers ({", ".join(f"{t.gpu} for {t.name}" for t in TARGETS.values())}), at a copy
bandwidth of nine tenths of the peak. Kernels with states in 8 bits count as wasteful only beyond the budget that states
of fp32 would give them: then the step would be slower than with these. Occupancy is the share of a processor's threads
for which there are registers and shared memory. Nothing here is a time."""


def markdown(found: Sequence[Report], circumstances: str) -> str:
    """All tables."""
    parts = [
        "# What the machine code says",
        circumstances,
        READING,
        _summary(found),
        "## Waste",
        "\n".join(f"- {each.kernel} for {each.target} {', '.join(each.waste)}" for each in found if each.waste)
        or "None.",
    ]
    if any(each.element_loop for each in found):
        parts += [
            "## The loop over elements",
            "Bytes loaded + stored for an element; instructions (share of the budget), registers, occupancy.",
            _elements_table([each for each in found if each.element_loop]),
        ]
    if not all(each.element_loop for each in found):
        parts += [
            "## What comes before",
            "One thread for each tensor, in float64: registers, bytes of shared memory (for sums across threads), "
            "occupancy.",
            _others_table([each for each in found if not each.element_loop]),
        ]
    return "\n\n".join(parts) + "\n"


def _summary(found: Sequence[Report]) -> str:
    headers = ["target", "kernels", "bytes as declared", "spilled", "lowest occupancy", "largest share of the budget"]
    rows = []
    for target, reports in _by_target(found).items():
        inner = [(each, each.element_loop) for each in reports if each.element_loop]
        as_declared = sum(loop.bytes_loaded + loop.bytes_stored == loop.declared_bytes for _, loop in inner)
        least = min(reports, key=lambda each: each.occupancy)
        row = [target, len(reports), f"{as_declared} of {len(inner)}", sum(bool(each.local_bytes) for each in reports)]
        row.append(f"{least.occupancy:.0%}, {least.kernel}")
        if inner:
            most, loop = max(inner, key=lambda pair: pair[1].instructions / pair[1].budget)
            row.append(f"{loop.instructions / loop.budget:.0%}, {most.kernel}")
        rows.append(row)
    return _table(headers, rows)


def _elements_table(found: Sequence[Report]) -> str:
    targets = list(_by_target(found))
    rows = []
    for kernel, by_target in _by_kernel(found).items():
        first = next(iter(by_target.values()))
        moved = f"{first.element_loop.bytes_loaded:g} + {first.element_loop.bytes_stored:g}"
        widths = [_widths(first.loops[0], access) for access in ("load", "store")]
        rows.append([kernel, moved, *widths, *(_element_cell(by_target[target]) for target in targets)])
    return _table(["kernel", "bytes", "loads", "stores", *targets], rows)


def _element_cell(report: Report) -> str:
    loop = report.element_loop
    share = loop.instructions / loop.budget
    return f"{loop.instructions:.0f} ({share:.0%}), {report.registers}, {report.occupancy:.0%}"


def _widths(loop: dict[str, int], access: str) -> str:
    """The widths of loads or stores in bytes: "16, 8"."""
    widths = {int(key.partition(" ")[2]) for key in loop if key.startswith(access)}
    return ", ".join(map(str, sorted(widths, reverse=True)))


def _others_table(found: Sequence[Report]) -> str:
    targets = list(_by_target(found))
    rows = [
        [kernel, *(f"{each.registers}, {each.shared_bytes}, {each.occupancy:.0%}" for each in by_target.values())]
        for kernel, by_target in _by_kernel(found).items()
    ]
    return _table(["kernel", *targets], rows)


def _by_target(found: Sequence[Report]) -> dict[str, list[Report]]:
    grouped: dict[str, list[Report]] = {}
    for report in found:
        grouped.setdefault(report.target, []).append(report)
    return grouped


def _by_kernel(found: Sequence[Report]) -> dict[str, dict[str, Report]]:
    grouped: dict[str, dict[str, Report]] = {}
    for report in found:
        grouped.setdefault(report.kernel, {})[report.target] = report
    return grouped


def _table(headers: Sequence[str], rows: Any) -> str:
    from tabulate import tabulate

    return tabulate(list(rows), headers, "github", disable_numparse=True)
