"""What the host sends to a device, and what must outlive the step because a CUDA graph reads it again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..step import graphs

Array = np.ndarray[Any, Any]


class Uploads:
    """Copies to one device, on the stream that was current when this was made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._context = nullcontext()
        self._current_stream = _stream_getter(device)
        self._stream = self._current_stream()
        self._graphs: list[Any] = []  # what captured graphs read, which may neither change nor go
        self._spare: Tensor | None = None

    def is_current(self) -> bool:
        """Whether what was uploaded can be used on the current stream: on that which it was made on and owns it.

        A graph may be captured on any: what it uses is kept for it, and a capture begins when all streams are done.
        """
        return self._stream == self._current_stream() or graphs.is_capturing()

    def memory_for(self, array: Array) -> Tensor:
        """Where an array of int64 is uploaded to: on the CPU, where it lies."""
        if self.device.type == "cpu":
            return torch.from_numpy(array)
        return torch.empty(len(array), dtype=torch.int64, device=self.device)

    def upload(self, array: Array, copy: Tensor) -> Tensor:
        """Copy to the device. The pinned source may go: torch's host allocator keeps it until it has been read."""
        if self.device.type == "cpu":
            return copy
        host = self._staging(len(array))
        host.numpy()[:] = array
        copy.copy_(host, non_blocking=True)
        self.keep_for_graph(host, copy)  # which reads the source again at each replay
        return copy

    def keep_for_graph(self, *used: Any) -> None:
        """Keep what the graph that is being captured will use, if one is."""
        if graphs.is_capturing():
            self._graphs.append(used)

    def on_device(self) -> AbstractContextManager[Any]:
        """Where kernels are launched."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else self._context

    def _staging(self, size: int) -> Tensor:
        """Pinned memory: a captured copy reads from no other, and PyTorch 2.10 can allocate none while it captures."""
        if graphs.is_capturing():
            spare, self._spare = self._spare, None
            if spare is not None and len(spare) == size:
                return spare
        elif self._spare is None or len(self._spare) != size:
            self._spare = self._pinned(size)  # for a capture that may come
        return self._pinned(size)

    def _pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=self.device.type == "cuda")


def _stream_getter(device: torch.device) -> Callable[[], int]:
    """What tells the current stream of a device. torch makes an object of it, unless it is asked as Triton asks it."""
    if device.type != "cuda":
        return int
    raw: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    if raw is None:
        return lambda: int(torch.cuda.current_stream(device).cuda_stream)
    return partial(raw, torch.cuda.current_device() if device.index is None else device.index)
