"""Triton's kernels without Triton's dispatch: what the first launch of a signature compiles, the next ones start."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

from triton import knobs
from triton.runtime import JITFunction, driver

from .compiled import Launch, as_numbers

# All names in `JITFunction.run` of Triton 3.6 to 3.9. One that looks at more is not imitated.
KNOWN_NAMES = frozenset(
    """
    RuntimeError _do_compile _pack_args active add_stages_inspection_hook append callable compilation compute_cache_key
    debug device_caches driver fpsan_homomorphic_casts function get get_current_device get_current_stream hasattr
    instrumentation_mode items knobs launch_enter_hook launch_exit_hook launch_metadata len object packed_metadata
    pre_run_hooks result run runtime used_global_vals values
    """.split()  # noqa: SIM905
)

Answers = tuple[Any, ...]


class Direct(NamedTuple):
    """A launch without Triton's dispatch."""

    answers: Answers  # with which it may be used
    start: Callable[[int, list[int]], None]  # given the number of programs and all arguments but the compile-time ones
    compiled: Any  # kept alive: it owns the code


class TritonKernel:
    """One of Triton's kernels with its compile-time arguments, on one device, which is current at every launch.

    Triton's own launch binds and specializes every argument, and makes a key of them, before it finds what it has
    compiled long since. Here later launches give that to Triton's launcher themselves, with addresses in place of
    tensors, for as long as all that the dispatch looks at is what it was. Where something is to be called at a launch,
    or something is unknown, Triton launches as ever.

    Args:
        kernel: what `triton.jit` returned. Only one that specializes on nothing of the arguments that come with a
            launch, but the dtypes of tensors, is launched directly.
        options: its compile-time arguments, and what else Triton is told.
        launch: launches it by Triton, given how many programs, the arguments and the options; returns what that did.
    """

    def __init__(self, kernel: Any, options: dict[str, Any], launch: Callable[..., Any]) -> None:
        self._kernel, self._options, self._launch = kernel, options, launch

    def bound(self, programs: int, elements: int, *args: Any) -> Launch:
        """A launch, as `Kernel` has it."""
        kernel, options = self._kernel, self._options
        numbers = as_numbers(args)
        direct: dict[tuple[Any, ...], Direct] = {}  # by the dtypes of the last arguments

        def launch(*lasts: Any) -> None:
            dtypes = tuple([arg.dtype for arg in lasts if type(arg) is not int]) if lasts else ()
            known = direct.get(dtypes)
            if known is not None and known.answers == answers(kernel):
                known.start(programs, numbers + as_numbers(lasts) if lasts else numbers)
                return
            direct.pop(dtypes, None)
            compiled = self._launch(kernel, programs, *args, *lasts, **options)
            known = _direct(kernel, compiled, len(args), len(args) + len(lasts), options)
            if known is not None:
                direct[dtypes] = known

        return launch


def _names() -> tuple[str, ...]:
    """All names in the code of Triton's own launch."""
    code = getattr(JITFunction.run, "__code__", None)
    return ("what is no function of Python's",) if code is None else code.co_names


# What a profiler is called by, then what a launch looks at in every version, then what it does in some.
_settings = attrgetter(
    "runtime.launch_enter_hook.calls",
    "runtime.launch_exit_hook.calls",
    "runtime.debug",
    "compilation.instrumentation_mode",
    *(["runtime.add_stages_inspection_hook"] if "add_stages_inspection_hook" in _names() else []),
    *(["compilation.fpsan_homomorphic_casts"] if "fpsan_homomorphic_casts" in _names() else []),
)


def answers(kernel: Any) -> Answers:
    """All that Triton looks at in a launch beside the arguments; nothing where that is not to be found."""
    try:
        used = kernel.used_global_vals
        values = [names.get(name) for (name, _), (_, names) in used.items()] if used else []
        return _settings(knobs), kernel.pre_run_hooks, values, kernel.debug, JITFunction.run, driver.active
    except AttributeError:
        return ()


def _is_never_specialized_on(param: Any) -> bool:
    return bool(param.do_not_specialize or param.do_not_specialize_on_alignment)


def _direct(kernel: Any, compiled: Any, n_bound: int, n_args: int, options: dict[str, Any]) -> Direct | None:
    """How `JITFunction.run` starts what it has just compiled, or found.

    None where something is unknown, to be called at every launch, or specialized on.
    """
    if type(kernel) is not JITFunction or not KNOWN_NAMES.issuperset(_names()):
        return None
    try:
        if not all(map(_is_never_specialized_on, kernel.params[n_bound:n_args])):
            return None
        (enter_hooks, exit_hooks, *others), pre_run_hooks, *more = answers(kernel)
        stages_hook = getattr(knobs.runtime, "add_stages_inspection_hook", None)
        if enter_hooks or exit_hooks or pre_run_hooks or stages_hook is not None:
            return None
        get_current_stream, device = driver.active.get_current_stream, driver.active.get_current_device()
        run, function, packed = compiled.run, compiled.function, compiled.packed_metadata
        unread = [options[name] for name in kernel.arg_names[n_args:]]
    except (ValueError, AttributeError, KeyError):
        return None

    def start(programs: int, numbers: list[int]) -> None:
        run(programs, 1, 1, get_current_stream(device), function, packed, None, None, None, *numbers, *unread)

    # Hooks are put into the very lists that were empty.
    return Direct((([], [], *others), [], *more), start, compiled)
