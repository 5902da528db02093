"""SGD with dampening must know whether a buffer has begun, which torch sees by its absence."""

import copy
import pickle

import pytest
import torch

import fusedopt
from tests.twins import BACKENDS, assert_same, make_params, make_torch, params_of, set_grads, train

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
OPTIONS = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}


@pytest.fixture
def pair(backend):
    mine = fusedopt.SGD(make_params(), backend=backend, **OPTIONS)
    return mine, make_torch("SGD", make_params(), **OPTIONS)


def train_both(pair, steps):
    for optimizer in pair:
        train(optimizer, steps)


def test_it_is_no_part_of_the_state(pair):
    mine, _ = pair
    train(mine, range(2))
    assert all(set(values) == {"momentum_buffer"} for values in mine.state.values())


def test_a_buffer_is_replaced_through_the_state_dict(pair):
    """Which holds the dicts of the state itself, as torch's does."""
    train_both(pair, range(2))
    for optimizer in pair:
        for values in optimizer.state_dict()["state"].values():
            values["momentum_buffer"] = torch.ones_like(values["momentum_buffer"])
    train_both(pair, range(2, 4))
    assert_same(*pair)


def test_hooks_do_not_see_it(pair):
    mine, _ = pair
    train(mine, range(2))
    seen = []
    mine.register_state_dict_post_hook(lambda _, saved: seen.extend(saved["state"].values()))
    mine.state_dict()
    assert [set(values) for values in seen] == [{"momentum_buffer"}] * 3


def test_a_hook_may_return_another_dict(pair):
    mine, _ = pair
    train(mine, range(1))
    mine.register_state_dict_post_hook(lambda _, saved: {"inner": saved})
    (saved,) = mine.state_dict().values()
    assert set(saved["state"][0]) == {"momentum_buffer"}


def test_a_parameter_that_begins_later(pair):
    for optimizer in pair:
        first, *rest = params_of(optimizer)
        for step in range(4):
            set_grads(rest if step < 2 else [first, *rest], step)
            optimizer.step()
    assert_same(*pair)


@pytest.mark.parametrize("before", [0, 2], ids=["at once", "after steps"])
def test_a_loaded_buffer_has_begun(pair, before):
    train_both(pair, range(before))
    for optimizer in pair:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train_both(pair, range(before, before + 2))
    assert_same(*pair)


@pytest.mark.parametrize("before", [0, 2], ids=["at once", "after steps"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy(pair, copied, before):
    train_both(pair, range(before))
    mine, theirs = map(copied, pair)
    train_both((mine, theirs), range(before, before + 2))
    assert_same(mine, theirs)


def cleared(optimizer):
    optimizer.state.clear()


def without_buffers(optimizer):
    for values in optimizer.state.values():
        del values["momentum_buffer"]


def emptied(optimizer):
    for values in optimizer.state.values():
        values["momentum_buffer"] = None


@pytest.mark.parametrize("reset", [cleared, without_buffers, emptied])
def test_a_buffer_that_is_gone_begins_anew(pair, reset):
    train_both(pair, range(2))
    for optimizer in pair:
        reset(optimizer)
    train_both(pair, range(2, 4))
    assert_same(*pair)


def test_dampening_switched_on_and_off(pair):
    for step, dampening in enumerate([0, 0.5, 0, 0.25]):
        for optimizer in pair:
            optimizer.param_groups[0]["dampening"] = dampening
        train_both(pair, range(step, step + 1))
    assert_same(*pair)


def test_an_old_checkpoint_without_buffers(pair):
    saved = copy.deepcopy(pair[1].state_dict())
    saved["state"] = {i: {"momentum_buffer": None} for i in range(3)}
    for optimizer in pair:
        optimizer.load_state_dict(saved)
    train_both(pair, range(2))
    assert_same(*pair)


def test_zero_init_is_dampened_from_the_first_step(backend):
    mine = fusedopt.SGD(make_params(), backend=backend, lr=0.1, momentum=0.9, dampening=0.5, zero_init_momentum=True)
    train(mine, range(1))
    for param in params_of(mine):
        torch.testing.assert_close(mine.state[param]["momentum_buffer"], 0.5 * param.grad)
    assert all(set(values) == {"momentum_buffer"} for values in mine.state.values())
