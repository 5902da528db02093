"""Reads SASS and amdgcn: loops, memory accesses, barriers."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class MachineCode:
    """One compiled kernel. `text` is its SASS or amdgcn."""

    target: str
    name: str
    text: str
    threads: int
    registers: int
    local_bytes: int  # of a thread: the stack and what was spilled
    shared_bytes: int

    @cached_property
    def instructions(self) -> list[tuple[int, str]]:
        """(address, instruction); amdgcn has the number of the line for its address."""
        if self.target.startswith("sm_"):
            found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(\S.*?)\s*;", self.text, re.M)
            return [(int(address, 16), instruction) for address, instruction in found]
        lines = [line.partition(";")[0].strip() for line in self.text.partition(".Lfunc_end")[0].splitlines()]
        return [(i, line) for i, line in enumerate(lines) if re.match(r"[a-z]\w+(\s|$)", line)]

    @cached_property
    def labels(self) -> dict[str, int]:
        """The address of the first instruction after each label of amdgcn."""
        lines = enumerate(self.text.splitlines())
        places = {match[1]: i for i, line in lines if (match := re.match(r"(\.LBB\w+):", line))}
        addresses = [address for address, _ in self.instructions]
        return {label: addresses[bisect_left(addresses, place)] for label, place in places.items()}


@dataclass
class Block:
    """Instructions that run one after the other, and the addresses where it goes on."""

    instructions: list[str]
    next: list[int]


@dataclass(frozen=True)
class Loop:
    """The instructions of an innermost loop; `slow` are those that only rare values of an element run."""

    instructions: tuple[str, ...]
    slow: int

    @property
    def fast(self) -> int:
        return len(self.instructions) - self.slow


def loops(code: MachineCode) -> list[Loop]:
    """The innermost loops, in the order of the code."""
    blocks = _blocks(code)
    bodies: dict[int, set[int]] = {}
    for latch, header in _back_edges(blocks):
        bodies.setdefault(header, {header}).update(_natural_loop(blocks, latch, header))
    innermost = [body for header, body in sorted(bodies.items()) if not any(h in body for h in bodies if h != header)]
    return [_loop([blocks[start] for start in sorted(body)]) for body in innermost]


def element_loops(code: MachineCode) -> list[Loop]:
    """The loops over elements, first that whose streams are all aligned: the one of the fewest, widest accesses."""
    found = [loop for loop in loops(code) if accesses(loop)]
    aligned = max(found, key=lambda loop: _mean_width(accesses(loop)))
    return [aligned, *(loop for loop in found if loop is not aligned)]


def accesses(loop: Loop) -> Counter[tuple[str, int]]:
    """How many ("load" or "store", bytes) there are to global memory."""
    counts: Counter[tuple[str, int]] = Counter()
    for instruction in loop.instructions:
        if match := re.search(r"\b(LDG|STG)\.E(\S*)", instruction):
            width = re.search(r"\.(?:[US](8|16)|(64|128|256))\b", match[2])
            bits = int(width[1] or width[2]) if width else 32
            counts["load" if match[1] == "LDG" else "store", bits // 8] += 1
        elif match := re.match(r"(?:global|flat|buffer)_(load|store)_(\w+)", instruction):
            counts[match[1], _amd_bytes(match[2])] += 1
    return counts


def barriers(code: MachineCode) -> int:
    """How often the threads of a program wait for each other."""
    return sum(bool(re.search(r"\bBAR\.|\bs_barrier", text)) for _, text in code.instructions)


def _target(code: MachineCode, instruction: str) -> int | None:
    """Where a branch goes."""
    if "BRA" in instruction and (match := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", instruction)):
        return int(match[1], 16)
    if "branch" in instruction and (match := re.match(r"s_c?branch\w*\s+(\.LBB\w+)", instruction)):
        return code.labels[match[1]]
    return None


def _never_falls_through(instruction: str) -> bool:
    if re.match(r"BRA\b", instruction):
        return not re.match(r"BRA\S*\s+[~!]?U?[PR]", instruction)
    return bool(re.match(r"(EXIT|RET|s_branch|s_endpgm)\b", instruction))


def _blocks(code: MachineCode) -> dict[int, Block]:
    """The basic blocks by the address of their first instruction."""
    targets = {_target(code, text) for _, text in code.instructions}
    blocks: dict[int, Block] = {}
    block = Block([], [])
    begins = falls_through = True
    for address, text in code.instructions:
        if begins or address in targets:
            if falls_through:
                block.next.append(address)
            block = blocks[address] = Block([], [])
        block.instructions.append(text)
        target = _target(code, text)
        if target is not None:
            block.next.append(target)
        falls_through = not _never_falls_through(text)
        begins = target is not None or not falls_through
    return blocks


def _back_edges(blocks: dict[int, Block]) -> list[tuple[int, int]]:
    """(from, to) of every edge that goes back to a block on the way there from the beginning."""
    start = min(blocks)
    seen, path, edges = {start}, {start}, []
    stack = [(start, iter(blocks[start].next))]
    while stack:
        at, successors = stack[-1]
        for to in successors:
            if to in path:
                edges.append((at, to))
            elif to not in seen:
                seen.add(to)
                path.add(to)
                stack.append((to, iter(blocks[to].next)))
                break
        else:
            stack.pop()
            path.remove(at)
    return edges


def _natural_loop(blocks: dict[int, Block], latch: int, header: int) -> set[int]:
    """The blocks from which the latch is reached without passing the header."""
    before: dict[int, list[int]] = {start: [] for start in blocks}
    for start, block in blocks.items():
        for to in block.next:
            before[to].append(start)
    body, waiting = {header}, [latch]
    while waiting:
        at = waiting.pop()
        if at not in body:
            body.add(at)
            waiting += before[at]
    return body


def _loop(blocks: list[Block]) -> Loop:
    # ptxas puts the rare cases of a division or a root (subnormal, infinite, zero) into functions.
    slow = sum(
        len(block.instructions) for block in blocks if any(text.startswith("CALL") for text in block.instructions)
    )
    return Loop(tuple(text for block in blocks for text in block.instructions), slow)


def _mean_width(counts: Counter[tuple[str, int]]) -> float:
    return sum(width * count for (_, width), count in counts.items()) / counts.total()


def _amd_bytes(suffix: str) -> int:
    """Of `dwordx4`, `ushort`, `short_d16_hi`, `byte`, `b128` and the like."""
    if match := re.match(r"(?:dword|b(?=\d))(x?)(\d*)", suffix):
        return int(match[2]) // 8 if suffix.startswith("b") and match[2] else 4 * int(match[2] or 1)
    return 2 if "short" in suffix else 1
