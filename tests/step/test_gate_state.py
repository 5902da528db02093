"""The counter of skipped steps, checkpoints of it, and values of the options that are refused or changed later."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Parameter

import fusedopt
from fusedopt.options import KEYS
from tests.conftest import DEVICE
from tests.distributed.test_state import make_model
from tests.distributed.test_state import train as train_model
from tests.optimizer.test_errors import refused
from tests.optimizer.test_state import saved_and_loaded
from tests.step.test_grad_scaler import number
from tests.twins import BACKENDS, bits, in_group, make_params, params_of, set_grads, train

NAN = float("nan")
OPTIONS = {"skip_nonfinite": True, "max_grad_norm": 0.5, "ema_decay": 0.9}

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def make(backend, params=None, **options):
    return fusedopt.AdamW(make_params() if params is None else params, lr=0.01, backend=backend, **options)


def skip(optimizer, times=1):
    set_grads(params_of(optimizer), 0)
    params_of(optimizer)[0].grad.fill_(NAN)
    for _ in range(times):
        optimizer.step()
    return optimizer


def overflow(optimizer):
    """As GradScaler tells of it."""
    set_grads(params_of(optimizer), 0)
    optimizer.grad_scale, optimizer.found_inf = number(1.0), number(1.0)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


def assert_counted(optimizer, count):
    counter = optimizer.skipped_steps
    assert (counter.shape, counter.dtype) == ((), torch.int64)
    assert counter == count


def test_counts_on_the_device(backend):
    optimizer = make(backend, skip_nonfinite=True)
    assert_counted(optimizer, 0)
    train(optimizer, range(1))
    assert_counted(optimizer, 0)
    assert_counted(skip(optimizer, 2), 2)
    where = DEVICE if backend != "eager" else "cpu"
    assert optimizer.skipped_steps.device.type == where


def through_a_file(optimizer, backend):
    other = make(backend, copy.deepcopy(params_of(optimizer)), **OPTIONS)
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    return other


COPIES = {
    "file": through_a_file,
    "other backend": lambda optimizer, backend: through_a_file(optimizer, *({*BACKENDS} - {backend})),
    "itself": lambda optimizer, _: optimizer.load_state_dict(optimizer.state_dict()) or optimizer,
    "deepcopy": lambda optimizer, _: copy.deepcopy(optimizer),
    "pickle": lambda optimizer, _: pickle.loads(pickle.dumps(optimizer)),
}


@pytest.mark.parametrize("how", COPIES)
def test_the_count_is_saved(backend, how):
    """And what was saved or copied does not count on with the optimizer."""
    optimizer = skip(make(backend, **OPTIONS), 2)
    train(optimizer, range(2))
    copied = COPIES[how](optimizer, backend)
    assert_counted(copied, 2)
    if copied is not optimizer:
        assert_counted(skip(optimizer), 3)
        assert_counted(copied, 2)
    assert_counted(skip(copied), 3)


@pytest.mark.parametrize("saved", [2, 2.0, torch.tensor([2]), torch.tensor(2, dtype=torch.int32)], ids=str)
def test_the_count_in_other_forms(backend, saved):
    """As trainers convert what they save."""
    optimizer = make(backend, **OPTIONS)
    state_dict = optimizer.state_dict()
    state_dict["param_groups"][0]["fusedopt_skipped_steps"] = saved
    optimizer.load_state_dict(state_dict)
    assert optimizer.skipped_steps == 2
    assert_counted(skip(optimizer), 3)
    assert saved == 2


def test_the_count_is_that_of_the_checkpoint(backend):
    optimizer = make(backend, **OPTIONS)
    at_first = copy.deepcopy(optimizer.state_dict())
    skip(optimizer, 2)
    optimizer.load_state_dict(at_first)
    assert_counted(optimizer, 0)
    assert_counted(skip(optimizer), 1)


def test_groups_come_and_go(backend):
    """The first one holds the count; another one that becomes the first goes on with it."""
    optimizer = skip(make(backend, **OPTIONS), 2)
    optimizer.add_param_group({"params": [Parameter(torch.ones(3, dtype=torch.float64, device=DEVICE))]})
    assert_counted(skip(optimizer), 3)
    optimizer.param_groups.reverse()
    assert_counted(skip(optimizer), 4)
    optimizer.param_groups.pop()
    assert_counted(skip(optimizer), 5)


def test_scalers_skips_are_counted_but_not_saved(backend):
    """Whoever has asked for no option has the state_dict of torch's class."""
    optimizer = make(backend)
    train(optimizer, range(1))
    before = copy.deepcopy(optimizer.state_dict())
    overflow(optimizer)
    assert_counted(optimizer, 1)
    assert bits(optimizer.state_dict()) == bits(before)
    assert_counted(copy.deepcopy(optimizer), 1)
    for group in optimizer.param_groups:
        group["fusedopt_skip_nonfinite"] = True
    assert_counted(skip(optimizer), 2)
    assert optimizer.state_dict()["param_groups"][0]["fusedopt_skipped_steps"] == 2


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_distributed_checkpoints(backend, name, flatten):
    """The count and the averages arrive, and training goes on with the same bits; SGD's buffers have not begun."""
    how = StateDictOptions(flatten_optimizer_state_dict=flatten)
    options = {"momentum": 0.9, "dampening": 0.5} if name == "SGD" else {}
    model = make_model()
    optimizer = getattr(fusedopt, name)(model.parameters(), lr=0.01, backend=backend, **OPTIONS, **options)
    skip(optimizer, 2)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=how))
    other_model = copy.deepcopy(model)
    other_model.zero_grad()
    other = getattr(fusedopt, name)(other_model.parameters(), lr=0.01, backend=backend, **OPTIONS, **options)
    set_optimizer_state_dict(other_model, other, saved, options=how)
    assert_counted(other, 2)
    train_model(model, optimizer, range(2))
    train_model(other_model, other, range(2))
    assert list(map(bits, other_model.parameters())) == list(map(bits, model.parameters()))
    for param, twin in zip(model.parameters(), other_model.parameters(), strict=True):
        assert bits(other.state[twin]["ema"]) == bits(optimizer.state[param]["ema"])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_flat_checkpoint_from_before_the_scaler(backend):
    """A key of a group that the checkpoint has not would be an error there."""
    how = StateDictOptions(flatten_optimizer_state_dict=True)
    model = make_model()
    optimizer = make(backend, model.parameters())
    train_model(model, optimizer, range(1))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=how))
    overflow(optimizer)
    model.zero_grad()
    set_optimizer_state_dict(model, optimizer, saved, options=how)


