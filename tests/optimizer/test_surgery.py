"""Programs that cut, lengthen and replace parameters with their states, as Gaussian splatting and pruning do."""

import copy

import pytest
import torch

import fusedopt
from tests.cases import BF16, CASES, FP32
from tests.conftest import DEVICE
from tests.twins import BACKENDS, IN_TORCH, assert_same, bits

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
CUTS = {
    "lengthened": lambda value: torch.cat([value, value.new_zeros(2, *value.shape[1:])]),
    "pruned": lambda value: value[torch.arange(len(value), device=value.device) % 2 == 0],
    "reversed": lambda value: value.flip(0),
}


def make_params(dtype=FP32):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype, device=DEVICE)) for shape in ((6, 3), (4,))]


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


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("case", IN_TORCH, ids=lambda case: case.id)
def test_as_with_torch(case, how, backend):
    pair = case.make(make_params(), backend=backend), case.make_torch(make_params())
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


@pytest.mark.parametrize(("dtype", "options"), EVERYTHING, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_all_states_but_those_of_torch_have_the_shape_of_their_parameter(case, dtype, options, backend):
    if case.optimizer == "SGD" and not case.options.get("momentum") and "kahan" in options:
        options = {"kahan": True}
    optimizer = case.make(make_params(dtype), backend=backend, **options)
    for step in range(3):
        train(optimizer, step)
        for param, state in optimizer.state.items():
            for name, value in state.items():
                assert value.shape == param.shape or name in {"step", "mu_product", "eta", "mu"}, name
        assert optimizer._stepper.begun.keys() <= {p for group in optimizer.param_groups for p in group["params"]}
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
