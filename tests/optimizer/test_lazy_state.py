"""States that are loaded when they are asked for, by the optimizer's parameter or in a checkpoint."""

from collections import UserDict, defaultdict
from collections.abc import Mapping

import pytest
import torch

from tests.twins import (
    BACKENDS,
    OPTIMIZERS,
    assert_same,
    bits,
    make,
    make_params,
    make_torch,
    params_of,
    set_grads,
    train,
)

pytestmark = pytest.mark.usefixtures("exact_products")
both_backends = pytest.mark.parametrize("backend", BACKENDS)
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


class OnDisk:
    """What stands for a tensor that has been put away."""

    def __init__(self, tensor):
        self.kept = tensor.clone()


class Loading:
    """A mapping that brings the tensors of a state back whenever that is asked for."""

    loads = 0

    def __getitem__(self, key):
        state = super().__getitem__(key)
        for name, value in state.items():
            if isinstance(value, OnDisk):
                state[name] = value.kept
                self.loads += 1
        return state

    def put_away(self):
        for key in list(self):
            state = super().__getitem__(key)
            state.update({name: OnDisk(value) for name, value in state.items() if isinstance(value, torch.Tensor)})


class LoadingDefaultDict(Loading, defaultdict):
    def __init__(self, states=()):
        super().__init__(dict, states)


class LoadingUserDict(Loading, UserDict):
    def __missing__(self, key):
        return self.data.setdefault(key, {})


@both_backends
@every_optimizer
@pytest.mark.parametrize("kind", [LoadingDefaultDict, LoadingUserDict])
@pytest.mark.parametrize("begun", [0, 2])
def test_states_that_are_put_away_between_steps(kind, name, backend, begun):
    optimizers = make(name, make_params(of=name), backend=backend), make_torch(name, make_params(of=name))
    for optimizer in optimizers:
        train(optimizer, range(begun))
        optimizer.state = kind(dict(optimizer.state))
        for step in range(begun, begun + 3):
            optimizer.state.put_away()
            set_grads(params_of(optimizer), step)
            optimizer.step()
        optimizer.state = defaultdict(dict, {param: optimizer.state[param] for param in list(optimizer.state)})
    assert_same(*optimizers)


@both_backends
def test_only_what_a_step_reads_is_loaded(backend):
    optimizer = make("Adam", make_params(), backend=backend)
    train(optimizer, range(1))
    optimizer.state = LoadingDefaultDict(optimizer.state)
    optimizer.state.put_away()
    params = params_of(optimizer)
    optimizer.param_groups[0]["params"] = params[:1]
    set_grads(params[:1], 1)
    optimizer.step()
    assert optimizer.state.loads == 3


@both_backends
def test_averages_are_loaded(backend):
    optimizer = make("Adam", make_params(), backend=backend, ema_decay=0.5)
    train(optimizer, range(2))
    averages = [bits(optimizer.state[param]["ema"]) for param in params_of(optimizer)]
    optimizer.state = LoadingDefaultDict(optimizer.state)
    optimizer.state.put_away()
    with optimizer.swap_ema():
        assert list(map(bits, params_of(optimizer))) == averages


class Lazy(Mapping):
    """Neither a dict nor changeable."""

    def __init__(self, values):
        self._values = values

    def __getitem__(self, key):
        value = self._values[key]
        return value() if callable(value) else value

    def __iter__(self):
        return iter(self._values)

    def __len__(self):
        return len(self._values)


@both_backends
@every_optimizer
@pytest.mark.parametrize("inner", [dict, Lazy])
def test_a_checkpoint_that_loads_itself(name, backend, inner):
    """torch takes a mapping for all states; for the state of one parameter it makes one of its keys, and fails."""
    saved = make_torch(name, make_params(of=name))
    train(saved, range(2))
    checkpoint = saved.state_dict()
    lazy = {key: lambda state=state: inner(state) for key, state in checkpoint["state"].items()}
    optimizers = make(name, make_params(of=name), backend=backend), make_torch(name, make_params(of=name))
    for optimizer in optimizers:
        plain = optimizer is optimizers[1] and inner is Lazy
        optimizer.load_state_dict({**checkpoint, "state": checkpoint["state"] if plain else Lazy(lazy)})
        train(optimizer, range(2, 4))
    assert_same(*optimizers, check_dtype=False)  # torch casts what it loads
