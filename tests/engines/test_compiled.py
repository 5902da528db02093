"""The engine that compiles kernels for the CPU: when it is chosen, what it keeps, threads, rules that it refuses."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

import fusedopt
from fusedopt.engines import choice, code_cache, compiled, threads
from tests.own_rule import own_class
from tests.twins import bits, make_params, snapshot, train

pytest.importorskip("numba")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for compiled kernels, in a process that has none."""
    monkeypatch.setenv(code_cache.VARIABLE, str(tmp_path / "cache"))
    compiled._kernel.cache_clear()
    yield tmp_path / "cache"
    compiled._kernel.cache_clear()


@pytest.fixture
def builds(monkeypatch):
    """The kernels that have been compiled, by their names."""
    from fusedopt.kernels.cpu import build

    names, object_code = [], build.object_code
    monkeypatch.setattr(build, "object_code", lambda name, *args: names.append(name) or object_code(name, *args))
    return names


def stepped(cls=fusedopt.Adam, backend="auto", **options):
    param = Parameter(torch.arange(5.0))
    optimizer = cls([param], backend=backend, **options)
    param.grad = torch.linspace(-1, 1, 5)
    optimizer.step()
    return bits(param)


def runs(optimizer):
    return repr(optimizer).splitlines()[1]


def run(code, **environment):
    """What a process of its own prints."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "FUSEDOPT_DEBUG")}
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=60,
        env={**inherited, **environment},
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split()


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


# Compiling, and what is kept.


def test_importing_takes_no_compiler_and_a_second_process_none_either(tmp_path):
    code = """
        import sys, torch, fusedopt
        print("numba" in sys.modules, "llvmlite" in sys.modules)
        param = torch.nn.Parameter(torch.ones(4))
        param.grad = torch.ones(4)
        fusedopt.AdamW([param], max_grad_norm=1.0).step()
        print("numba" in sys.modules, "triton.runtime" in sys.modules and False, param.tolist() != [1.0] * 4)
    """
    first, second = (run(code, FUSEDOPT_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert first == ["False", "False", "True", "False", "True"]
    assert second == ["False", "False", "False", "False", "True"]


def test_what_is_compiled_is_kept(cache, builds):
    expected = stepped()
    assert builds == ["prepare", "update"]
    assert len(list(cache.iterdir())) == 2
    compiled._kernel.cache_clear()
    assert stepped() == expected
    assert len(builds) == 2


def test_numbers_and_sizes_compile_nothing(cache, builds):
    for size, lr in ((1, 0.1), (1000, 0.2), (70000, torch.tensor(0.3))):
        params = [Parameter(torch.ones(size)) for _ in range(3)]
        optimizer = fusedopt.Adam(params, lr=lr, weight_decay=0.1 * size)
        train(optimizer, range(2))
    assert builds == ["prepare", "update"]


def test_a_damaged_file_is_compiled_anew(cache, builds):
    expected = stepped()
    for damage in (lambda data: data[:-1], lambda data: b"", lambda data: data[:40] + b"x" + data[41:]):
        for path in cache.iterdir():
            path.write_bytes(damage(path.read_bytes()))
        compiled._kernel.cache_clear()
        builds.clear()
        assert stepped() == expected
        assert builds == ["prepare", "update"]


def test_an_empty_variable_turns_the_cache_off(cache, builds, monkeypatch):
    monkeypatch.setenv(code_cache.VARIABLE, "")
    stepped()
    compiled._kernel.cache_clear()
    stepped()
    assert len(builds) == 4
    assert not cache.exists()


def test_a_folder_that_cannot_be_written_is_no_error(cache, builds, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(code_cache.VARIABLE, str(tmp_path / "file" / "cache"))
    stepped()
    assert len(builds) == 2


def test_by_default_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv(code_cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert code_cache.folder() == tmp_path / "fusedopt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert code_cache.folder() == tmp_path / ".cache" / "fusedopt"

    def no_home():
        raise RuntimeError

    monkeypatch.setattr(Path, "home", no_home)
    assert code_cache.folder() is None


RULE = """
import math
import torch
from types import SimpleNamespace
from fusedopt import FusedOptimizer
from fusedopt.kernels.language import tl, triton

FACTOR = tl.constexpr({factor}) if hasattr(tl, "float32") else {factor}
TABLE = {{"three": [{table}]}}
OBJECT = SimpleNamespace(three=3.0)


