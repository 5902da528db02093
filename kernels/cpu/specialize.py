"""Makes what numba compiles of a device function of Triton's, or of this package: constants put in, calls resolved."""

import ast
import copy
import inspect
from types import FunctionType, ModuleType

import numba
from numba import njit

from . import language
from .memory import static_range
from .source import definition, is_constant, unwrapped, used

PACKAGE = __package__
OPTIONS = {
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "forceinline": True,
}
if numba.__version__.startswith("0.68."):  # other releases may lack what is named there, and compile a sixth longer
    from .parts import Part

    OPTIONS["pipeline_class"] = Part
BUILTINS = {"len": len, "range": range}
VALUES = (bool, int, float, str, tuple, type(None))
_shared = {}  # what kernels have in common, by function, constants and dtype of the arithmetic


def specialize(function, constants, compute, done):
    """A function as numba compiles it, with only those of its parameters that are no constants.

    Args:
        function: a plain one, whose source can be read.
        constants: values by their names. Functions among them are called by their names.
        compute: the dtype of the arithmetic, in numpy. Triton's functions have no other numbers: what they write down
            takes this dtype, or `2.0 * x` would be float64.
        done: functions that have been specialized for the same kernel.
    """
    tree = definition(function)
    names = {name: meaning(value) for name, value in used(function).items() if "." not in name}
    parameters = tree.args.args
    for parameter in parameters:
        names.pop(parameter.arg, None)
    names |= {name: meaning(value) for name, value in constants.items()} | {"COMPUTE": compute}
    # What is assigned somewhere is not the global of that name.
    assigned = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    known = {name: value for name, value in names.items() if name not in assigned}
    weak = function.__module__ == language.__name__ or not function.__module__.startswith(PACKAGE)
    tree.body = _Specializer(known, names, compute, weak, done).statements(tree.body)
    tree.decorator_list, tree.returns = [], None
    tree.args.args = [parameter for parameter in parameters if not is_constant(parameter, function)]
    tree.args.defaults = []
    for parameter in tree.args.args:
        parameter.annotation = None
    module = ast.fix_missing_locations(ast.Module([tree], []))
    exec(compile(module, inspect.getsourcefile(function), "exec"), names)
    return njit(**OPTIONS)(names[function.__name__])


def meaning(value):
    """What stands here for something that Triton's functions use."""
    if isinstance(value, ModuleType) and value.__name__.startswith("triton.language"):
        return language.LANGUAGE
    value = unwrapped(value)
    if isinstance(value, FunctionType):
        if value.__module__.startswith("triton."):
            return getattr(language.LANGUAGE, value.__name__)
        if value.__module__ == f"{PACKAGE.rpartition('.')[0]}.arithmetic":
            return language.ARITHMETIC.get(value.__name__, value)
    return value


