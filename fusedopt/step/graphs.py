"""CUDA graphs: what a step must not do while it is captured in one."""

import torch


def is_capturing() -> bool:
    """Whether what is launched now becomes part of a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
