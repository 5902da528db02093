"""Few launches and no waiting: what a step asks of the device, whatever it steps. Most launches here are empty."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fusedopt
import fusedopt.engines.tables
from tests.cases import AVERAGED, CASES, MODES, Case
from tests.conftest import DEVICE

ROOT = Path(__file__).parents[2]
SIZES = (1, 7, 0, 1000, 33, 64)


@pytest.fixture(autouse=True)
def ordinary_steps(monkeypatch):
    """Without FUSEDOPT_DEBUG, under which every step makes a new plan."""
    monkeypatch.setattr("fusedopt.plan.DEBUG", False)


@pytest.fixture
def launches(monkeypatch):
    """(kernel, programs, tables) of every launch from now on; none takes place."""
    record = []

    def launch(kernel, programs, *args, **options):
        tables = [arg for arg in args if isinstance(arg, torch.Tensor)]
        record.append((kernel.fn.__name__, programs, tables))

    monkeypatch.setattr(fusedopt.engines.tables, "launch", launch)
    return record


def kernels(launches):
    """The names of the kernels, and forget them."""
    names = [name for name, _, _ in launches]
    launches.clear()
    return names


def parameters(count, dtype=torch.float32):
    params = [torch.nn.Parameter(torch.ones(SIZES[i % len(SIZES)], dtype=dtype, device=DEVICE)) for i in range(count)]
    set_grads(params)
    return params


def set_grads(params):
    for param in params:
        param.grad = torch.ones_like(param)


def adam(params, **options):
    return fusedopt.Adam(params, backend="triton", **options)


@pytest.mark.parametrize("groups", [1, 20])
@pytest.mark.parametrize("count", [1, 300, 3000])
def test_launches_do_not_grow(launches, count, groups):
    params = parameters(count)
    groups = min(groups, count)
    optimizer = adam([{"params": params[i::groups], "lr": 0.1 * i} for i in range(groups)])
    for _ in range(2):
        optimizer.step()
        assert kernels(launches) == ["prepare", "update"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_two_launches_for_every_optimizer(launches, case):
    optimizer = case.make(parameters(10), backend="triton")
    optimizer.step()
    assert kernels(launches) == ["prepare", "update"]


@pytest.mark.parametrize("mode", [*MODES, *AVERAGED], ids=lambda mode: mode.id)
def test_two_launches_for_every_mode(launches, mode):
    optimizer = adam(parameters(10, mode.dtype), **mode.options)
    optimizer.step()
    plan = optimizer._stepper.plan
    optimizer.param_groups[0]["lr"] *= 0.5
    optimizer.step()
    assert optimizer._stepper.plan is plan
    assert kernels(launches) == 2 * ["prepare", "update"]


def test_one_more_launch_for_each_signature(launches):
    params = parameters(7) + parameters(7, torch.bfloat16)
    adam(params).step()
    assert kernels(launches) == ["prepare", "update", "update"]


def test_states_of_one_group_are_a_signature(launches):
    params = parameters(12)
    adam([{"params": params[:5]}, {"params": params[5:], "amsgrad": True}]).step()
    assert kernels(launches) == ["prepare", "update", "update"]


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}], ids=str)
@pytest.mark.parametrize("count", [1, 3000])
def test_one_more_launch_for_each_dtype_of_gradients(launches, options, count):
    """Whatever the signatures, the groups and the number of tensors."""
    half = parameters(count, torch.bfloat16)
    groups = [{"params": parameters(count)}, {"params": parameters(count), "amsgrad": True}, {"params": half}]
    optimizer = adam(groups, **options)
    for _ in range(2):
        optimizer.step()
        assert kernels(launches) == ["sum_squares", "sum_squares", "prepare", "update", "update", "update"]


@pytest.mark.parametrize(("size", "programs"), [(1, 1), (16 * 1024, 1), (16 * 1024 + 1, 2), (10**6, 4)])
def test_squares_are_summed_by_so_many_programs(launches, monkeypatch, size, programs):
    """A number that does not depend on the device, and of which each leaves one sum."""
    monkeypatch.setattr(fusedopt.engines.tables, "SQUARES_PROGRAMS", {True: 4, False: 4})
    param = torch.nn.Parameter(torch.ones(size, device=DEVICE))
    set_grads([param])
    adam([param], max_grad_norm=1.0).step()
    name, launched, tables = launches[0]
    assert (name, launched) == ("sum_squares", programs)
    assert tables[-1].shape == (programs, 2)


def test_nothing_is_launched_without_gradients(launches):
    params = parameters(5)
    optimizer = adam(params, max_grad_norm=1.0)
    optimizer.step()
    kernels(launches)
    optimizer.zero_grad()
    optimizer.step()
    assert kernels(launches) == []


def test_missing_gradients_rebuild_nothing(launches):
    params = parameters(30)
    optimizer = adam([{"params": params[:10]}, {"params": params[10:]}])
    optimizer.step()
    plan = optimizer._stepper.plan
    for missing in (params[:1], params[10:], params[3:20:2], []):
        set_grads(params)
        for param in missing:
            param.grad = None
        kernels(launches)
        optimizer.step()
        assert kernels(launches) == ["prepare", "update"]
        assert optimizer._stepper.plan is plan


NUMBERS = [
    {"lr": 0.5},
    {"betas": (0.5, 0.6)},
    {"weight_decay": 0.5},
    {"maximize": True},
    {"max_grad_norm": 2.0},
    {"ema_decay": 0.5},
]


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
def test_new_numbers_rebuild_nothing(launches, numbers):
    optimizer = adam(parameters(5), max_grad_norm=1.0, ema_decay=0.9)
    optimizer.step()
    plan = optimizer._stepper.plan
    static = [tables[0].data_ptr() for _, _, tables in launches]
    kernels(launches)
    optimizer.param_groups[0].update(numbers)
    optimizer.step()
    assert optimizer._stepper.plan is plan
    assert [tables[0].data_ptr() for _, _, tables in launches] == static
    assert kernels(launches) == ["sum_squares", "prepare", "update"]


def test_ordinary_training_keeps_the_plan(launches):
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).to(DEVICE)
    optimizer = adam(model.parameters())
    plans = []
    held = []  # so that the next gradients lie elsewhere
    for _ in range(10):
        optimizer.zero_grad(set_to_none=True)
        model(torch.ones(3, 5, device=DEVICE)).sum().backward()
        held += [param.grad for param in model.parameters()]
        optimizer.step()
        plans.append(optimizer._stepper.plan)
    assert all(plan is plans[0] for plan in plans)
    assert kernels(launches) == 10 * ["prepare", "update"]


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 129])
def test_tables_begin_where_triton_expects_them(launches, count):
    """Triton compiles anew for a pointer that is no multiple of 16."""
    optimizer = adam(parameters(count) + parameters(count, torch.bfloat16))
    for _ in range(3):
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 2
    assert all(table.data_ptr() % 16 == 0 for _, _, tables in launches for table in tables)


def test_versions_grow():
    params = parameters(6)
    without = parameters(1)[0]
    without.grad = None
    optimizer = adam([*params, without])
    optimizer.step()
    before = [param._version for param in params]
    unwritten = without._version
    optimizer.step()
    assert all(param._version > version for param, version in zip(params, before, strict=True))
    assert without._version == unwritten


def test_backward_through_overwritten_weights_raises():
    (param,) = parameters(1)
    optimizer = adam([param])
    optimizer.step()
    loss = (param * param).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Operations(TorchDispatchMode):
    """The names of all operations of torch, but those that are told not to wait: the uploads, from pinned memory."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_told = func is torch.ops.aten.copy_.default and args[2:] == (True,)
        if not (is_told or kwargs.get("non_blocking")):
            self.names.add(func.overloadpacket.__name__)
        return func(*args, **kwargs)


