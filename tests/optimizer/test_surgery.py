"""Programs that cut, lengthen and replace parameters with their states, as Gaussian splatting and pruning do."""

import copy
import gc
import weakref

import pytest
import torch

import fusedopt
from fusedopt.options import KEYS
from tests.cases import BF16, FP32, MATRIX_CASES
from tests.conftest import DEVICE
from tests.storage.test_precision import DISTINCT
from tests.twins import BACKENDS, IN_TORCH, KERNELS, assert_same, bits

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
CUTS = {
    "lengthened": lambda value: torch.cat([value, value.new_zeros(2, *value.shape[1:])]),
    "pruned": lambda value: value[torch.arange(len(value), device=value.device) % 2 == 0],
    "reversed": lambda value: value.flip(0),
}


def make_params(dtype=FP32, of="SGD"):
    torch.manual_seed(0)
    shapes = (6, 3), ((4, 2) if of == "Muon" else (4,))
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype, device=DEVICE)) for shape in shapes]


def train(optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn(param.shape, generator=generator).to(param)
    optimizer.step()


def operate(optimizer, cut):
    """Whatever is in a state but `step` is cut as the parameter is, all of it."""
    for group in optimizer.param_groups:
        for place, param in enumerate(group["params"]):
            new = torch.nn.Parameter(cut(param.detach()))
            state = optimizer.state.pop(param, None)
            if state is not None:
                numbers = {"step", "mu_product", "eta", "mu"}  # which torch's classes have too
                optimizer.state[new] = {k: v if k in numbers else cut(v) for k, v in state.items() if v is not None}
            group["params"][place] = new


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("case", IN_TORCH, ids=lambda case: case.id)
def test_as_with_torch(case, how, backend):
    pair = case.make(make_params(of=case.optimizer), backend=backend), case.make_torch(make_params(of=case.optimizer))
    for optimizer in pair:
        for step in range(4):
            train(optimizer, step)
            if step in (0, 2):
                operate(optimizer, CUTS[how])
    assert_same(*pair)


def test_after_skipped_steps(backend):
    """A first step of which only the device knows that it was not taken."""
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    mine = fusedopt.SGD(make_params(), backend=backend, skip_nonfinite=True, **options)
    theirs = torch.optim.SGD(make_params(), **options)
    mine.param_groups[0]["params"][0].grad = torch.full((6, 3), float("nan"), device=DEVICE)
    mine.step()
    for optimizer in (mine, theirs):
        for step in range(3):
            train(optimizer, step)
            operate(optimizer, CUTS["lengthened"])
    assert_same(mine, theirs)


EVERYTHING = [
    (BF16, {"rounding": "stochastic", "ema_decay": 0.5, "skip_nonfinite": True, "max_grad_norm": 1.0}),
    (BF16, {"rounding": "stochastic", "kahan": True, "ema_decay": 0.5}),
    (BF16, {"master_weights": True, "ema_decay": 0.5}),
]


# A state of a rule is made in the same way whatever else there is, and what is kept beside it whatever the rule.
SURROUNDED = [
    (MATRIX_CASES[0], *EVERYTHING[0]),
    *((case, *EVERYTHING[i % len(EVERYTHING)]) for i, case in enumerate(DISTINCT)),
]


@pytest.mark.parametrize(("case", "dtype", "options"), SURROUNDED, ids=str)
def test_all_states_but_those_of_torch_have_the_shape_of_their_parameter(case, dtype, options, backend):
    if backend == KERNELS and (case, dtype, options) not in SURROUNDED[-len(EVERYTHING) :]:
        options = {}  # these are compiled with the last rules only
    optimizer = case.make(make_params(dtype, case.optimizer), backend=backend, **options)
    for step in range(3):
        train(optimizer, step)
        for param, state in optimizer.state.items():
            for name, value in state.items():
                assert value.shape == param.shape or name in {"step", "mu_product", "eta", "mu"}, name
        operate(optimizer, CUTS["lengthened"])


def test_random_numbers_go_on(backend):
    """A replaced parameter is not rounded by the numbers of its first steps again, nor after a checkpoint."""

    def steps(replaced, loaded):
        params = [torch.nn.Parameter(torch.ones(4096, dtype=BF16, device=DEVICE))]
        optimizer = fusedopt.SGD(params, lr=1.0, rounding="stochastic", seed=3, backend=backend)
        decisions = []
        for step in range(4):
            (param,) = optimizer.param_groups[0]["params"]
            param.data.fill_(1)
            param.grad = torch.full_like(param, -(2.0**-8))  # halfway to the next number
            optimizer.step()
            decisions.append(bits(param))
            if replaced == step:
                operate(optimizer, lambda value: value.clone())
            if loaded == step:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = fusedopt.SGD(params, lr=1.0, rounding="stochastic", seed=3, backend=backend)
                optimizer.load_state_dict(saved)
        return decisions

    plain = steps(None, None)
    assert len(set(plain)) == 4
    assert steps(1, None) == steps(None, 1) == plain


def skipped_first_step(backend):
    """Two optimizers, ours after a step that was skipped, so that its states are there and have not begun."""
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    mine = fusedopt.SGD(make_params(), backend=backend, skip_nonfinite=True, ema_decay=0.5, **options)
    for param in mine.param_groups[0]["params"]:
        param.grad = torch.full_like(param, float("nan"))
    mine.step()
    return mine, torch.optim.SGD(make_params(), **options)


def moved(optimizer):
    for place, param in enumerate(optimizer.param_groups[0]["params"]):
        new = torch.nn.Parameter(param.detach().clone())
        if param in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(param)
        optimizer.param_groups[0]["params"][place] = new


def written(optimizer):
    for param in optimizer.param_groups[0]["params"]:
        optimizer.state[param]["momentum_buffer"] = torch.full_like(param, 2.0)


def away_for_a_step(optimizer):
    away = optimizer.param_groups[0]["params"].pop()
    train(optimizer, 7)
    optimizer.param_groups[0]["params"].append(away)


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("act", [moved, written, away_for_a_step])
def test_what_has_begun_belongs_to_the_state(act, debug, backend, monkeypatch):
    monkeypatch.setattr(fusedopt.plan, "DEBUG", debug)
    mine, theirs = skipped_first_step(backend)
    for optimizer in (mine, theirs):
        act(optimizer)
        for step in range(2):
            train(optimizer, step)
    assert_same_buffers(mine, theirs)
    first_average = next(iter(mine.state.values()))["ema"]
    assert not torch.equal(first_average, make_params()[0]), "it has begun with the weights after a step"


def assert_same_buffers(mine, theirs):
    for param, other in zip(mine.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(param, other)
        torch.testing.assert_close(mine.state[param]["momentum_buffer"], theirs.state[other]["momentum_buffer"])


def test_a_shallow_copy_shares_states_and_what_has_begun(backend):
    mine, theirs = fusedopt.SGD(make_params(), lr=0.1, momentum=0.9, dampening=0.5, backend=backend), None
    other = copy.copy(mine)
    for param in mine.param_groups[0]["params"]:
        param.grad = torch.full_like(param, float("nan"))
    mine.found_inf = 1.0
    mine.step()
    theirs = torch.optim.SGD(make_params(), lr=0.1, momentum=0.9, dampening=0.5)
    for optimizer in (other, theirs):
        for step in range(2):
            train(optimizer, step)
    assert_same_buffers(other, theirs)


def test_nothing_holds_what_is_gone(backend):
    optimizer = fusedopt.SGD(make_params(), lr=0.1, momentum=0.9, dampening=0.5, ema_decay=0.5, backend=backend)
    optimizer.param_groups[0]["mine"] = torch.ones(1)
    train(optimizer, 0)
    gone = [weakref.ref(value) for param, state in optimizer.state.items() for value in (param, *state.values())]
    gone.append(weakref.ref(optimizer.param_groups[0].pop("mine")))
    optimizer.state.clear()
    optimizer.param_groups[0]["params"] = make_params()
    gc.collect()
    assert not any(reference() is not None for reference in gone)


def test_a_key_comes_as_another_goes(backend):
    optimizer, other = (fusedopt.SGD(make_params(), lr=0.1, momentum=0.9, backend=backend) for _ in range(2))
    group = optimizer.param_groups[0]
    group["mine"] = 1
    train(optimizer, 0)
    del group["mine"]
    group[KEYS["max_grad_norm"]] = 1e-3
    train(optimizer, 1)
    train(other, 0)
    other.param_groups[0][KEYS["max_grad_norm"]] = 1e-3
    train(other, 1)
    assert optimizer.grad_norm == other.grad_norm > 1e-3
    assert_same_buffers(optimizer, other)


def test_other_parameters_on_the_same_memory(backend):
    """With the states of those that they replace. One has no gradient, and is to be remembered all the same."""
    params = make_params()
    optimizer = fusedopt.AdamW(params, lr=0.1, backend=backend)
    twins = [torch.nn.Parameter(param.detach().clone()) for param in params]
    theirs = torch.optim.AdamW(twins, lr=0.1)
    for step in range(4):
        for param, twin in zip(optimizer.param_groups[0]["params"], twins, strict=True):
            param.grad, twin.grad = (torch.full_like(param, 0.5 + step) for _ in range(2))
        if step:
            optimizer.param_groups[0]["params"][-1].grad = twins[-1].grad = None
        optimizer.step()
        theirs.step()
        new = {param: torch.nn.Parameter(param.data) for param in optimizer.param_groups[0]["params"]}
        optimizer.param_groups[0]["params"][:] = new.values()
        states = [(new[param], state) for param, state in optimizer.state.items()]
        optimizer.state.clear()
        optimizer.state.update(states)
    torch.testing.assert_close(optimizer.param_groups[0]["params"], twins)


def test_groups_keep_the_count(backend):
    """Whichever of them go, and in whatever order a checkpoint has them."""

    def make_groups():
        return [{"params": [param]} for param in make_params(BF16)]

    options = {"lr": 0.1, "rounding": "stochastic", "skip_nonfinite": True, "backend": backend}
    optimizer = fusedopt.SGD(make_groups(), **options)
    for step in range(3):
        train(optimizer, step)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"] = [{**group, "params": [place]} for place, group in enumerate(saved["param_groups"][::-1])]
    other = fusedopt.SGD(make_groups(), **options)
    other.load_state_dict(saved)
    train(other, 3)
    assert other.param_groups[1]["fusedopt_rounding_step"] == 4
    copied = fusedopt.SGD([{**group, "params": make_params(BF16)} for group in optimizer.param_groups[:1]], **options)
    del optimizer.param_groups[0]
    train(optimizer, 3)
    assert optimizer.param_groups[0]["fusedopt_rounding_step"] == 4
    train(copied, 0)
    assert copied.param_groups[0]["fusedopt_rounding_step"] == 1
    assert optimizer.param_groups[0]["fusedopt_rounding_step"] == 4
    optimizer.param_groups.clear()
    optimizer.step()
    assert optimizer.skipped_steps == 0
