"""The source of a function, and what it uses: what decides how it is compiled."""

import ast
import inspect
import textwrap
from types import ModuleType


def definition(function):
    """The syntax tree of a function, with the lines of its file."""
    source, line = inspect.getsourcelines(function)
    (tree,) = ast.parse(textwrap.dedent("".join(source))).body
    if getattr(tree, "name", None) != function.__name__:
        raise OSError(f"the source of {function.__name__} has changed since it was imported")
    return ast.increment_lineno(tree, line - 1)


def used(function):
    """The globals and nonlocals that a function names, and what it takes from modules, by their sorted names."""
    known = {**function.__globals__, **inspect.getclosurevars(function).nonlocals}
    found = {}
    for node in ast.walk(definition(function)):
        name = ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""
        first, *others = name.split(".")
        if first not in known or first == function.__name__:
            continue
        value = known[first]
        for attribute in others:
            is_own = isinstance(value, ModuleType) and not value.__name__.startswith("triton")
            value = getattr(value, attribute, None) if is_own else None
        if value is not None:
            found[name] = value
    return dict(sorted(found.items()))


def is_constant(parameter):
    """Whether a parameter is put in when the function is compiled: a name in capitals, or annotated as constexpr."""
    return parameter.arg.isupper() or (
        parameter.annotation is not None and "constexpr" in ast.unparse(parameter.annotation)
    )
