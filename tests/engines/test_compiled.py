"""The engine that compiles kernels for the CPU: when it is chosen, threads, rules that it refuses."""

from __future__ import annotations

import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

import fusedopt
from fusedopt.engines import choice, compiled, threads
from tests.engines.compiling import run, runs, stepped
from tests.twins import bits, make_params, snapshot, train

pytest.importorskip("numba")


# Who steps.


@pytest.mark.parametrize(
    ("options", "expected"), [({}, "compiled"), ({"fused": False}, "eager"), ({"backend": "eager"}, "eager")], ids=str
)
def test_a_cpu_takes_what_is_compiled_for_it(options, expected):
    optimizer = fusedopt.AdamW(make_params(), **options)
    assert runs(optimizer) == f"backend: {expected} ({options.get('backend', 'auto')!r} asked for)"
    train(optimizer, range(1))
    assert optimizer._stepper.engines(optimizer) == {expected}


def test_without_numba_the_reference_steps_and_repr_says_what_would_be_faster(monkeypatch):
    for module in (choice, fusedopt.optimizer):
        monkeypatch.setattr(module, "numba_is_installed", lambda: False)
    optimizer = fusedopt.AdamW(make_params())
    hint = "pip install fusedopt[cpu] makes steps on a CPU faster"
    assert runs(optimizer) == f"backend: eager; {hint} ('auto' asked for)"
    assert hint not in repr(fusedopt.AdamW(make_params(), backend="eager"))
    with pytest.raises(RuntimeError, match=re.escape("backend='compiled' needs numba (pip install fusedopt[cpu])")):
        fusedopt.AdamW(make_params(), backend="compiled")


REFUSED = {
    "it is on meta": torch.zeros(3, device="meta"),
    "it is torch.sparse_coo": torch.eye(3).to_sparse(),
    "the kernels do not know its dtype, torch.float8_e5m2": torch.zeros(3).to(torch.float8_e5m2),
}


@pytest.mark.parametrize("why", REFUSED)
def test_who_insists_is_told_what_cannot_be(why):
    with pytest.raises(ValueError, match=f"backend='compiled' cannot step parameter 0 of group 0: {why}"):
        fusedopt.SGD([REFUSED[why]], backend="compiled")


def test_compiled_and_no_kernels_contradict_each_other():
    with pytest.raises(ValueError, match="fused=False asks for the reference, backend='compiled' for kernels"):
        fusedopt.Adam(make_params(), fused=False, backend="compiled")


# Fake tensors.


@pytest.mark.parametrize("steps_before", [0, 1])
def test_real_parameters_in_fake_tensor_mode_are_left_to_the_reference(steps_before):
    """The states that a step makes there have no memory that a kernel could write."""
    params = [Parameter(torch.ones(5)) for _ in range(2)]
    mine = fusedopt.SGD(params[:1], lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD(params[1:], lr=0.1, momentum=0.9, foreach=False)
    for param, optimizer in zip(params, (mine, theirs), strict=True):
        param.grad = torch.ones(5)
        for _ in range(steps_before):
            optimizer.step()
        with FakeTensorMode(allow_non_fake_inputs=True):
            optimizer.step()
    torch.testing.assert_close(*params)
    insisting = fusedopt.Adam(params[:1], backend="compiled")
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(RuntimeError, match="cannot step parameter 0 of group 0 in FakeTensorMode"),
    ):
        insisting.step()


# Rules that cannot be compiled.

IMPOSSIBLE = {
    "it uses namespace.*, of which nobody can tell whether it has changed": "return param - OBJECT.three * grad, ()",
    "tl.umulhi is not known on a CPU": "return param - tl.umulhi(grad, grad), ()",
    "the rule returns 1 states, but its class has 0": "result = param - grad, (grad,)\n    return result",
}


@pytest.mark.parametrize("why", IMPOSSIBLE)
def test_a_rule_that_cannot_be_compiled_is_left_to_its_reference(own, why, recwarn):
    cls = own(update=IMPOSSIBLE[why])
    with pytest.warns(RuntimeWarning, match=f"Own cannot be compiled for the CPU, .*{why}"):
        first = stepped(cls)
    recwarn.clear()
    assert stepped(cls) == first == stepped(cls, backend="eager")
    assert not recwarn.list
    assert runs(cls(make_params())) == "backend: eager ('auto' asked for)"


@pytest.mark.parametrize("why", IMPOSSIBLE)
def test_who_insists_on_such_a_rule_gets_an_error_before_anything_is_written(own, why):
    param = Parameter(torch.arange(5.0))
    optimizer = own(update=IMPOSSIBLE[why])([param], backend="compiled", max_grad_norm=1.0)
    param.grad = torch.ones(5)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=why):
        optimizer.step()
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("backend", ["auto", "compiled"])
def test_what_turns_out_later_is_no_half_step(backend, monkeypatch):
    """GradScaler's steps take another kernel, which a plan that holds has not."""
    params = make_params(torch.float32)
    optimizer = type("Mine", (fusedopt.Adam,), {})(params, backend=backend)
    train(optimizer, range(1))
    before = snapshot(optimizer)

    def fail(name, constants):
        raise ValueError("no more")

    monkeypatch.setattr(compiled, "_address", fail)
    compiled._kernel.cache_clear()
    monkeypatch.setattr("fusedopt.plan.DEBUG", False)
    optimizer.grad_scale = torch.tensor(2.0)
    if backend == "compiled":
        with pytest.raises(RuntimeError, match="no more"):
            optimizer.step()
        assert snapshot(optimizer) == before
    else:
        with pytest.warns(RuntimeWarning, match="Mine cannot be compiled for the CPU"):
            optimizer.step()
        assert snapshot(optimizer) != before
    compiled._kernel.cache_clear()


