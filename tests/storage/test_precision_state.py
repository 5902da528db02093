"""Low precision over many steps: the same bits again, checkpoints, random numbers that are independent."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import fusedopt
from fusedopt.engines.signature import Signature
from tests.cases import BF16, FP32, MODES
from tests.conftest import DEVICE
from tests.distributed.test_state import make_model
from tests.distributed.test_state import options as distributed_options
from tests.distributed.test_state import train as train_model
from tests.optimizer.test_custom import readme_class  # noqa: F401
from tests.optimizer.test_state import saved_and_loaded
from tests.twins import BACKENDS, bits, params_of, random, set_grads, train
from tests.twins import make as make_named

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


every_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.id)


STOCHASTIC = [mode for mode in MODES if mode.options.get("rounding") == "stochastic"]


SHAPES = [(3, 4), (1000,), (), (70, 3)]


def make_params(dtype, shapes=SHAPES):
    return [torch.nn.Parameter(random(shape, seed, dtype)) for seed, shape in enumerate(shapes)]


def make(mode, backend, params=None, **options):
    params = make_params(mode.dtype) if params is None else params
    return fusedopt.AdamW(params, lr=0.01, amsgrad=True, backend=backend, **{**mode.options, **options})


def twin_params(optimizer):
    return [torch.nn.Parameter(param.detach().clone()) for param in params_of(optimizer)]


def values(optimizer):
    """The bits of parameters and states, whichever object holds them."""
    params = params_of(optimizer)
    states = [{name: bits(value) for name, value in optimizer.state[param].items()} for param in params]
    return [bits(param) for param in params], states


@every_mode
def test_the_same_run_gives_the_same_bits(mode, backend):
    first, second = make(mode, backend), make(mode, backend)
    train(first, range(3))
    train(second, range(3))
    assert values(first) == values(second)


def through_a_file(optimizer, mode, backend):
    other = make(mode, backend, twin_params(optimizer))
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    return other


COPIES = {
    "file": through_a_file,
    "deepcopy": lambda optimizer, *_: copy.deepcopy(optimizer),
    "pickle": lambda optimizer, *_: pickle.loads(pickle.dumps(optimizer)),
}


COPIED = [(mode, "file") for mode in MODES]


COPIED += [(mode, how) for mode in MODES if mode.dtype == BF16 and len(mode.options) == 1 for how in COPIES]


@pytest.mark.parametrize(("mode", "how"), COPIED, ids=[f"{mode.id}-{how}" for mode, how in COPIED])
def test_a_resumed_run_gives_the_bits_of_an_unbroken_one(mode, backend, how):
    unbroken, first = make(mode, backend), make(mode, backend)
    train(unbroken, range(4))
    train(first, range(2))
    resumed = COPIES[how](first, mode, backend)
    assert values(resumed) == values(first)
    train(resumed, range(2, 4))
    assert values(resumed) == values(unbroken)


@every_mode
def test_it_goes_on_on_the_other_backend(mode, backend):
    """A checkpoint of one loads into the other, which finds all states that it needs."""
    first = make(mode, backend)
    train(first, range(2))
    other = make(mode, *({*BACKENDS} - {backend}), twin_params(first))
    other.load_state_dict(saved_and_loaded(first.state_dict()))
    names = [set(state) for state in other.state.values()]
    train(other, range(2, 3))
    train(first, range(2, 3))
    assert [set(state) for state in other.state.values()] == names
    for param, twin in zip(params_of(first), params_of(other), strict=True):
        torch.testing.assert_close(param, twin, rtol=2**-7, atol=2**-7)


def with_tiling(monkeypatch, block_size, chunk_size):
    monkeypatch.setattr(Signature, "tiling", property(lambda signature: (block_size, chunk_size)))


@pytest.mark.parametrize("mode", STOCHASTIC, ids=lambda mode: mode.id)
def test_the_bits_do_not_depend_on_chunks_or_alignment(mode, backend, monkeypatch):
    def run(params):
        optimizer = make(mode, backend, params)
        for step in range(2):
            set_grads(params_of(optimizer), step)
            if len(params) > 1:
                grad = torch.empty(1001, dtype=mode.dtype, device=DEVICE)[1:]
                params[1].grad = grad.copy_(params[1].grad)
            optimizer.step()
        return values(optimizer)

    expected = run(make_params(mode.dtype))
    with_tiling(monkeypatch, 256, 512)
    assert run(make_params(mode.dtype)) == expected
    shifted = make_params(mode.dtype)
    shifted[1] = torch.nn.Parameter(torch.empty(1001, dtype=mode.dtype, device=DEVICE)[1:].copy_(shifted[1].detach()))
    assert run(shifted) == expected


def stochastic_sgd(params, backend, **options):
    return fusedopt.SGD(params, lr=1.0, rounding="stochastic", backend=backend, **options)


def decisions(param):
    """Which of many numbers halfway between two neighbours were rounded down."""
    return param.detach() == 1 - 2**-8


def between_two(count=4096):
    """bf16 ones, and gradients that take them halfway to the next number below."""
    param = torch.nn.Parameter(torch.ones(count, dtype=BF16, device=DEVICE))
    param.grad = torch.full_like(param, 2**-9)
    return param


def assert_independent(first, second):
    """About half of the decisions agree: within 4 standard errors."""
    agreeing = (first == second).sum().item()
    assert abs(agreeing - len(first) / 2) <= 4 * (len(first) / 4) ** 0.5


def test_tensors_steps_and_seeds_are_independent(backend):
    params = [between_two(), between_two()]
    optimizer = stochastic_sgd(params, backend)
    optimizer.step()
    first, second = map(decisions, params)
    assert_independent(first, torch.zeros_like(first))
    assert_independent(first, second)
    params[0].data.fill_(1)
    optimizer.step()
    assert_independent(first, decisions(params[0]))
    other = between_two()
    stochastic_sgd([other], backend, seed=1).step()
    assert_independent(first, decisions(other))


def test_replicas_agree(backend):
    """Whatever the state of torch's own random numbers, and wherever the memory lies."""
    replicas = [[between_two(), between_two()] for _ in range(2)]
    for seed, params in enumerate(replicas):
        torch.manual_seed(seed)
        stochastic_sgd(params, backend, seed=2**64 - 1).step()
    assert list(map(bits, replicas[0])) == list(map(bits, replicas[1]))


