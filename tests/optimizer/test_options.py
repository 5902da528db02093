"""Options of fusedopt in param groups, beside keys of the user's that are called the same."""

import copy
import io

import pytest
import torch

import fusedopt
from fusedopt.options import DEFAULTS
from tests.twins import BACKENDS, OPTIMIZERS, bits, in_group, make, make_params, make_torch, params_of, train

pytestmark = pytest.mark.usefixtures("exact_products")
both_backends = pytest.mark.parametrize("backend", BACKENDS)
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)

# What programs keep in their groups for themselves, much of which the options would not take.
OWN = [
    {"max_grad_norm": 0},
    {"max_grad_norm": -1.0, "skip_nonfinite": "layer"},
    {"ema_decay": 1.0, "seed": "abc", "rounding": "up"},
    {"state_dtype": "fp8", "master_weights": [1], "kahan": "yes", "backend": "nccl"},
    {"skipped_steps": "none", "fusedopt": 3},
]


def in_two_groups(own, of="AdamW"):
    one, *others = make_params(of=of)
    return [{"params": [one], **own}, {"params": others, **dict.fromkeys(own)}]


@both_backends
@every_optimizer
@pytest.mark.parametrize("own", OWN, ids=str)
def test_keys_of_the_user_are_the_users(name, own, backend):
    plain = make(name, in_two_groups({}, name), backend=backend)
    mine = make(name, in_two_groups(own, name), backend=backend)
    for optimizer in (plain, mine):
        train(optimizer, range(2))
    mine.param_groups[1].update(own)
    for optimizer in (plain, mine):
        train(optimizer, range(2, 3))
    assert list(map(bits, params_of(mine))) == list(map(bits, params_of(plain)))
    assert all(own.items() <= group.items() for group in mine.param_groups)
    theirs = make_torch(name, in_two_groups({}, name))
    theirs.load_state_dict(mine.state_dict())
    mine = make(name, in_two_groups({}, name), backend=backend)
    mine.load_state_dict(theirs.state_dict())
    mine.add_param_group({"params": make_params(of=name), **own})
    assert all(own.items() <= group.items() for group in mine.param_groups)
    train(mine, range(3, 4))


@both_backends
def test_a_key_of_the_same_name_beside_the_option(backend):
    """It may be meant for it: said, and not guessed."""
    one, *others = make_params()
    groups = [{"params": [one], "ema_decay": 0.5}, {"params": others}]
    with pytest.warns(UserWarning, match=r"'ema_decay'.*means nothing to AdamW.*'fusedopt_ema_decay'"):
        optimizer = fusedopt.AdamW(groups, ema_decay=0.9, backend=backend)
    assert [group["fusedopt_ema_decay"] for group in optimizer.param_groups] == [0.9, 0.9]
    assert optimizer.param_groups[0]["ema_decay"] == 0.5


@both_backends
def test_one_group_has_its_own_options(backend):
    one, *others = make_params(torch.bfloat16)
    options = in_group(kahan=True, ema_decay=0.5, state_dtype=torch.float32)
    optimizer = fusedopt.AdamW([{"params": [one], **options}, {"params": others}], backend=backend)
    train(optimizer, range(2))
    assert {"kahan_comp", "ema"} <= optimizer.state[one].keys()
    assert optimizer.state[one]["exp_avg"].dtype == torch.float32
    assert not {"kahan_comp", "ema"} & optimizer.state[others[0]].keys()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = fusedopt.AdamW(copy.deepcopy(in_two_groups({})), backend=backend)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert options.items() <= other.param_groups[0].items()
    assert not any(key.startswith("fusedopt_") for key in other.param_groups[1])


@every_optimizer
def test_another_one_is_made_of_the_defaults(name):
    """So libraries copy an optimizer. torch's AdamW cannot be made so, hence nor can ours."""
    options = {"backend": "eager", "ema_decay": 0.9, "max_grad_norm": 0.5, "skip_nonfinite": True}
    optimizer = make(name, make_params(of=name), **options)
    defaults = dict(optimizer.defaults)
    if name == "AdamW":
        with pytest.raises(TypeError, match="decoupled_weight_decay"):
            torch.optim.AdamW(make_params(of=name), **torch.optim.AdamW(make_params(of=name)).defaults)
        del defaults["decoupled_weight_decay"]
    twin = type(optimizer)(make_params(of=name), **defaults)
    assert twin.backend == "eager"
    assert twin.defaults == optimizer.defaults
    train(optimizer, range(2))
    train(twin, range(2))
    assert list(map(bits, params_of(twin))) == list(map(bits, params_of(optimizer)))
    assert twin.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_defaults_are_arguments_and_groups_have_keys():
    optimizer = fusedopt.SGD(make_params(), lr=0.1, ema_decay=0.9)
    assert optimizer.defaults.keys() >= {*DEFAULTS, "backend"}
    assert not {*DEFAULTS, "backend"} & optimizer.param_groups[0].keys()
    assert optimizer.param_groups[0]["fusedopt_ema_decay"] == 0.9


def test_an_option_that_is_none():
    optimizer = fusedopt.SGD(make_params(), lr=0.1)
    with pytest.raises(TypeError, match=r"SGD has no option 'fusedopt_clip', but it has .*fusedopt_max_grad_norm"):
        optimizer.add_param_group({"params": make_params(), "fusedopt_clip": 1.0})
    assert len(optimizer.param_groups) == 1


def test_a_refused_group_is_left_as_it_was():
    params = make_params()
    optimizer = fusedopt.SGD(params, lr=0.1)
    group = {"params": params}
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group(group)
    assert group.keys() == {"params"}


def test_zero_repeats_the_options_of_the_constructor():
    optimizer = fusedopt.AdamW([{"params": make_params(), "ema_decay": 0.9, "backend": "auto"}], ema_decay=0.9)
    assert optimizer.param_groups[0]["fusedopt_ema_decay"] == 0.9