class _Specializer(ast.NodeTransformer):
    """Does what Triton does with constexpr: puts values in, unrolls `static_range`, takes the branch that is known."""

    def __init__(self, known, names, compute, weak, done):
        self._known = known  # values by their names
        self._names = names  # of the function that is made
        self._compute = compute
        self._weak = weak  # whether numbers take the dtype of the arithmetic
        self._done = done

    def statements(self, nodes):
        """These statements, specialized."""
        visited = [self.visit(node) for node in nodes]
        lines = [line for node in visited for line in (node if isinstance(node, list) else [node]) if line is not None]
        return lines or [ast.Pass()]

    def visit(self, node):
        """Put a value in where it is known."""
        if isinstance(node, ast.expr) and isinstance(getattr(node, "ctx", None), ast.Load | None):
            is_known, value = self._evaluated(node)
            if is_known and isinstance(value, VALUES):
                return ast.copy_location(self._literal(value), node)
            if is_known and isinstance(node, ast.Name | ast.Attribute):
                return ast.copy_location(self._named(value), node)
        return super().visit(node)

    def visit_Subscript(self, node):
        """An index, and each end of a slice, stays the integer that it is."""
        node.value = self.visit(node.value)
        is_slice = isinstance(node.slice, ast.Slice)
        for owner, name in [(node.slice, end) for end in ("lower", "upper", "step")] if is_slice else [(node, "slice")]:
            if getattr(owner, name) is not None:
                is_known, index = self._evaluated(getattr(owner, name))
                setattr(owner, name, ast.Constant(index) if is_known else self.visit(getattr(owner, name)))
        return node

    def visit_Call(self, node):
        """Specialize what is called, if it is a device function."""
        is_known, function = self._evaluated(node.func)
        if is_known and _is_device_function(function):
            return ast.copy_location(self._call(function, node), node)
        return self.generic_visit(node)

    def visit_UnaryOp(self, node):
        """Triton's -x is 0 - x: that of 0.0 is 0.0."""
        if self._weak and isinstance(node.op, ast.USub):
            return self.visit(ast.copy_location(ast.BinOp(ast.Constant(0.0), ast.Sub(), node.operand), node))
        return self.generic_visit(node)

    def visit_BinOp(self, node):
        """Refuse what means something else in Python than in Triton."""
        if self._weak and isinstance(node.op, ast.Mod | ast.FloorDiv):
            raise NotImplementedError(f"{ast.unparse(node)!r} rounds otherwise on a CPU")
        return self.generic_visit(node)

    def visit_Assign(self, node):
        """What is assigned is not known any more."""
        node = self.generic_visit(node)
        for target in node.targets:
            for part in ast.walk(target):
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                    self._known.pop(part.id, None)
        return node

    def visit_AugAssign(self, node):
        """Numba adds no tuple in place."""
        target = ast.Name(node.target.id, ast.Load())
        assign = ast.Assign([node.target], ast.copy_location(ast.BinOp(target, node.op, node.value), node))
        return self.visit(ast.copy_location(assign, node))

    def visit_AnnAssign(self, node):
        """The value of a `tl.constexpr` is put in below."""
        if "constexpr" not in ast.unparse(node.annotation):
            node.annotation = ast.Constant(None)
            return self.generic_visit(node)
        self._known[node.target.id] = self._constant(node.value)
        return None

    def visit_If(self, node):
        """Leave out the branch that is not taken."""
        is_known, test = self._evaluated(node.test)
        if is_known:
            return self.statements(node.body if test else node.orelse)
        node.test = self.visit(node.test)
        node.body = self.statements(node.body)
        node.orelse = self.statements(node.orelse) if node.orelse else []
        return node

    def visit_IfExp(self, node):
        """As an `if`."""
        is_known, test = self._evaluated(node.test)
        return self.visit(node.body if test else node.orelse) if is_known else self.generic_visit(node)

    def visit_For(self, node):
        """Unroll a `static_range`, and every range of Triton's, whose numbers would be integers."""
        function = self._evaluated(node.iter.func)[1] if isinstance(node.iter, ast.Call) else None
        if self._weak or function is static_range:
            if function not in (static_range, range):
                raise NotImplementedError(f"a loop over {ast.unparse(node.iter)!r} is not known on a CPU")
            lines = []
            for i in range(*map(self._constant, node.iter.args)):
                self._known[node.target.id] = i
                lines += self.statements(copy.deepcopy(node.body))
            last = self._known.pop(node.target.id, None)  # behind the loop it is a variable, as a branch may have it
            if last is not None:
                lines.append(ast.copy_location(ast.Assign([node.target], self._literal(last)), node))
            return lines
        node.iter = self.visit(node.iter)
        node.body = self.statements(node.body)
        return node

    def visit_Expr(self, node):
        """Check a `static_assert`."""
        if isinstance(node.value, ast.Call) and self._evaluated(node.value.func) == (True, language.static_assert):
            test, *message = map(self._constant, node.value.args)
            if not test:
                raise TypeError(*message)
            return None
        return self.generic_visit(node)

    def _evaluated(self, node):
        """(whether the value of an expression is known, the value)."""
        if isinstance(node, ast.Constant):
            return True, node.value
        if isinstance(node, ast.Name) and node.id in self._known:
            return True, meaning(self._known[node.id])
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and part.id not in self._known and part.id not in BUILTINS:
                return False, None
            if isinstance(part, ast.Call) and not (isinstance(part.func, ast.Name) and part.func.id == "len"):
                return False, None
        code = compile(ast.fix_missing_locations(ast.Expression(copy.deepcopy(node))), "", "eval")
        return True, meaning(eval(code, {"__builtins__": BUILTINS}, self._known))

    def _constant(self, node):
        is_known, value = self._evaluated(node)
        if not is_known:
            raise TypeError(f"{ast.unparse(node)} must be known when the kernel is compiled")
        return value

    def _literal(self, value):
        if isinstance(value, tuple):
            return ast.Tuple([self._literal(item) for item in value], ast.Load())
        if isinstance(value, float):
            value = float(value)  # and not one of numpy's
        if self._weak and type(value) in (int, float):
            return ast.Call(ast.Name("COMPUTE", ast.Load()), [ast.Constant(value)], [])
        return ast.Constant(value)

    def _named(self, value):
        name = f"known_{id(value)}"
        self._names[name] = value
        return ast.Name(name, ast.Load())

    def _call(self, function, node):
        parameters = definition(function).args.args
        bound = inspect.signature(function).bind(
            *node.args, **{keyword.arg: keyword.value for keyword in node.keywords}
        )
        bound.apply_defaults()
        constants, arguments = {}, []
        for parameter in parameters:
            argument = bound.arguments[parameter.arg]
            if is_constant(parameter, function):
                constants[parameter.arg] = self._constant(argument) if isinstance(argument, ast.expr) else argument
            else:
                arguments.append(self.visit(argument) if isinstance(argument, ast.expr) else self._literal(argument))
        kind = function, repr(constants), self._compute  # in which True is not 1
        done = _shared if _is_shared(function, constants) else self._done
        if kind not in done:
            done[kind] = specialize(function, constants, self._compute, self._done)
        return ast.Call(self._named(done[kind]), arguments, [])


def _is_shared(function, constants):
    """Whether no kernel can make anything else of a function: of a user, it may name what has changed since."""
    is_own = function.__module__.startswith(f"{PACKAGE.rpartition('.')[0]}.")
    return is_own and all(map(_is_plain, constants.values()))


def _is_plain(value):
    return all(map(_is_plain, value)) if isinstance(value, tuple) else isinstance(value, VALUES)


def _is_device_function(value):
    return isinstance(value, FunctionType) and value is not static_range
