"""A user's optimizer without states, as a file of its own: its rule is read from there, as Triton reads it."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import fusedopt

CLASS = """

@triton.jit
def scalars(hyper, scalar_states):
    return (hyper[0],), ()


class Own(FusedOptimizer):
    kernel = (scalars, update)
    hyperparameters = ("lr",)

    def __init__(self, params, lr=0.5, **options):
        super().__init__(params, {"lr": lr}, **options)

    @staticmethod
    def scalars(hyper, scalar_states):
        return (hyper[0],), ()

    @staticmethod
    def reference(param, grad, states, scalars):
        param.sub_(scalars[0] * grad)
"""


def own_class(path: Path, rule: str) -> type[fusedopt.FusedOptimizer]:
    """The class whose `update` stands in a text, which imports what it needs and `FusedOptimizer`."""
    path.write_text(rule + CLASS)
    spec = spec_from_file_location(path.stem, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Own
