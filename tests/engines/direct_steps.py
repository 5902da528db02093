"""Steps whose kernels are compiled for a GPU that is not there, and launched as far as the driver.

Runs in a process without TRITON_INTERPRET, above a launcher in Python that writes down what it is given. Prints as
JSON, for every case, what went wrong, once as fusedopt is, and once with launches that are kept whatever happens.
"""

import json
from contextlib import contextmanager
from functools import cache

import pytest
import torch
import triton
from triton import knobs
from triton.runtime import JITFunction

import fusedopt
from bench.host_time import driver as drivers
from fusedopt.engines import direct, tables
from fusedopt.kernels import multi_tensor

CASES = {}
CLIPPED = {"max_grad_norm": 1.0}
AVERAGED = {"skip_nonfinite": True, "ema_decay": 0.9}


class Recorder:
    """In place of Triton's launcher: what reached it, and how many launches were Triton's own."""

    by_triton = 0

    def __init__(self, src, metadata):
        self._names = src.fn.arg_names
        self._constants = {self._names[path[0]] for path in src.constants}
        self._kernel = src.fn.__name__

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, exit, *args):
        if enter is not None:
            enter(metadata)
        given = {
            name: arg.data_ptr() if isinstance(arg, torch.Tensor) else arg
            for name, arg in zip(self._names, args, strict=True)
            if name not in self._constants
        }
        Recorder.launches.append((self._kernel, (x, y, z), stream, function, packed, given))
        if exit is not None:
            exit(metadata)


Recorder.launches = []


class Driver(drivers.Driver):
    def __init__(self):
        super().__init__(library=None)
        self.launcher_cls = Recorder
        self.stream = 7
        self.get_current_stream = lambda device: self.stream


def ordinary(*args, launch=tables.launch, **options):
    Recorder.by_triton += 1
    return launch(*args, **options)


tables.launch = ordinary


def make(name="AdamW", dtype=torch.float32, sizes=(5, 300), **options):
    params = [torch.nn.Parameter(torch.ones(size, dtype=dtype)) for size in sizes]
    for param in params:
        param.grad = torch.ones_like(param)
    return getattr(fusedopt, name)(params, backend="triton", **options)


def launches_of(optimizer):
    """What one step gives to the launcher, and how many launches of it Triton makes itself."""
    Recorder.launches, Recorder.by_triton = [], 0
    optimizer.step()
    return Recorder.launches, Recorder.by_triton


def settled(*args, **options):
    """An optimizer whose launches are direct."""
    optimizer = make(*args, **options)
    optimizer.step()
    _, by_triton = launches_of(optimizer)
    assert by_triton == 0, "the second step is not direct"
    return optimizer


def case(function):
    CASES[function.__name__] = function
    return function


@contextmanager
def changed(owner, name, value):
    before = vars(owner).get(name, unset := object())
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if before is unset else setattr(owner, name, before)


def assert_noticed(optimizer, comes_back=True):
    launches, by_triton = launches_of(optimizer)
    assert by_triton == len(launches) == 2, f"{len(launches) - by_triton} of {len(launches)} launches are stale"
    if comes_back:
        assert launches_of(optimizer)[1] == 0, "not direct again"


@case
def every_argument_is_what_triton_gives():
    """In the plain, the clipped, the scaled and the rounded step, at any address of what comes with it."""
    steps = [("AdamW", options) for options in ({}, CLIPPED, AVERAGED)]
    steps += [("SGD", {"rounding": "stochastic"}), ("RAdam", CLIPPED)]  # other numbers of states and of scalars
    for name, options in steps:
        for found_inf in (None, torch.zeros(4)[1], torch.zeros(())):
            optimizer = settled(name, torch.bfloat16, **options)
            if found_inf is not None:
                optimizer.found_inf, optimizer.grad_scale = found_inf, torch.ones(9)[3]
                launches_of(optimizer)
            launches, by_triton = launches_of(optimizer)
            assert by_triton == 0, f"{name} {options} is not direct"
            with changed(direct, "answers", lambda kernel: ()):
                expected, by_triton = launches_of(optimizer)
            assert by_triton == len(expected) == len(launches) == 2 + (options in (CLIPPED, AVERAGED))
            for ours, theirs in zip(launches, expected, strict=True):
                *ours, args = ours
                *theirs, others = theirs
                assert ours == theirs, f"{ours} for {theirs}"
                new = {"grad_norm_ptr"} if args.get("n_partials") else set()  # every step has one of its own
                assert {k: v for k, v in args.items() if k not in new} == {
                    k: v for k, v in others.items() if k not in new
                }
                assert new <= args.keys()


@case
def numbers_and_gradients_change():
    optimizer = settled()
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 0.1 * step
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
        assert launches_of(optimizer)[1] == 0, "compiled or launched anew"


