"""Compiles functions that are parts of others. Numba would make machine code of each that nobody calls."""

from numba import _dynfunc
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler


class Part(Compiler):
    """Ends with a module of LLVM, optimized, to be linked into those of its callers."""

    def __init__(self, typing, target, library, *args):
        super().__init__(typing, target, library, *args)
        self.state.targetctx = self.state.targetctx.subtarget(get_executable=_named)
        self.state.library = _Library(target.codegen(), "part")


class _Library(JITCodeLibrary):
    def _finalize_final_module(self):
        self._finalized = True


def _named(library, function, env):
    """What stands for a compiled function where its callers look it up."""
    return _dynfunc.make_function(function.lookup_module(), function.qualname, "", 0, env, (library,))
