"""warmup launches what the steps will launch, and leaves everything as it was."""

import pytest
import torch

import fusedopt
import fusedopt.engines.tables
from tests.cases import CASES, MODES, Case, Mode
from tests.conftest import DEVICE
from tests.twins import random, set_grads, snapshot

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SGD_MOMENTUM = Case("SGD", {"lr": 0.1, "momentum": 0.9})
ADAMW = Case("AdamW", {"lr": 0.1})
AROUND = {"max_grad_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.9}


class Launches:
    """What Triton compiles for: the kernel, the types of its arguments, its constants."""

    def __init__(self, monkeypatch):
        self.seen = set()
        self.empty = False
        self.make = fusedopt.engines.tables.launch
        monkeypatch.setattr(fusedopt.engines.tables, "launch", self)

    def __call__(self, kernel, programs, *args, **constants):
        types = [arg.dtype if isinstance(arg, torch.Tensor) else type(arg) for arg in args]
        self.seen.add((kernel.fn.__name__, str(types), str(constants)))
        if not self.empty:
            self.make(kernel, programs, *args, **constants)

    def pop(self):
        seen, self.seen = self.seen, set()
        return seen


@pytest.fixture
def launches(monkeypatch):
    return Launches(monkeypatch)


def parameters(*dtypes, sizes=(5, 17)):
    """With their gradients."""
    params = [torch.nn.Parameter(random((size,), size, dtype)) for dtype in dtypes for size in sizes]
    set_grads(params, 0)
    return params


def everything(optimizer):
    """What could be left behind; `vars` by identity."""
    groups = [{key: id(value) for key, value in group.items()} for group in optimizer.param_groups]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    versions = [(param._version, None if param.grad is None else param.grad._version) for param in params]
    return snapshot(optimizer), {key: id(value) for key, value in vars(optimizer).items()}, groups, versions


def assert_foretold(launches, optimizer, take_steps):
    """Nothing is left behind, and the steps launch nothing else, with a scale for the gradients and without."""
    before = everything(optimizer)
    fusedopt.warmup(optimizer)
    assert everything(optimizer) == before
    foretold = launches.pop()
    launches.empty = True
    take_steps()
    optimizer.grad_scale = 2.0
    take_steps()
    vars(optimizer).pop("grad_scale", None)
    assert launches.pop() == foretold
    launches.empty = False
    assert foretold


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_before_the_first_step(launches, case):
    """Without gradients, which are expected in the dtypes of the parameters."""
    params = parameters(FP32, BF16)
    optimizer = case.make(params, backend="triton", **AROUND)
    grads = [param.grad for param in params]
    for param in params:
        param.grad = None

    def step():
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()

    assert_foretold(launches, optimizer, step)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.id)
@pytest.mark.parametrize("case", [SGD_MOMENTUM, ADAMW], ids=lambda case: case.id)
def test_every_mode(launches, case, mode):
    optimizer = case.make(parameters(mode.dtype), backend="triton", **mode.options)
    assert_foretold(launches, optimizer, optimizer.step)


@pytest.mark.parametrize("mode", [MODES[2], MODES[8], Mode(FP64, AROUND)], ids=lambda mode: mode.id)
def test_matrices(launches, mode):
    """Both updates, and AdamW's beside the first of them."""
    matrices = [torch.nn.Parameter(random(shape, 0, mode.dtype)) for shape in [(3, 4), (4, 3)]]
    set_grads(matrices, 0)
    groups = [{"params": matrices}, {"params": parameters(mode.dtype), "use_muon": False}]
    optimizer = fusedopt.Muon(groups, backend="triton", **mode.options)
    assert_foretold(launches, optimizer, optimizer.step)


def test_dtypes_and_groups(launches):
    """Complex numbers, gradients of another dtype, options that differ, a parameter on the reference."""
    mixed = parameters(FP32)
    for param in mixed:
        param.grad_dtype = None
        param.grad = param.grad.to(BF16)
    groups = [
        {"params": parameters(FP32, FP64, torch.complex64)},
        {"params": mixed, "amsgrad": True},
        {"params": parameters(FP16, BF16), "fusedopt_master_weights": True, "fusedopt_state_dtype": FP32},
        {"params": parameters(BF16, FP32), "fusedopt_rounding": "stochastic", "fusedopt_state_dtype": BF16},
        {"params": parameters(BF16), "fused": False, "fusedopt_kahan": True},
    ]
    optimizer = ADAMW.make(groups, backend="triton")
    assert_foretold(launches, optimizer, optimizer.step)