# Values that are refused.


BAD = [
    ("max_grad_norm", -1.0, ValueError, "Invalid max_grad_norm of group 0: -1.0"),
    ("max_grad_norm", NAN, ValueError, "Invalid max_grad_norm of group 0: nan"),
    ("max_grad_norm", True, TypeError, "max_grad_norm of group 0 must be a number or None"),
    ("max_grad_norm", "1", TypeError, "max_grad_norm of group 0 must be a number or None, but it is '1'"),
    ("max_grad_norm", torch.tensor(-1.0), ValueError, "Invalid max_grad_norm of group 0: -1.0"),
    ("max_grad_norm", torch.ones(2), ValueError, "Tensor max_grad_norm of group 0 must be 1-element"),
    ("max_grad_norm", torch.tensor(True), TypeError, "Tensor max_grad_norm of group 0 must be real, but .* torch.bool"),
    ("skip_grad_norm", -1, ValueError, "Invalid skip_grad_norm of group 0: -1.0, it must not be negative"),
    ("skip_grad_norm", NAN, ValueError, "Invalid skip_grad_norm of group 0: nan"),
    ("skip_grad_norm", False, TypeError, "skip_grad_norm of group 0 must be a number or None"),
    ("skip_grad_norm", torch.tensor(1j), TypeError, "Tensor skip_grad_norm of group 0 must be real"),
    ("skip_nonfinite", None, TypeError, "skip_nonfinite of group 0 must be True or False, but it is None"),
    ("skip_nonfinite", 2, TypeError, "skip_nonfinite of group 0 must be True or False"),
    ("skip_nonfinite", torch.tensor(True), TypeError, "skip_nonfinite of group 0 must be True or False"),
    ("ema_decay", -0.1, ValueError, r"Invalid ema_decay of group 0: -0.1, it must lie in \[0, 1\)"),
    ("ema_decay", 1.0, ValueError, "Invalid ema_decay of group 0: 1.0"),
    ("ema_decay", NAN, ValueError, "Invalid ema_decay of group 0: nan"),
    ("ema_decay", False, TypeError, "ema_decay of group 0 must be a number or None"),
    ("ema_decay", torch.tensor([1.0]), ValueError, "Invalid ema_decay of group 0: 1.0"),
    ("ema_decay", torch.zeros(0), ValueError, "Tensor ema_decay of group 0 must be 1-element"),
]