@case
def another_stream():
    optimizer = settled()
    triton.runtime.driver.active.stream = 8
    launches, by_triton = launches_of(optimizer)
    triton.runtime.driver.active.stream = 7
    assert by_triton == 0
    assert {stream for _, _, stream, *_ in launches} == {8}, "on another stream"


@case
def hooks_of_a_profiler():
    optimizer = settled()
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        told = []
        chain.add(hook := lambda metadata, told=told: told.append(metadata.get()["name"]))
        for _ in range(2):
            assert_noticed(optimizer, comes_back=False)
        chain.remove(hook)
        assert [name.startswith("fusedopt_") for name in told] == [True] * 4, f"the hook was called for {told}"
        launches_of(optimizer)
        assert launches_of(optimizer)[1] == 0, "not direct again"


@case
def a_function_in_place_of_the_hooks():
    optimizer, told = settled(), []
    with changed(knobs.runtime, "launch_enter_hook", lambda metadata: told.append(metadata)):
        assert_noticed(optimizer, comes_back=False)
    assert len(told) == 2


@case
def hook_before_a_run():
    optimizer = settled()
    for kernel in (multi_tensor.prepare, multi_tensor.update):
        kernel.add_pre_run_hook(print_nothing)
    assert_noticed(optimizer, comes_back=False)
    for kernel in (multi_tensor.prepare, multi_tensor.update):
        kernel.pre_run_hooks.clear()


def print_nothing(*args, **options):
    pass


@case
def hook_that_inspects_stages():
    if "add_stages_inspection_hook" not in JITFunction.run.__code__.co_names:
        return
    optimizer, asked = settled(), []

    def hook(*args):
        if not args:
            asked.append(1)
            return "key", "hash"

    with changed(knobs.runtime, "add_stages_inspection_hook", hook):
        assert_noticed(optimizer, comes_back=False)
        assert_noticed(optimizer, comes_back=False)
    assert len(asked) >= 4


@case
def debug():
    optimizer = settled()
    with changed(knobs.runtime, "debug", True):
        assert_noticed(optimizer)


@case
def debug_of_a_kernel():
    optimizer = settled()
    with changed(multi_tensor.update, "debug", True), changed(multi_tensor.prepare, "debug", True):
        assert_noticed(optimizer)


@case
def instrumentation():
    optimizer = settled()
    with changed(knobs.compilation, "instrumentation_mode", "none that is known"):
        assert_noticed(optimizer)


@case
def another_driver():
    optimizer = settled()
    before = triton.runtime.driver.active
    triton.runtime.driver.set_active(Driver())
    assert_noticed(optimizer)
    triton.runtime.driver.set_active(before)


@case
def another_dispatch():
    """Somebody has put a function around `JITFunction.run`."""
    optimizer = settled()

    def run(self, *args, inner=JITFunction.run, **options):
        return inner(self, *args, **options)

    with changed(JITFunction, "run", run):
        assert_noticed(optimizer)


@case
def a_dispatch_that_asks_more():
    """Another version of Triton, which looks at something that nobody here has heard of."""

    def run(self, *args, inner=JITFunction.run, **options):
        knobs.compilation.is_unheard_of = True
        return inner(self, *args, **options)

    with changed(JITFunction, "run", run):
        optimizer = make()
        for _ in range(3):
            assert_noticed(optimizer, comes_back=False)


@case
def a_constant_of_a_kernel():
    """Triton refuses a kernel whose globals have changed since it was compiled."""
    optimizer = settled()
    names = vars(fusedopt.kernels.rounding)
    before = names["INTERPRET"]
    names["INTERPRET"] = triton.language.constexpr(2)
    try:
        with pytest.raises(RuntimeError, match="INTERPRET has changed"):
            optimizer.step()
    finally:
        names["INTERPRET"] = before


@case
def other_dtypes_later():
    """A gradient of another dtype has kernels, and launches, of its own."""
    optimizer = settled(dtype=torch.bfloat16)
    for param in optimizer.param_groups[0]["params"]:
        param.grad = None
        param.grad_dtype = None
        param.grad = torch.ones(param.shape)
    launches, by_triton = launches_of(optimizer)
    assert by_triton == len(launches)


def main():
    told = {}
    with drivers.driven(Driver()):
        every = direct.answers
        for version in ("fusedopt", "kept for ever"):
            if version == "kept for ever":
                direct.answers = cache(lambda kernel: copied(every(kernel)))
            told[version] = {name: problem(check) for name, check in CASES.items()}
    print(json.dumps(told))


def copied(value):
    """With the lists as they are now."""
    return type(value)(map(copied, value)) if isinstance(value, (tuple, list)) else value


def problem(check):
    try:
        check()
    except (Exception, pytest.fail.Exception) as error:
        return f"{type(error).__name__}: {error}"
    return None


if __name__ == "__main__":
    main()
