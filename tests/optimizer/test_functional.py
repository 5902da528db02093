"""Functional counterparts, as torch makes and steps them: the bits of an ordinary step, and no gradient is written."""

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fusedopt
from tests.cases import CASES, MATRIX_CASES
from tests.twins import BACKENDS, KERNELS, bits, make_params, params_of, random, set_grads

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # when torch's module is imported

CLASSES = sorted({case.optimizer for case in [*CASES, *MATRIX_CASES]})
OPTIONS = {"SGD": {"momentum": 0.9}}
AVERAGED = {"ema_decay": 0.9, "state_dtype": torch.float32}


def counterpart(optimizer_class):
    fusedopt.register_functional_optim(optimizer_class)
    return torch.distributed.optim.utils.functional_optim_map[optimizer_class]


def bits_of_states(params, state):
    return [{name: bits(value) for name, value in state[param].items()} for param in params]


def make_both(name, dtype, backend, **options):
    optimizer_class = getattr(fusedopt, name)
    options = {**OPTIONS.get(name, {}), **options, "backend": backend}
    params = make_params(dtype, of=name)
    return (
        counterpart(optimizer_class)(params, **options),
        optimizer_class(make_params(dtype, of=name), **options),
        params,
    )


# An average is the same for every rule, so that the kernels have it with two.
BUCKETS = [(backend, name, {"state_dtype": torch.float32}) for backend in BACKENDS for name in CLASSES]
BUCKETS += [("eager", name, AVERAGED) for name in CLASSES]
BUCKETS += [(KERNELS, name, AVERAGED) for name in ("Adagrad", "AdamW")]


@pytest.mark.parametrize(("backend", "name", "options"), BUCKETS, ids=str)
def test_buckets(name, backend, options):
    """Two buckets of three parameters, the last first."""
    mine, ordinary, params = make_both(name, torch.bfloat16, backend, **options)
    for step in range(3):
        set_grads(params_of(ordinary), step)
        grads = [param.grad for param in params_of(ordinary)]
        mine.step([None, *grads[1:]])
        mine.step(gradients=[grads[0], None, None])
        ordinary.step()
    assert [bits(param) for param in params] == [bits(param) for param in params_of(ordinary)]
    assert bits_of_states(params, mine.state) == bits_of_states(params_of(ordinary), ordinary.state)
    assert all(param.grad is None for param in params)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CLASSES)
def test_one_by_one(name, backend):
    """Parameters that nobody has told before, as DDP does it, and those that somebody has."""
    known, ordinary, params = make_both(name, torch.float32, backend)
    others = make_params(torch.float32, of=name)
    options = {**OPTIONS.get(name, {}), "backend": backend}
    new = torch.distributed.optim.as_functional_optim(type(ordinary), ordinary.defaults["lr"], **options)
    mine = random((3, 4), 7, torch.float32)
    others[0].grad = mine
    for step in range(3):
        set_grads(params_of(ordinary), step)
        for index, param in enumerate(params_of(ordinary)):
            known.step_param(params[index], param.grad)
            new.step_param(others[index], param.grad)
        ordinary.step()
    new.step_param(others[0], None)
    for optimizer, stepped in ((known, params), (new, others)):
        assert [bits(param) for param in stepped] == [bits(param) for param in params_of(ordinary)]
        assert bits_of_states(stepped, optimizer.state) == bits_of_states(params_of(ordinary), ordinary.state)
    assert others[0].grad is mine
    assert others[1].grad is None


def test_what_the_owner_changes():
    """ZeRO writes its options, which a scheduler may have changed, into the group before each step."""
    mine, ordinary, params = make_both("AdamW", torch.float64, "eager")
    assert mine.param_group.keys() == {"params"}
    for step in range(3):
        mine.param_group["lr"] = ordinary.param_groups[0]["lr"] = 0.1 / (step + 1)
        set_grads(params_of(ordinary), step)
        mine.step([param.grad for param in params_of(ordinary)])
        ordinary.step()
    assert [bits(param) for param in params] == [bits(param) for param in params_of(ordinary)]
    mine.param_group["fusedopt_skip_nonfinite"] = True
    with pytest.raises(ValueError, match="skip_nonfinite cannot be had"):
        mine.step([param.grad for param in params_of(ordinary)])


def test_no_random_numbers():
    """They count the steps of a whole optimizer, and take the places of parameters in it."""
    with pytest.raises(ValueError, match=r"rounding='stochastic' cannot be had .* ordinary step after backward"):
        make_both("AdamW", torch.bfloat16, "eager", rounding="stochastic")
    mine, _, params = make_both("AdamW", torch.bfloat16, "eager")
    mine.param_group["fusedopt_rounding"] = "stochastic"
    before = list(map(bits, params))
    with pytest.raises(ValueError, match=r"rounding='stochastic' cannot be had"):
        mine.step([torch.ones_like(param) for param in params])
    assert list(map(bits, params)) == before


def test_no_step_hooks():
    """As with torch's counterparts: there is no step of all parameters for them to be around."""
    mine, _, params = make_both("AdamW", torch.float64, "eager")
    called = []
    hook = register_optimizer_step_pre_hook(lambda *args: called.append(args))
    try:
        mine.step([torch.ones_like(param) for param in params])
    finally:
        hook.remove()
    assert not called


def test_loaded_states():
    """ZeRO loads by putting states into the optimizer's."""
    mine, ordinary, params = make_both("AdamW", torch.float64, "eager")
    for step in range(4):
        set_grads(params_of(ordinary), step)
        if step != 1:
            mine.step([param.grad for param in params_of(ordinary)])
        if step == 1:
            kept = {param: {name: value.clone() for name, value in mine.state[param].items()} for param in params}
        if step == 2:
            for param in params:
                mine.state[param] = kept[param]
    assert all(state["step"] == 2 for state in mine.state_dict()["state"].values())


def test_a_failed_step_leaves_gradients():
    mine, _, params = make_both("AdamW", torch.float64, "eager")
    set_grads(params, 0)
    before = [param.grad for param in params]
    with pytest.raises(RuntimeError):
        mine.step([torch.ones(3, 4, dtype=torch.float64), torch.ones(2, dtype=torch.float64), None])
    assert all(param.grad is grad for param, grad in zip(params, before, strict=True))
    assert not mine.state[params[0]]
    with pytest.raises(ValueError, match="3 parameters, but 1 gradients"):
        mine.step([None])


def test_errors():
    for wrong in (torch.optim.AdamW, "AdamW", fusedopt.AdamW(make_params())):
        with pytest.raises(TypeError, match="register_functional_optim takes a class of fusedopt's optimizers"):
            fusedopt.register_functional_optim(wrong)
    assert counterpart(fusedopt.AdamW) is counterpart(fusedopt.AdamW)
    with pytest.raises(ValueError, match="empty parameter list"):
        counterpart(fusedopt.AdamW)([])
    for options in ({"max_grad_norm": 0.0}, {"skip_nonfinite": True}):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name} cannot be had"):
            counterpart(fusedopt.AdamW)(make_params(), **options)