def test_groups_have_their_own_seeds_and_a_new_one_is_noticed(backend):
    params = [between_two(), between_two()]
    groups = [{"params": params[:1], "fusedopt_seed": 3}, {"params": params[1:], "fusedopt_rounding": "nearest"}]
    optimizer = stochastic_sgd(groups, backend)
    optimizer.step()
    first = decisions(params[0])
    assert not decisions(params[1]).any(), "halfway, the even number is the nearest"

    alone = between_two()
    stochastic_sgd([alone], backend, seed=3).step()
    assert torch.equal(decisions(alone), first)
    for optimizer_of, param in ((optimizer, params[0]), (stochastic_sgd([alone], backend, seed=4), alone)):
        param.data.fill_(1)
        optimizer_of.param_groups[0]["fusedopt_seed"] = 4
        optimizer_of.param_groups[0]["fusedopt_rounding_step"] = 0
        optimizer_of.step()
    assert torch.equal(decisions(alone), decisions(params[0]))
    assert_independent(first, decisions(alone))


def test_rounding_step_counts_the_steps_of_the_optimizer(backend):
    """Whichever parameters have gradients, if any has. It is no state, which programs would want to cut."""
    params = [between_two(), between_two()]
    optimizer = stochastic_sgd(params, backend)
    optimizer.step()
    params[1].grad = None
    optimizer.step()
    params[0].grad = None
    optimizer.step()
    count = optimizer.state_dict()["param_groups"][0]["fusedopt_rounding_step"]
    assert (count.item(), count.shape, count.dtype) == (2, (), torch.int64)
    assert not optimizer.state