def test_states_that_a_refused_step_has_made_are_gone(monkeypatch):
    def fail(name, constants):
        raise ValueError("not today")

    monkeypatch.setattr(compiled, "_address", fail)
    compiled._kernel.cache_clear()
    optimizer = fusedopt.Adam(make_params(), backend="compiled")
    with pytest.raises(RuntimeError, match="not today"):
        train(optimizer, range(1))
    assert not optimizer.state
    compiled._kernel.cache_clear()


@pytest.mark.parametrize("name", ["numba", "llvmlite"])
def test_something_else_in_place_of_the_compiler(name):
    code = f"""
        import sys, types
        sys.modules[{name!r}] = types.ModuleType({name!r})
        import warnings, torch, fusedopt
        warnings.simplefilter("ignore")
        param = torch.nn.Parameter(torch.ones(4))
        param.grad = torch.ones(4)
        optimizer = fusedopt.SGD([param], lr=0.5)
        optimizer.step()
        print(param.tolist() == [0.5] * 4)
    """
    assert run(code) == ["True"]


def test_a_symbol_that_is_nowhere_does_not_end_the_process(cache, monkeypatch):
    import llvmlite.binding as llvm

    compiled._linker()
    module = llvm.parse_assembly("declare void @nowhere()\ndefine void @f(i64 %x) { call void @nowhere()\n ret void }")
    code = llvm.Target.from_default_triple().create_target_machine().emit_object(module)
    with pytest.raises(RuntimeError, match="symbol"):
        compiled._linked("f", code)


# Threads.


def trained(threads=1, size=200_000, **options):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(0)
        params = [Parameter(torch.randn(n, generator=generator).bfloat16()) for n in (size, 3, size // 2 + 1)]
        optimizer = fusedopt.AdamW(params, rounding="stochastic", ema_decay=0.9, max_grad_norm=0.5, **options)
        for _ in range(2):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).bfloat16()
            optimizer.step()
    finally:
        torch.set_num_threads(before)
    return snapshot(optimizer)["params"], bits(optimizer.grad_norm)


def test_bits_do_not_depend_on_the_number_of_threads():
    expected = trained(1)
    for count in (2, 3, 7):
        assert trained(count) == expected


def test_large_work_takes_the_threads_of_torch_and_small_work_none(monkeypatch):
    asked = []
    monkeypatch.setattr(threads, "_parallel", lambda: lambda *args: asked.append(args))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    called = []
    threads.run(called.append, 1, 2, threads.GRAIN - 1)
    assert (asked, called) == ([], [2])
    threads.run(called.append, 1, 2, threads.GRAIN)
    assert (asked, called) == ([(1, 2, 5, 0)], [2])
    monkeypatch.setattr(threads, "_parallel", lambda: None)
    threads.run(called.append, 1, 3, threads.GRAIN)
    assert called == [2, 3]


def test_torch_has_threads_to_lend():
    if sys.platform.startswith("linux"):
        assert threads._parallel() is not None


def test_models_may_step_at_the_same_time():
    expected = trained(2)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(trained, [2] * 8)) == [expected] * 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_of_a_process_that_has_computed_steps_alone():
    """Where OpenMP's threads are missing, and whoever waited for them would never return."""
    code = """
        import os, torch, fusedopt
        torch.set_num_threads(2)
        param = torch.nn.Parameter(torch.ones(100_000))  # by torch's threads, for which the child would wait too
        param.grad = torch.ones(100_000)
        optimizer = fusedopt.SGD([param], lr=0.25)
        optimizer.step()
        child = os.fork()
        if child == 0:
            optimizer.step()
            os._exit(0 if (param[0], param[-1]) == (0.5, 0.5) else 1)
        print(os.waitpid(child, 0)[1])
    """
    assert run(code) == ["0"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_data_loader_workers_may_step():
    code = """
        import torch, fusedopt
        torch.set_num_threads(2)
        def step(size):
            param = torch.nn.Parameter(torch.ones(size))
            param.grad = torch.ones(size)
            fusedopt.SGD([param], lr=0.5).step()
            return param.detach().sum()
        step(100_000)
        class Steps(torch.utils.data.Dataset):
            def __len__(self): return 4
            def __getitem__(self, i): return step(100_000)
        loader = torch.utils.data.DataLoader(Steps(), num_workers=2, multiprocessing_context="fork")
        print(sum(map(float, loader)))
    """
    assert run(code) == ["200000.0"]