# What copies to the host or waits for a value: item, float, bool, tolist, equal, nonzero, x[mask], cpu.
WAITING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "index", "_to_copy", "copy_"}


STEADY = [
    *((case, torch.float32, {}) for case in CASES),
    *((Case("Adam"), mode.dtype, mode.options) for mode in [*MODES, *AVERAGED]),
]


@pytest.mark.parametrize(("case", "dtype", "options"), STEADY, ids=str)
def test_steady_step_waits_for_nothing(launches, case, dtype, options):
    params = parameters(20, dtype)
    optimizer = case.make(params, backend="triton", **options)
    optimizer.step()
    operations = Operations()
    for step in range(3):
        set_grads(params)
        params[step].grad = None
        optimizer.param_groups[0]["lr"] *= 0.5
        with operations:
            optimizer.step()
    assert not operations.names & WAITING
    assert optimizer._stepper.plan is not None
    assert kernels(launches) == 4 * ["prepare", "update"]


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.9}], ids=str)
@pytest.mark.parametrize("groups", [1, 4])
def test_a_step_of_matrices_waits_for_nothing(launches, options, groups):
    """Two launches, products, two launches, whatever the number of groups; AdamW's group takes one more."""
    matrices = [torch.nn.Parameter(torch.ones(shape, device=DEVICE)) for shape in [(8, 16), (16, 8), (3, 5)] * 4]
    others = parameters(6)
    in_groups = [{"params": matrices[i::groups], "lr": 0.1 * i} for i in range(groups)]
    optimizer = fusedopt.Muon([*in_groups, {"params": others, "use_muon": False}], backend="triton", **options)
    set_grads(matrices)
    optimizer.step()
    operations = Operations()
    for step in range(3):
        set_grads([*matrices, *others])
        matrices[step].grad = None
        optimizer.param_groups[0]["lr"] *= 0.5
        with operations:
            optimizer.step()
    assert not operations.names & WAITING
    squares = ["sum_squares"] if options else []
    assert kernels(launches) == 4 * [*squares, "prepare", "update", "update", "prepare", "update"]


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.9}], ids=str)
def test_grad_scaler_waits_for_nothing(launches, name, options):
    """But GradScaler's own pass over the gradients, nothing comes between it and the launches."""
    params = parameters(20) + parameters(20, torch.bfloat16)
    momentum = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(fusedopt, name)(params, backend="triton", **momentum, **options)
    scaler = torch.amp.GradScaler(DEVICE)
    scaler.scale(torch.ones((), device=DEVICE))
    operations, take_step = Operations(), optimizer.step

    def watched():
        with operations:
            take_step()

    for step in range(4):
        set_grads(params)
        params[step].grad = params[step].grad if step == 0 else None
        scaler.step(optimizer)
        scaler.update()
        optimizer.step = watched  # from the second step on: the first makes the states and the tables
    assert not operations.names & WAITING
    squares = ["sum_squares", "sum_squares"] if options else []
    assert kernels(launches) == 4 * [*squares, "prepare", "update", "update"]


