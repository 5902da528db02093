"""The source of a function, and what it uses: what decides how it is compiled."""

import ast
import inspect
import textwrap


def definition(function):
    """The syntax tree of a function, with the lines of its file."""
    source, line = inspect.getsourcelines(function)
    (tree,) = ast.parse(textwrap.dedent("".join(source))).body
    if getattr(tree, "name", None) != function.__name__:
        raise OSError(f"the source of {function.__name__} has changed since it was imported")
    return ast.increment_lineno(tree, line - 1)


def used(function):
    """The globals and nonlocals that a function names, sorted."""
    known = {**function.__globals__, **inspect.getclosurevars(function).nonlocals}
    names = {node.id for node in ast.walk(definition(function)) if isinstance(node, ast.Name)}
    return {name: known[name] for name in sorted(names & known.keys() - {function.__name__})}


def is_constant(parameter):
    """Whether a parameter is put in when the function is compiled: a name in capitals, or annotated as constexpr."""
    return parameter.arg.isupper() or (
        parameter.annotation is not None and "constexpr" in ast.unparse(parameter.annotation)
    )