@pytest.mark.parametrize(("name", "value", "error", "match"), BAD)
def test_bad_values(backend, name, value, error, match):
    """At construction, and at the step for one that was set later, before anything is written."""
    with pytest.raises(error, match=match):
        make(backend, **{name: value})
    optimizer = make(backend)
    for steps in (0, 2):
        train(optimizer, range(steps))
        set_grads(params_of(optimizer), 3)
        before = optimizer.param_groups[0].get(KEYS[name])
        for group in optimizer.param_groups:
            group[KEYS[name]] = value
        with refused(optimizer, error, match):
            optimizer.step()
        for group in optimizer.param_groups:
            group[KEYS[name]] = before if name != "skip_nonfinite" else False
    train(optimizer, range(3, 4))
    twin = make(backend)
    train(twin, [0, 1, 3])
    assert list(map(bits, params_of(optimizer))) == list(map(bits, params_of(twin)))


DIFFERENT = [
    ("max_grad_norm", 1.0, 2.0),
    ("max_grad_norm", 1.0, None),
    ("skip_nonfinite", False, True),
    ("skip_grad_norm", 1e3, 2e3),
]


@pytest.mark.parametrize(("name", "first", "second"), DIFFERENT)
def test_what_is_one_for_all_groups(backend, name, first, second):
    one, other, third = make_params()
    match = f"{name} is one for all groups.*{first} in group 0 and {second} in group 1"
    with pytest.raises(ValueError, match=match):
        make(backend, [{"params": [one], KEYS[name]: first}, {"params": [other], KEYS[name]: second}])
    optimizer = make(backend, [{"params": [one]}, {"params": [other]}], **{name: first})
    with pytest.raises(ValueError, match=f"{first} in group 0 and {second} in group 2"):
        optimizer.add_param_group({"params": [third], KEYS[name]: second})
    assert len(optimizer.param_groups) == 2
    for steps in (0, 2):
        train(optimizer, range(steps))
        set_grads([one, other], 3)
        optimizer.param_groups[1][KEYS[name]] = second
        with refused(optimizer, ValueError, match):
            optimizer.step()
        optimizer.param_groups[1][KEYS[name]] = first
        optimizer.step()


def test_other_numbers_are_numbers(backend):
    """Of numpy, and ints."""
    optimizer = make(backend, max_grad_norm=np.float64(1), ema_decay=0, skip_nonfinite=np.True_)
    train(optimizer, range(1))
    optimizer.param_groups[0].update(in_group(max_grad_norm=2, ema_decay=np.float32(0.5)))
    train(optimizer, range(1))
    assert optimizer.grad_norm > 0
