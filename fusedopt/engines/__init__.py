"""Who takes a step: the reference, in plain torch, or the kernels, by tables on the device; and which of them.

May import step, storage, options and protocol, and the kernels within functions only: they import Triton.
"""