def test_only_what_is_trained(launches):
    """A frozen parameter has no gradient, a sparse gradient is the reference's."""
    frozen = torch.nn.Parameter(torch.ones(3, dtype=BF16, device=DEVICE), requires_grad=False)
    (sparse,) = parameters(FP64, sizes=(4,))
    sparse.grad = sparse.grad.to_sparse()
    optimizer = SGD_MOMENTUM.make([frozen, sparse, *parameters(FP32)], backend="triton")
    assert_foretold(launches, optimizer, optimizer.step)


@pytest.mark.parametrize("case", [SGD_MOMENTUM, ADAMW], ids=lambda case: case.id)
def test_gradient_scaling(launches, case):
    """Which makes SGD keep on the device whether a buffer has begun."""
    optimizer = case.make(parameters(FP32), backend="triton")

    def steps():
        for overflow in (1.0, 0.0):
            optimizer.grad_scale = torch.full((), 2.0, device=DEVICE)
            optimizer.found_inf = torch.full((), overflow, device=DEVICE)
            optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        optimizer.step()

    assert_foretold(launches, optimizer, steps)


@pytest.mark.parametrize("options", [{}, {"state_dtype": BF16}], ids=str)
def test_states_that_are_there(launches, options):
    """They have kept their dtypes, which the options no longer ask for. One is None, as torch's SGD has saved it."""
    first = SGD_MOMENTUM.make(parameters(FP32), backend="triton", **options)
    first.step()
    first.step()
    saved = first.state_dict()
    saved["state"][0]["momentum_buffer"] = None
    loaded = SGD_MOMENTUM.make(parameters(FP32), backend="triton")
    loaded.load_state_dict(saved)
    loaded.param_groups[0].pop("state_dtype", None)
    launches.pop()
    assert_foretold(launches, loaded, loaded.step)


def test_numbers_on_the_device(launches, monkeypatch):
    """Another kernel reads them through their addresses."""
    if DEVICE == "cpu":  # where the host reads them
        monkeypatch.setattr("fusedopt.step.hyper._number", lambda value, *_: value)
    lr = torch.tensor(0.1, device=DEVICE)
    optimizer = fusedopt.AdamW(parameters(FP32), lr=lr, backend="triton", **AROUND)
    assert_foretold(launches, optimizer, optimizer.step)
    fusedopt.warmup(optimizer)
    assert {"'HYPER_TENSORS': True" in constants for name, _, constants in launches.pop() if name == "prepare"} == {
        True
    }


def test_training_goes_on_as_without(launches):
    warmed, twin = (
        ADAMW.make(parameters(BF16), backend="triton", rounding="stochastic", seed=1, **AROUND) for _ in "ab"
    )
    for seed in range(3):
        fusedopt.warmup(warmed)
        for optimizer in (warmed, twin):
            set_grads(optimizer.param_groups[0]["params"], seed)
            optimizer.step()
    mine, theirs = snapshot(warmed), snapshot(twin)
    assert mine["params"] == theirs["params"]
    assert list(mine["state"].values()) == list(theirs["state"].values())
    assert warmed.skipped_steps == twin.skipped_steps == 0


class Warm(fusedopt.Lion):
    """Begins with what lies in the parameter, and asks for it."""

    def init_state(self, param, state, group):
        if state.get("exp_avg") is None:
            state["exp_avg"] = param.detach().double() if param.abs().max() < 10 else torch.zeros_like(param)


def test_states_of_a_subclass(launches):
    optimizer = Warm(parameters(FP32), backend="triton")
    assert_foretold(launches, optimizer, optimizer.step)


@pytest.mark.parametrize("options", [{"backend": "eager"}, {"fused": False}], ids=str)
def test_the_reference_has_nothing_to_compile(launches, options):
    optimizer = fusedopt.AdamW(parameters(FP32), **options, **AROUND)
    before = everything(optimizer)
    fusedopt.warmup(optimizer)
    assert everything(optimizer) == before
    assert not launches.pop()


def test_without_parameters(launches):
    optimizer = fusedopt.AdamW([{"params": []}], backend="triton", **AROUND)
    fusedopt.warmup(optimizer)
    assert not launches.pop()


def test_what_cannot_be_warmed_up(monkeypatch):
    with pytest.raises(TypeError, match=r"the optimizers of fusedopt.*torch.optim.adam.Adam"):
        fusedopt.warmup(torch.optim.Adam(parameters(FP32)))
    optimizer = ADAMW.make(parameters(FP32), backend="triton")
    optimizer.param_groups[0]["fusedopt_max_grad_norm"] = -1.0
    with pytest.raises(ValueError, match="max_grad_norm"):
        fusedopt.warmup(optimizer)
    monkeypatch.setattr("fusedopt.step.graphs.is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="capture"):
        fusedopt.warmup(optimizer)