def test_loaded_states_keep_their_dtype(backend):
    """`state_dtype` is that of new states: a checkpoint loses nothing."""
    param = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    theirs = torch.optim.Adam([param])
    param.grad = torch.full_like(param, 1 / 3)
    theirs.step()
    ours = fusedopt.Adam([param], state_dtype=BF16, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    assert bits(ours.state[param]["exp_avg"]) == bits(theirs.state[param]["exp_avg"])
    ours.step()
    assert ours.state[param]["exp_avg"].dtype == FP32


def states_of(model, optimizer):
    """Their bits."""
    states = [optimizer.state[param] for param in model.parameters()]
    return [{key: bits(value) for key, value in state.items()} for state in states]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
@every_mode
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_distributed_checkpoints(name, backend, flatten, mode):
    """All extra states arrive, and training goes on with the same bits."""
    how = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = make_model(mode.dtype)
    with torch.no_grad():
        model[0].weight[0] = torch.tensor([-0.0, 0.0, 1e-5, -1e4])
    options = {**distributed_options(name), **mode.options}
    if name == "AdamW":
        options["amsgrad"] = True  # as elsewhere in every mode, so that its kernels are there
    optimizer = make_named(name, model.parameters(), backend=backend, **options)
    train_model(model, optimizer, range(2))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=how))
    other_model = copy.deepcopy(model)
    other_model.zero_grad()
    before = [bits(param) for param in other_model.parameters()]
    other = make_named(name, other_model.parameters(), backend=backend, **options)
    set_optimizer_state_dict(other_model, other, saved, options=how)
    assert [bits(param) for param in other_model.parameters()] == before
    assert states_of(model, optimizer) == states_of(other_model, other)
    train_model(model, optimizer, range(2, 4))
    train_model(other_model, other, range(2, 4))
    assert [bits(param) for param in other_model.parameters()] == [bits(param) for param in model.parameters()]


def test_what_does_not_round_counts_alike(backend):
    """fp32 beside bf16, in a group that rounds at random: if it becomes bf16 later, both backends draw the same."""
    wide = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = fusedopt.Adam([wide, between_two(3)], rounding="stochastic", backend=backend)
    wide.grad = torch.ones_like(wide)
    for _ in range(3):
        optimizer.step()
    assert optimizer.param_groups[0]["fusedopt_rounding_step"] == 3


def test_a_checkpoint_without_the_options_leaves_them_on(backend):
    plain = fusedopt.AdamW(make_params(BF16), backend=backend)
    train(plain, range(2))
    ours = fusedopt.AdamW(twin_params(plain), master_weights=True, backend=backend)
    ours.load_state_dict(saved_and_loaded(plain.state_dict()))
    train(ours, range(2, 3))
    assert all("master_param" in ours.state[param] for param in params_of(ours))


def test_the_seed_is_saved(backend):
    """So that a resumed run rounds as the unbroken one does, whatever the new optimizer was given."""
    unbroken, first = ([between_two()] for _ in range(2))
    optimizers = [stochastic_sgd(params, backend) for params in (unbroken, first)]
    for optimizer in optimizers:
        optimizer.step()
    assert optimizers[1].param_groups[0]["fusedopt_seed"] == 0
    resumed = twin_params(optimizers[1])
    other = stochastic_sgd(resumed, backend, seed=9)
    other.load_state_dict(saved_and_loaded(optimizers[1].state_dict()))
    for params, optimizer in ((unbroken, optimizers[0]), (resumed, other)):
        params[0].grad = torch.full_like(params[0], 2**-9)
        optimizer.step()
    assert bits(unbroken[0]) == bits(resumed[0])
