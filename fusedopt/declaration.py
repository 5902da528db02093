"""Is an optimizer declared as `FusedOptimizer` asks? Said before it steps, with the name of its class."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from .options import DEFAULTS, KEYS
from .protocol import OptimizerLike
from .step.hyper import count_numbers, count_scalars
from .storage.averaging import EMA_BEGUN
from .storage.states import ADDED

DECLARED = ("kernel", "hyperparameters")
EQUATIONS = ("scalars", "reference")


def check_declaration(optimizer: type[OptimizerLike], base: type[OptimizerLike], defaults: dict[str, Any]) -> None:
    """Raise TypeError for what a class lacks, or where its parts disagree on how many numbers they exchange.

    Args:
        optimizer: the class.
        base: the class that says what there is to declare.
        defaults: of its param groups.
    """
    name = optimizer.__name__
    for attribute in DECLARED:
        if not hasattr(optimizer, attribute):
            raise TypeError(f"{name} must declare `{attribute}`, see FusedOptimizer")
    for equation in EQUATIONS:
        if getattr(optimizer, equation) is getattr(base, equation):
            raise TypeError(f"{name} must define `{equation}`, see FusedOptimizer")
    for key in (*optimizer.hyperparameters, *optimizer.options):
        if key not in defaults:
            raise TypeError(f"{name} declares {key!r}, but its defaults have no such key")
    for key in (*DEFAULTS, *KEYS.values(), "backend"):
        if key in defaults:
            raise TypeError(f"{name} has a default for {key!r}, which is an option of every FusedOptimizer")
    for state in (*optimizer.scalar_states, *optimizer.states):
        if state in (*ADDED, EMA_BEGUN):
            raise TypeError(f"{name} declares the state {state!r}, which every FusedOptimizer may have")
    for key in optimizer.choices:
        if key not in optimizer.hyperparameters:
            raise TypeError(f"`choices` of {name} names {key!r}, which is none of its hyperparameters")
    for state in optimizer.nonnegative:
        if state not in optimizer.states:
            raise TypeError(f"`nonnegative` of {name} names {state!r}, which is none of its states")
    for flag, state in optimizer.begun.items():
        if flag not in optimizer.scalar_states or state not in optimizer.states:
            raise TypeError(f"`begun` of {name} must name one of its scalar states and one of its states")
    values = {**defaults, **optimizer.optional}
    n_scalars = count_scalars(optimizer, count_numbers(values[key] for key in optimizer.hyperparameters))
    if isinstance(optimizer.kernel, str):
        return
    if not (isinstance(optimizer.kernel, tuple) and len(optimizer.kernel) == 2):
        raise TypeError(f"`kernel` of {name} must be the name of a module, or the two functions (scalars, update)")
    scalars, update = optimizer.kernel
    counts = {"scalars": n_scalars, "scalar states": len(optimizer.scalar_states)}
    _check_returns(name, scalars, counts)
    _check_returns(name, update, {"param": None, "states": len(optimizer.states)})


def argument_defaults(optimizer: type[OptimizerLike]) -> dict[str, Any]:
    """The defaults of a class's arguments that all of its param groups have as keys: what an old pickle lacks."""
    keys = {*optimizer.hyperparameters, *optimizer.options, "foreach", "capturable", "differentiable"}
    keys -= set(optimizer.optional)
    defaults: dict[str, Any] = {}
    for cls in reversed(optimizer.__mro__):
        arguments = inspect.signature(vars(cls)["__init__"]).parameters if "__init__" in vars(cls) else {}
        defaults.update({name: argument.default for name, argument in arguments.items() if name in keys})
    return {name: default for name, default in defaults.items() if default is not inspect.Parameter.empty}


def _check_returns(name: str, function: Any, counts: Mapping[str, int | None]) -> None:
    """Compare the tuples that a device function returns, as its source writes them, with what is expected."""
    for returned in _returns(function.fn):
        if not isinstance(returned, ast.Tuple):
            continue
        if len(returned.elts) != len(counts):
            raise TypeError(f"the kernel `{function.fn.__name__}` of {name} must return ({', '.join(counts)})")
        for element, (what, count) in zip(returned.elts, counts.items(), strict=True):
            if count is not None and isinstance(element, ast.Tuple) and len(element.elts) != count:
                raise TypeError(
                    f"the kernel `{function.fn.__name__}` of {name} returns {len(element.elts)} {what}, "
                    f"but the class has {count}"
                )


def _returns(function: Callable[..., Any]) -> list[ast.expr]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value is not None]