@triton.jit
def helper(x, TIMES: tl.constexpr):
    for _ in tl.static_range(TIMES):
        x = {helper}
    return x


@triton.jit
def update(param, grad, states, scalars, STATES: tl.constexpr):
    {update}
"""
PLAIN = {
    "factor": 2.0,
    "table": 1.0,
    "helper": "x * FACTOR",
    "update": "return param - scalars[0] * helper(grad, 3), ()",
}


@pytest.fixture
def own(tmp_path):
    """A class of one's own from a file, with parts of its rule replaced."""

    def make_class(**parts):
        path = tmp_path / f"own_{len(list(tmp_path.iterdir()))}.py"
        return own_class(path, RULE.format(**{**PLAIN, **parts}))

    return make_class


def test_any_change_of_a_rule_compiles_it_anew(cache, builds, own):
    """Of itself, of a function that it calls, of a value that it names."""
    results = [
        stepped(own(**parts))
        for parts in (
            {},
            {"factor": 3.0},
            {"helper": "x + FACTOR"},
            {"update": "return param + scalars[0] * helper(grad, 3), ()"},
            {"helper": "x + TABLE['three'][0] * math.pi"},
            {"helper": "x + TABLE['three'][0] * math.pi", "table": 3.0},
            {"helper": "x + TABLE['three'][0] * math.e", "table": 3.0},
            {},
        )
    ]
    assert builds.count("update") == 7
    assert results[0] == results[-1]
    assert len({repr(result) for result in results}) == 7


def test_a_rule_is_what_it_was_when_it_was_first_compiled(cache, builds, own, tmp_path):
    """Its file may change while the process lives: what is kept of it for others has to be what they will read."""
    cls = own(factor=2.0)
    before = stepped(cls)
    (path,) = tmp_path.glob("own_*.py")
    path.write_text(path.read_text().replace("constexpr(2.0)", "constexpr(3.0)"))
    param = Parameter(torch.arange(5.0).double())  # of another signature
    optimizer = cls([param])
    param.grad = torch.linspace(-1, 1, 5).double()
    optimizer.step()
    assert bits(param.detach().float()) == before
    compiled._kernel.cache_clear()
    assert stepped(own(factor=3.0)) != before


def test_defaults_of_helpers_count(cache):
    from fusedopt.kernels.language import triton

    def rule(factor):
        @triton.jit
        def helper(x, factor=factor):
            return x * factor

        @triton.jit
        def update(param, grad, states, scalars, STATES):
            return helper(param), ()

        return update

    assert code_cache.key_of("update", {"UPDATE": rule(2.0)}) != code_cache.key_of("update", {"UPDATE": rule(3.0)})


def test_a_file_that_cannot_be_linked_is_compiled_anew(cache, builds):
    expected = stepped()
    for path in cache.iterdir():
        content = path.read_bytes()[32:]
        content = content[: len(content) // 2]
        path.write_bytes(hashlib.sha256(content).digest() + content)
    compiled._kernel.cache_clear()
    builds.clear()
    assert stepped() == expected
    assert builds == ["prepare", "update"]
    compiled._kernel.cache_clear()
    assert stepped() == expected
    assert builds == ["prepare", "update"]


def test_a_full_disk_leaves_nothing_behind(cache, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(code_cache.os, "replace", full)
    stepped()
    assert list(cache.iterdir()) == []


def test_what_takes_long_is_told_once(cache, caplog, monkeypatch):
    monkeypatch.setattr(compiled, "_seconds", 0.0)
    monkeypatch.setattr(compiled.time, "perf_counter", iter(range(100)).__next__)
    with caplog.at_level(logging.WARNING, "fusedopt"):
        stepped()
        stepped(fusedopt.Lion)
    (message,) = caplog.messages
    assert re.fullmatch(f"fusedopt has spent 1.0 s on compiling .* They are kept in {cache} .*", message)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
def test_warmup_compiles_and_writes_nothing(cache, builds, options):
    optimizer = fusedopt.Adam(make_params(), **options)
    before = snapshot(optimizer)
    fusedopt.warmup(optimizer)
    assert snapshot(optimizer) == before
    assert set(builds) == {"prepare", "update"} | {"sum_squares" for _ in options}
    builds.clear()
    train(optimizer, range(1))
    assert builds == []


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