def test_unscaling_gradients_that_are_copied_waits_for_nothing(launches):
    """Those that lie otherwise than their parameters, and those that share memory. A copy stays on its device."""
    optimizer = adam([torch.nn.Parameter(torch.ones(4, 6, device=DEVICE)) for _ in range(5)])
    first, *_ = params = optimizer.param_groups[0]["params"]
    operations = Operations()
    for step in range(4):
        set_grads(params)
        first.grad = torch.ones(6, 4, device=DEVICE).t()
        params[1].grad = torch.ones(4, 1, device=DEVICE).expand(4, 6)
        params[2].grad = params[3].grad
        optimizer.grad_scale, optimizer.found_inf = (torch.ones((), device=DEVICE) for _ in "ab")
        if step:  # the first makes the states and the tables
            with operations:
                optimizer.step()
        else:
            optimizer.step()
    assert operations.names & WAITING == {"copy_"}
    assert kernels(launches) == 4 * ["prepare", "update"]


def test_waiting_would_be_noticed():
    with Operations() as operations:
        float(torch.ones(1))
        bool(torch.ones(()) == 1)
    assert operations.names & WAITING


JITTED = re.compile(r"@triton\.jit.*?\ndef (\w+)", re.DOTALL)


def test_every_kernel_is_launched_by_launch():
    """Which says whether products and sums are fused, also in tests and benchmarks: Triton 3.10 will not by itself."""
    files = [path for top in ("fusedopt", "kernels", "bench", "tests") for path in (ROOT / top).rglob("*.py")]
    texts = {path: path.read_text() for path in files}
    names = {name for text in texts.values() for name in JITTED.findall(text)} | {"kernel"}
    assert {"update", "prepare", "sum_squares", "convert"} <= names
    launch = re.compile(rf"\b({'|'.join(names)})\[[^\]]*\]\(")
    found = {str(path.relative_to(ROOT)): launch.findall(text) for path, text in texts.items() if launch.search(text)}
    assert found == {"fusedopt/engines/tables.py": ["kernel"]}
    with pytest.raises(TypeError, match="enable_fp_fusion"):
        fusedopt.engines.tables.launch(None, 1)
