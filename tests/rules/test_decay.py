"""The forms of decoupled weight decay: their equations in float64, torch-optimi, schedulers, checkpoints, errors."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

import fusedopt
from fusedopt.rules.decay import FORMS
from tests.conftest import DEVICE
from tests.optimizer.test_state import saved_and_loaded
from tests.twins import ENGINES, bits, make_params, params_of, random, set_grads, train

FP64 = torch.float64
MAX_LR, WEIGHT_DECAY = 0.4, 0.3
DECOUPLED = {"decoupled_weight_decay": True}
CLASSES = {"Adam": DECOUPLED, "AdamW": {}, "NAdam": DECOUPLED, "RAdam": DECOUPLED, "Lion": {}}

every_engine = pytest.mark.parametrize("backend", ENGINES)
every_class = pytest.mark.parametrize("name", CLASSES)


def make(name, params, backend="eager", **options):
    return getattr(fusedopt, name)(params, backend=backend, weight_decay=WEIGHT_DECAY, **CLASSES[name], **options)


def param(seed=0, dtype=FP64):
    return Parameter(random((40,), seed, dtype))


class LionUpdates:
    """What torch lacks: Lion without a decay."""

    def __init__(self, params, lr):
        (self.param,), self.exp_avg = params, torch.zeros_like(params[0])
        self.param_groups = [{"lr": lr}]

    @torch.no_grad()
    def step(self):
        direction = (0.9 * self.exp_avg + 0.1 * self.param.grad).sign()
        self.param -= self.param_groups[0]["lr"] * direction
        self.exp_avg = 0.99 * self.exp_avg + 0.01 * self.param.grad


def without_decay(name, twin):
    if name == "Lion":
        return LionUpdates([twin], lr=0.1)
    return getattr(torch.optim, name)([twin], lr=0.1, weight_decay=0, **CLASSES[name])


def share(form, lr):
    """How much of a parameter a step takes."""
    return WEIGHT_DECAY * {"standard": lr, "fully_decoupled": lr / MAX_LR, "corrected": lr * lr / MAX_LR}[form]


@pytest.mark.usefixtures("fp64_scalars")
@every_engine
@pytest.mark.parametrize("form", FORMS)
@every_class
def test_the_equations(name, form, backend):
    """The update is that of an optimizer without decay, what is left of the difference is the decay."""
    ours = make(name, [mine := param()], backend, lr=0.1, weight_decay_form=form, max_lr=MAX_LR)
    theirs = without_decay(name, twin := Parameter(mine.detach().clone()))
    cautious, coupling = form.startswith("cautious"), form.removeprefix("cautious_").replace("cautious", "standard")
    sat_out = 0
    for step, lr in enumerate([0.1, 0.4, 0.3, 0.05, 0.2, 0.1, 0.01]):  # RAdam rectifies from the sixth step on
        ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = lr
        before = mine.detach().clone()
        mine.grad = twin.grad = random((40,), 10 + step, FP64)
        twin.data.copy_(before)
        ours.step()
        theirs.step()
        update = before - twin.detach()
        takes = ((update * before >= 0) | (not cautious)).to(FP64)
        sat_out += int((takes == 0).sum())
        expected = before - share(coupling, lr) * takes * before - update
        torch.testing.assert_close(mine.detach(), expected, rtol=1e-12, atol=1e-13)
    assert (sat_out > 0) == cautious


@pytest.mark.filterwarnings("ignore:You are using weight_decay")  # as much as shows in a few steps
@every_engine
def test_fully_decoupled_as_optimi(backend):
    """Whose max_lr is the lr of its group at construction, too."""
    optimi = pytest.importorskip("optimi", reason="torch-optimi is not installed")
    options = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.01}
    ours = fusedopt.AdamW(make_params(FP64), backend=backend, weight_decay_form="fully_decoupled", **options)
    theirs = optimi.AdamW(make_params(FP64), decouple_lr=True, foreach=False, triton=False, **options)
    for step in range(6):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 8)
            train(optimizer, range(step, step + 1))
        for mine, true in zip(params_of(ours), params_of(theirs), strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-12)


@every_engine
@every_class
def test_cautious_decays_where_nothing_moves(name, backend):
    """Where the update is 0, no sign is its opposite."""
    optimizer = make(name, [mine := param()], backend, lr=0.1, weight_decay_form="cautious")
    before = mine.detach().clone()
    mine.grad = torch.zeros_like(mine)
    optimizer.step()
    torch.testing.assert_close(mine.detach(), (1 - 0.1 * WEIGHT_DECAY) * before)


@every_class
def test_the_standard_form_is_the_default(name):
    optimizer = make(name, [param()], lr=0.1)
    assert not {"weight_decay_form", "max_lr"} & optimizer.param_groups[0].keys(), (
        "torch's checkpoints have no such key"
    )
    named = make(name, [param()], lr=0.1, weight_decay_form="standard")
    for each in (optimizer, named):
        train(each, range(3))
    assert list(map(bits, params_of(optimizer))) == list(map(bits, params_of(named)))


# The largest learning rate.


@pytest.mark.parametrize("form", ["fully_decoupled", "cautious_corrected"])
def test_max_lr_is_that_of_the_beginning(form):
    groups = [{"params": [param()]}, {"params": [param(1)], "lr": 0.2}, {"params": [param(2)], "max_lr": 0.5}]
    optimizer = make("AdamW", groups, lr=0.1, weight_decay_form=form)
    optimizer.add_param_group({"params": [param(3)], "lr": 0.3})
    assert [group["max_lr"] for group in optimizer.param_groups] == [0.1, 0.2, 0.5, 0.3]
    LambdaLR(optimizer, lambda step: 0.1)  # a warmup
    train(optimizer, range(1))
    assert [group["max_lr"] for group in optimizer.param_groups] == [0.1, 0.2, 0.5, 0.3]


def test_a_form_that_is_set_later():
    """The scheduler has kept with which lr the group began."""
    optimizer = make("AdamW", [mine := param()], lr=0.4)
    LambdaLR(optimizer, lambda step: 0.25)
    train(optimizer, range(1))
    optimizer.param_groups[0]["weight_decay_form"] = "fully_decoupled"
    twin = copy.deepcopy(optimizer)
    twin.param_groups[0].update(weight_decay_form="standard", weight_decay=WEIGHT_DECAY / 0.4)
    train(optimizer, range(1, 3))
    train(twin, range(1, 3))
    assert optimizer.param_groups[0]["max_lr"] == 0.4
    torch.testing.assert_close(mine, params_of(twin)[0])


@every_engine
def test_one_cycle_lr_sets_its_own(backend):
    optimizer = make("AdamW", [mine := param()], backend, lr=1e-3, weight_decay_form="fully_decoupled")
    scheduler = OneCycleLR(optimizer, max_lr=0.2, total_steps=10, cycle_momentum=False)
    twin = make("AdamW", [other := param()], backend, lr=1e-3)
    for step in range(5):
        lr = optimizer.param_groups[0]["lr"]
        twin.param_groups[0].update(lr=lr, weight_decay=WEIGHT_DECAY / 0.2)
        train(optimizer, range(step, step + 1))
        train(twin, range(step, step + 1))
        scheduler.step()
    torch.testing.assert_close(mine, other)


def test_max_lr_is_no_alias_of_a_tensor_lr():
    lr = torch.tensor(0.1, dtype=FP64)
    optimizer = make("AdamW", [param()], lr=lr, weight_decay_form="fully_decoupled")
    lr.fill_(0.01)
    assert optimizer.param_groups[0]["max_lr"] == 0.1
    train(optimizer, range(1))
    assert optimizer.param_groups[0]["max_lr"] == 0.1


def test_checkpoints_keep_it():
    optimizer = make("AdamW", [param()], lr=0.4, weight_decay_form="cautious_corrected")
    LambdaLR(optimizer, lambda step: 0.5)
    train(optimizer, range(2))
    resumed = make("AdamW", [param()], lr=0.4)
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert resumed.param_groups[0]["max_lr"] == 0.4
    assert resumed.param_groups[0]["weight_decay_form"] == "cautious_corrected"
    of_torch = torch.optim.AdamW([param()], lr=0.4)
    train(of_torch, range(1))
    for given, max_lr in (({}, 0.4), ({"max_lr": 0.5}, 0.5)):  # what was not given follows from the loaded lr
        mine = make("AdamW", [param()], lr=0.2, weight_decay_form="corrected", **given)
        mine.load_state_dict(of_torch.state_dict())
        train(mine, range(1))
        assert (mine.param_groups[0]["max_lr"], mine.param_groups[0]["weight_decay_form"]) == (max_lr, "corrected")


# Errors.

BAD = [
    (
        "AdamW",
        {"weight_decay_form": "cautios"},
        "weight_decay_form of group 0 must be one of 'standard', .* but it is 'cautios'",
    ),
    ("Lion", {"weight_decay_form": None}, "weight_decay_form of group 0 must be .* None"),
    ("Lion", {"weight_decay_form": 1}, "weight_decay_form of group 0 must be .* 1"),
    (
        "Adam",
        {"weight_decay_form": "cautious", "decoupled_weight_decay": False},
        "'cautious' of group 0 is a form",
    ),
    ("AdamW", {"weight_decay_form": "corrected", "max_lr": 0.0}, "Invalid max_lr of group 0: 0.0, it must be positive"),
    ("AdamW", {"weight_decay_form": "corrected", "max_lr": -1.0}, "Invalid max_lr of group 0: -1.0"),
    ("AdamW", {"weight_decay_form": "corrected", "max_lr": float("nan")}, "Invalid max_lr of group 0: nan"),
    ("Lion", {"max_lr": -1.0}, "Invalid max_lr of group 0: -1.0"),
    ("Lion", {"max_lr": torch.tensor(0.0)}, "Invalid max_lr of group 0: 0.0"),
    ("Lion", {"max_lr": torch.ones(2)}, "Tensor max_lr of group 0 must be 1-element"),
    ("Lion", {"max_lr": "0.1"}, "max_lr of group 0 must be a number or None, but it is '0.1'"),
    ("Lion", {"max_lr": [0.1]}, "max_lr of group 0 must be a number or None"),
    ("Lion", {"weight_decay_form": np.array(["cautious"])}, "weight_decay_form of group 0 must be one of"),
    ("Adam", {"weight_decay_form": "cautious", "decoupled_weight_decay": 0}, "'cautious' of group 0 is a form"),
    ("AdamW", {"weight_decay_form": "corrected", "lr": 0.0}, "Invalid max_lr of group 0: 0.0, .* lr of the schedule"),
]


@every_engine
@pytest.mark.parametrize(("name", "options", "match"), BAD)
def test_bad_values(name, options, match, backend):
    """At construction, and at the step for what was set later, before anything is written."""
    given = {"lr": 0.1, **CLASSES[name], **options}
    with pytest.raises((ValueError, TypeError), match=match):
        getattr(fusedopt, name)([param()], backend=backend, **given)
    optimizer = getattr(fusedopt, name)([mine := param()], lr=given["lr"], backend=backend, **CLASSES[name])
    train(optimizer, range(1))
    before = bits(mine)
    group = dict(optimizer.param_groups[0])
    optimizer.param_groups[0].update(options)
    set_grads([mine], 1)
    for _ in range(2):
        with pytest.raises((ValueError, TypeError), match=match):
            optimizer.step()
    assert bits(mine) == before
    optimizer.param_groups[0].clear()
    optimizer.param_groups[0].update(group)
    optimizer.step()
    assert optimizer.state[mine]["step"] == 2 if name != "Lion" else bits(mine) != before


def test_a_refused_step_completes_no_group():
    optimizer = make("AdamW", [{"params": [param()]}, {"params": [param(1)]}], lr=0.1)
    train(optimizer, range(1))
    optimizer.param_groups[0]["weight_decay_form"] = "corrected"
    for wrong in ({"weight_decay_form": "correct"}, {"weight_decay_form": "corrected", "max_lr": 0.0}):
        optimizer.param_groups[1].update(wrong)
        with pytest.raises(ValueError, match="of group 1"):
            train(optimizer, range(1))
        assert "max_lr" not in optimizer.param_groups[0]


def test_a_group_that_is_refused_leaves_nothing():
    optimizer = make("AdamW", [param()], lr=0.1)
    group = {"params": [param(1)], "weight_decay_form": "corrected", "lr": 0.0}
    with pytest.raises(ValueError, match="Invalid max_lr of group 1"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    assert group.keys() == {"params", "weight_decay_form", "lr"}


def test_optimizers_without_decoupled_decay_have_no_form():
    with pytest.raises(TypeError, match="weight_decay_form"):
        fusedopt.SGD([Parameter(torch.zeros(1, device=DEVICE))], weight_decay_form="cautious")
