"""The GPUs that kernels are compiled for without having one, and what their makers say of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

COPY_SHARE = 0.9  # of the memory's peak bandwidth that a copy reaches: 4.3 of 4.8 TB/s on an H200


@dataclass(frozen=True)
class Target:
    """An architecture, and the numbers of one GPU that has it.

    A processor is what NVIDIA calls a streaming multiprocessor and AMD a compute unit; its registers have 32 bits.
    """

    name: str
    backend: str  # as Triton calls it
    arch: int | str
    warp_size: int
    registers: int  # of a processor
    register_step: int  # a thread has a multiple of that many
    threads: int  # that a processor holds at once, at most
    shared_bytes: int  # of a processor
    gpu: str
    processors: int
    lanes: int  # of a processor: how many threads take an instruction in each cycle
    gigahertz: float
    terabytes_per_second: float  # the peak of its memory

    @property
    def gpu_target(self) -> Any:
        """The same for Triton."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.backend, self.arch, self.warp_size)

    @property
    def is_nvidia(self) -> bool:
        return self.backend == "cuda"

    @property
    def instructions_per_byte(self) -> float:
        """As many as a thread may take for each byte before taking them lasts longer than a copy of the byte."""
        instructions = self.processors * self.lanes * self.gigahertz * 1e9
        return instructions / (COPY_SHARE * self.terabytes_per_second * 1e12)

    def occupancy(self, registers: int, shared_bytes: int, threads: int) -> float:
        """The share of the threads that a processor can hold, of which it does hold if all programs are like this.

        Args:
            registers: of a thread.
            shared_bytes: of a program.
            threads: of a program.
        """
        taken = max(1, -(-registers // self.register_step)) * self.register_step
        # A processor has four parts, each with its registers and warps.
        warps = min(self.registers // 4 // (taken * self.warp_size), self.threads // self.warp_size // 4) * 4
        programs = warps * self.warp_size // threads
        if shared_bytes:
            programs = min(programs, self.shared_bytes // shared_bytes)
        return programs * threads / self.threads


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 65536, 8, 2048, 164 << 10, "A100 80 GB", 108, 128, 1.41, 2.039),
        Target("sm_90", "cuda", 90, 32, 65536, 8, 2048, 228 << 10, "H200", 132, 128, 1.98, 4.8),
        Target("sm_100", "cuda", 100, 32, 65536, 8, 2048, 228 << 10, "B200", 148, 128, 1.98, 8.0),
        Target("gfx942", "hip", "gfx942", 64, 131072, 8, 2048, 64 << 10, "MI300X", 304, 64, 2.1, 5.3),
    )
}
