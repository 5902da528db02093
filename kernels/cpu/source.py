"""The source of a function, and what it uses: what decides how it is compiled."""

import ast
import inspect
import textwrap
from functools import cache
from types import ModuleType


@cache
def text(function):
    """The source of a function, and the first line of it in its file. A later change of the file changes nothing."""
    lines, first = inspect.getsourcelines(function)
    source = textwrap.dedent("".join(lines))
    if [getattr(node, "name", None) for node in ast.parse(source).body] != [function.__name__]:
        raise OSError(f"the file of {function.__name__} has changed since it was imported")
    return source, first


def definition(function):
    """The syntax tree of a function, with the lines of its file."""
    source, first = text(function)
    return ast.increment_lineno(ast.parse(source).body[0], first - 1)


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


def unwrapped(value):
    """A device function of Triton's as the one of Python's that it is made of, a constexpr as its value."""
    if type(value).__name__ == "constexpr":
        value = value.value
    return value if isinstance(value, ModuleType) else getattr(value, "fn", value)


def is_constant(parameter, function):
    """Whether a parameter is put in when a function is compiled: annotated as constexpr, here also in capitals."""
    is_own = function.__module__.startswith(__package__)
    annotation = "" if parameter.annotation is None else ast.unparse(parameter.annotation)
    return "constexpr" in annotation or (is_own and parameter.arg.isupper())
