"""The average of the weights: beside AveragedModel and float64, on both backends."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch.nn import Parameter, ParameterList
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedopt
from tests.bounded import Bounded, exact
from tests.cases import AVERAGED, BF16, FP16, FP32
from tests.conftest import DEVICE
from tests.optimizer.test_state import saved_and_loaded
from tests.tolerance import assert_close
from tests.twins import ENGINES, bits, make_params, params_of, random, set_grads, train

FP64, COMPLEX = torch.float64, torch.complex64

pytestmark = pytest.mark.parametrize("backend", ENGINES)
every_mode = pytest.mark.parametrize("mode", AVERAGED, ids=lambda mode: mode.id)


def make(backend, params=None, **options):
    params = make_params(FP32) if params is None else params
    return fusedopt.AdamW(params, backend=backend, **{"lr": 0.1, "ema_decay": 0.9, **options})


def averages(optimizer):
    return [optimizer.state[param]["ema"] for param in params_of(optimizer)]


def everything(optimizer):
    """The bits of parameters and states, whichever object holds them."""
    states = [optimizer.state[param] for param in params_of(optimizer)]
    return list(map(bits, params_of(optimizer))), [{k: bits(v) for k, v in state.items()} for state in states]


def true_weights(optimizer, param):
    """What the parameter stands for: its master, or itself and what its rounding lost."""
    state = optimizer.state[param]
    if "master_param" in state:
        return exact(state["master_param"])
    return exact(param) + (exact(state["kahan_comp"]) if "kahan_comp" in state else 0)


# The numbers.


@pytest.mark.parametrize("decay", [0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("dtype", [FP64, FP32, COMPLEX], ids=str)
def test_same_numbers_as_averaged_model(backend, dtype, decay):
    """Which begins with the weights after the first step."""
    optimizer = make(backend, make_params(dtype), ema_decay=decay)
    model = ParameterList(params_of(optimizer))
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    for step in range(5):
        train(optimizer, [step])
        theirs.update_parameters(model)
        torch.testing.assert_close(averages(optimizer), [param.detach() for param in theirs.parameters()])
        if step == 0:
            assert list(map(bits, averages(optimizer))) == list(map(bits, params_of(optimizer)))


@pytest.mark.parametrize("decay", [0.3, 0.999])
@every_mode
def test_one_update(backend, mode, decay):
    """Of the master weights or the compensated ones where they are kept, else of what the parameter has become."""
    optimizer = make(backend, make_params(mode.dtype), **{**mode.options, "ema_decay": decay}, lr=1e-3)
    for step in range(3):
        before = [exact(ema) for ema in averages(optimizer)] if step else None
        train(optimizer, [step])
        for i, param in enumerate(params_of(optimizer)):
            ema = optimizer.state[param]["ema"]
            assert ema.dtype == FP32
            weights = Bounded.of(true_weights(optimizer, param))
            if "kahan_comp" in optimizer.state[param]:  # of 16 bits: up to 2^-17 of the weight, 128 ULP, is lost
                weights = replace(weights, bound=32 * weights.bound)
            expected = weights if before is None else Bounded.of(before[i]) * decay + weights * (1 - decay)
            assert_close(ema, expected, what=f"average {i} after step {step}")


def test_moves_where_sixteen_bits_would_not(backend):
    """At a decay of 0.999 every update of a bf16 average rounds away."""
    param = Parameter(torch.ones(5, dtype=BF16, device=DEVICE))
    optimizer = fusedopt.SGD([param], 0.25, ema_decay=0.999, backend=backend)
    theirs = AveragedModel(ParameterList([param]), multi_avg_fn=get_ema_multi_avg_fn(0.999))
    expected = None
    for _ in range(3):
        param.grad = torch.ones_like(param)
        optimizer.step()
        theirs.update_parameters(ParameterList([param]))
        value = param.double()
        expected = value if expected is None else 0.999 * expected + 0.001 * value
    torch.testing.assert_close(optimizer.state[param]["ema"].double(), expected, rtol=1e-7, atol=0)
    assert (next(theirs.parameters()) == 0.75).all(), "AveragedModel moves by now: say so in the docs"


def test_stays_where_its_parameter_does(backend):
    """Without a gradient, and in a skipped step, also in the first one."""
    params = make_params(FP32)
    optimizer = make(backend, params, skip_nonfinite=True)
    set_grads(params, 0)
    params[1].grad.fill_(float("inf"))
    optimizer.step()
    assert not any("ema" in state for state in optimizer.state_dict()["state"].values()), "no average has begun"
    train(optimizer, [1])
    train(optimizer, [2])
    before = everything(optimizer)
    params[1].grad.fill_(float("nan"))
    optimizer.step()
    assert everything(optimizer) == before
    set_grads(params, 3)
    params[0].grad = None
    optimizer.step()
    first, *others = (optimizer.state[param] for param in params)
    assert bits(first["ema"]) == before[1][0]["ema"]
    assert all(bits(state["ema"]) != old["ema"] for state, old in zip(others, before[1][1:], strict=True))


def test_groups_may_differ(backend):
    params = make_params(FP32)
    groups = [
        {"params": params[:1], "fusedopt_ema_decay": 0.5},
        {"params": params[1:2], "fusedopt_ema_decay": 0.9},
        {"params": params[2:]},
    ]
    optimizer = make(backend, groups, ema_decay=None)
    train(optimizer, [0])
    before = [param.detach().clone() for param in params]
    train(optimizer, [1])
    for param, old, decay in zip(params, before, (0.5, 0.9), strict=False):
        expected = Bounded.of(exact(old)) * decay + Bounded.of(exact(param)) * (1 - decay)
        assert_close(optimizer.state[param]["ema"], expected)
    assert "ema" not in optimizer.state[params[2]]


def test_sparse_gradients(backend):
    """Which the reference takes. Rows without a gradient have moved too, by momentum."""
    param = make_params(FP32)[0]
    optimizer = fusedopt.SGD([param], 0.1, momentum=0.9, backend=backend, ema_decay=0.5, skip_nonfinite=True)
    average = None
    for value in (1.0, 2.0, float("nan"), 3.0):
        rows = torch.tensor([[1, 1]], device=DEVICE)
        values = torch.full((2, 4), value, device=DEVICE)
        param.grad = torch.sparse_coo_tensor(rows, values, (3, 4), check_invariants=True)
        optimizer.step()
        if value == value:
            weights = Bounded.of(exact(param))
            average = weights if average is None else average * 0.5 + weights * 0.5
        assert_close(optimizer.state[param]["ema"], average)
    assert optimizer.skipped_steps == 1


def test_is_switched_on_and_off(backend):
    optimizer = make(backend, ema_decay=None)
    twin = make(backend, ema_decay=None)
    (group,) = optimizer.param_groups
    train(optimizer, [0])
    group["fusedopt_ema_decay"] = 0.9
    train(optimizer, [1])
    assert list(map(bits, averages(optimizer))) == list(map(bits, params_of(optimizer)))
    train(optimizer, [2])
    kept = list(map(bits, averages(optimizer)))
    group["fusedopt_ema_decay"] = None
    train(optimizer, [3])
    assert list(map(bits, averages(optimizer))) == kept
    with pytest.raises(RuntimeError, match="ema_decay"), optimizer.swap_ema():
        pass
    group["fusedopt_ema_decay"] = 0.5
    before = [exact(ema) for ema in averages(optimizer)]
    train(optimizer, [4])
    for param, ema, old in zip(params_of(optimizer), averages(optimizer), before, strict=True):
        assert_close(ema, Bounded.of(old) * 0.5 + Bounded.of(exact(param)) * 0.5)
    train(twin, range(5))
    torch.testing.assert_close(params_of(optimizer), params_of(twin))


# Checkpoints.


COPIES = {
    "file": lambda optimizer, fresh: fresh.load_state_dict(saved_and_loaded(optimizer.state_dict())) or fresh,
    "deepcopy": lambda optimizer, _: copy.deepcopy(optimizer),
    "pickle": lambda optimizer, _: pickle.loads(pickle.dumps(optimizer)),
}


COPIED = [(mode, "file") for mode in AVERAGED] + [(AVERAGED[2], how) for how in ("deepcopy", "pickle")]


@pytest.mark.parametrize(("mode", "how"), COPIED, ids=[f"{mode.id}-{how}" for mode, how in COPIED])
def test_a_resumed_run_gives_the_bits_of_an_unbroken_one(backend, mode, how):
    unbroken, first = (make(backend, make_params(mode.dtype), **mode.options) for _ in range(2))
    train(unbroken, range(4))
    train(first, range(2))
    resumed = COPIES[how](first, make(backend, copy.deepcopy(params_of(first)), **mode.options))
    assert everything(resumed) == everything(first)
    train(resumed, range(2, 4))
    assert everything(resumed) == everything(unbroken)


def test_it_goes_on_on_the_other_backend(backend):
    first = make(backend, make_params(BF16))
    train(first, range(2))
    another = next(engine for engine in ENGINES if engine != backend)
    other = make(another, copy.deepcopy(params_of(first)))
    other.load_state_dict(saved_and_loaded(first.state_dict()))
    assert list(map(bits, averages(other))) == list(map(bits, averages(first)))
    for optimizer in (first, other):
        train(optimizer, [2])
    torch.testing.assert_close(averages(first), averages(other), rtol=2**-7, atol=2**-7)


def test_an_average_from_elsewhere(backend):
    """In another dtype, in another order, without its count: it has begun."""
    optimizer = make(backend, make_params(FP32)[:1])
    (param,) = params_of(optimizer)
    ema = random((4, 3), 5, FP64).t()
    optimizer.state[param]["ema"] = ema
    train(optimizer, [0])
    expected = Bounded.of(exact(ema.float())) * 0.9 + Bounded.of(exact(param)) * (1 - 0.9)
    assert_close(optimizer.state[param]["ema"], expected)


# Evaluation with the averages.


@every_mode
def test_swapped_and_back(backend, mode):
    """The contents, at their addresses; afterwards a step gives the bits that it gives without the swap."""
    optimizer, twin = (make(backend, make_params(mode.dtype), **mode.options) for _ in range(2))
    for each in (optimizer, twin):
        train(each, range(3))
    params = params_of(optimizer)
    before, addresses = everything(optimizer), [param.data_ptr() for param in params]
    expected = [ema.to(mode.dtype, copy=True) for ema in averages(optimizer)]
    with optimizer.swap_ema():
        assert torch.is_grad_enabled()
        assert list(map(bits, params)) == list(map(bits, expected))
        assert [param.data_ptr() for param in params] == addresses
        assert all(param.requires_grad and param.is_leaf for param in params)
        if mode.dtype == FP32:
            assert [bits(ema) for ema in averages(optimizer)] == before[0]
    assert everything(optimizer) == before
    for each in (optimizer, twin):
        train(each, range(3, 5))
    assert everything(optimizer) == everything(twin)


def test_what_raises_while_swapped(backend):
    optimizer = make(backend)
    train(optimizer, range(2))
    saved, before = copy.deepcopy(optimizer.state_dict()), everything(optimizer)
    asked = {
        "step": optimizer.step,
        "state_dict": optimizer.state_dict,
        "load_state_dict": lambda: optimizer.load_state_dict(saved),
        "swap_ema": optimizer.swap_ema().__enter__,
        "copy": lambda: copy.deepcopy(optimizer),
    }
    with optimizer.swap_ema():
        swapped = everything(optimizer)
        for what, function in asked.items():
            with pytest.raises(RuntimeError, match=f"{what} within swap_ema"):
                function()
        assert everything(optimizer) == swapped
    assert everything(optimizer) == before
    optimizer.step()


def test_an_exception_restores(backend):
    optimizer = make(backend, [*make_params(FP32), *make_params(BF16)])
    train(optimizer, range(2))
    before = everything(optimizer)
    with pytest.raises(KeyError), optimizer.swap_ema():
        raise KeyError
    assert everything(optimizer) == before
    with optimizer.swap_ema():
        pass


def test_a_swap_that_fails_halfway_restores(backend):
    optimizer = make(backend)
    train(optimizer, range(2))
    last = params_of(optimizer)[1]
    optimizer.state[last]["ema"] = torch.ones(7, device=DEVICE)
    before = everything(optimizer)
    with pytest.raises(RuntimeError), optimizer.swap_ema():
        pytest.fail("swapped")
    assert everything(optimizer) == before
    optimizer.state_dict()  # which would raise if it were still swapped


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_shared_memory_and_a_parameter_twice(backend):
    memory = random((8,), 0, FP32)
    params = [Parameter(memory[:6]), Parameter(memory[3:]), *make_params(FP32)[:1]]
    optimizer = make(backend, [*params, params[2]])
    train(optimizer, range(3))
    before = everything(optimizer)
    average, own = optimizer.state[params[2]]["ema"].clone(), params[2].detach().clone()
    with optimizer.swap_ema():
        assert torch.equal(params[2].detach(), average)
        assert not torch.equal(params[2].detach(), own)
    assert everything(optimizer) == before


def test_without_averages(backend):
    optimizer = make(backend, ema_decay=None)
    with (
        pytest.raises(RuntimeError, match="swap_ema needs averages: give the optimizer an ema_decay"),
        optimizer.swap_ema(),
    ):
        pass
    groups = [{"params": make_params(FP16)}, {"params": make_params(FP32), "fusedopt_ema_decay": None}]
    optimizer = make(backend, groups)
    before = list(map(bits, params_of(optimizer)))
    with optimizer.swap_ema():  # nothing has stepped
        assert list(map(bits, params_of(optimizer))) == before
    train(optimizer, range(2))
    others = optimizer.param_groups[1]["params"]
    before = list(map(bits, others))
    with optimizer.swap_ema():
        assert list(map(bits, others)) == before


def test_backward_through_swapped_weights_is_noticed(backend):
    optimizer = make(backend)
    train(optimizer, range(2))
    param = params_of(optimizer)[0]
    loss = param.square().sum()
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_evaluates_in_inference_mode(backend):
    optimizer = make(backend)
    train(optimizer, range(3))
    param, before = params_of(optimizer)[0], everything(optimizer)
    expected = optimizer.state[param]["ema"].sum()
    with torch.inference_mode(), optimizer.swap_ema():
        assert param.sum() == expected
    with optimizer.swap_ema(), torch.inference_mode():
        assert param.sum() == expected
    assert everything(optimizer) == before
    train(optimizer, [3])
