"""`__setstate__` with what old pickles lack: torch's classes take them, each with defaults for its newer options."""

from collections import defaultdict

import pytest
import torch

from tests.twins import BACKENDS, OPTIMIZERS, assert_same, make, make_params, make_torch, params_of, set_grads, train

pytestmark = pytest.mark.usefixtures("exact_products")
both_backends = pytest.mark.parametrize("backend", BACKENDS)
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)

NEWER = {"maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"}


def old(options):
    return {key: value for key, value in options.items() if key not in NEWER}


def old_groups(optimizer):
    return list(map(old, optimizer.param_groups))


def with_groups_only(optimizer):
    optimizer.__setstate__({"param_groups": old_groups(optimizer)})
    return optimizer


def with_nothing(optimizer):
    optimizer.__setstate__({})
    return optimizer


def with_new_states(optimizer):
    optimizer.__setstate__({"state": defaultdict(dict), "param_groups": old_groups(optimizer)})
    return optimizer


def unpickled(optimizer):
    made = type(optimizer).__new__(type(optimizer))
    state = {"state": optimizer.state, "param_groups": old_groups(optimizer), "defaults": old(optimizer.defaults)}
    made.__setstate__(state)
    return made


def unpickled_with_numbers(optimizer):
    """As before torch 1.12 made tensors of `step` and of its like."""
    for state in optimizer.state.values():
        state.update({k: v.item() for k, v in state.items() if isinstance(v, torch.Tensor) and k in SCALAR_STATES})
    return unpickled(optimizer)


SCALAR_STATES = {"step", "mu_product", "eta", "mu"}
HOW = [with_groups_only, with_nothing, with_new_states, unpickled, unpickled_with_numbers]


@both_backends
@every_optimizer
@pytest.mark.parametrize("how", HOW, ids=lambda how: how.__name__)
def test_takes_what_torch_takes(name, backend, how):
    optimizers = []
    for optimizer in (make(name, make_params(of=name), backend=backend), make_torch(name, make_params(of=name))):
        train(optimizer, range(2))
        optimizers.append(how(optimizer))
        if backend != "eager" and not optimizers[1:]:
            optimizers[0].backend = backend  # which no pickle of torch's has
        train(optimizers[-1], range(2, 4))
    assert_same(*optimizers, check_dtype=False)
    mine, theirs = (set(optimizer.param_groups[0]) for optimizer in optimizers)
    assert mine == theirs
    assert mine >= NEWER & set(make(name, make_params(of=name)).defaults)


@both_backends
@every_optimizer
def test_new_groups_of_an_unpickled_optimizer(name, backend):
    """They take the defaults, which are those of the class where the pickle had none."""
    optimizer = make(name, make_params(of=name), backend=backend)
    unpickled_one = unpickled(optimizer)
    more = [make_params(of=name)[0] for _ in range(2)]
    for each, param in zip((optimizer, unpickled_one), more, strict=True):
        each.add_param_group({"params": [param]})
    first, second = (options_of(each.param_groups[1]) for each in (optimizer, unpickled_one))
    assert first == second
    set_grads(params_of(unpickled_one), 0)
    unpickled_one.step()


def options_of(group):
    return {key: value for key, value in group.items() if key != "params"}
