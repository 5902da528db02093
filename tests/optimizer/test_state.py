"""State keys, dtypes and shapes are torch's, and checkpoints go both ways."""

import copy
import io
import pickle
import re

import pytest
import torch

import fusedopt
from tests.twins import (
    BACKENDS,
    IN_TORCH,
    OPTIMIZERS,
    assert_same,
    bits,
    in_group,
    make,
    make_params,
    make_torch,
    params_of,
    set_grads,
    snapshot,
    train,
)

pytestmark = [pytest.mark.parametrize("backend", BACKENDS), pytest.mark.usefixtures("exact_products")]
every_case = pytest.mark.parametrize("case", IN_TORCH, ids=lambda case: case.id)
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def saved_and_loaded(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def described(state):
    """Names, dtypes, shapes and strides of the states of every parameter."""
    return [
        {name: (value.dtype, value.shape, value.stride()) for name, value in values.items()}
        for values in state.values()
    ]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.bfloat16) for case in IN_TORCH]
    + [(case, torch.complex64) for case in IN_TORCH if case.optimizer != "Muon"],  # which takes no complex matrices
    ids=lambda value: getattr(value, "id", str(value)),
)
def test_states_are_torchs(case, backend, dtype):
    mine = case.make(make_params(dtype, of=case.optimizer), backend=backend)
    theirs = case.make_torch(make_params(dtype, of=case.optimizer))
    assert described(mine.state) == described(theirs.state)  # Adagrad's are there from the start

    for optimizer in (mine, theirs):
        set_grads(params_of(optimizer)[:2], 0)  # the third never had a gradient
        optimizer.step()
    assert described(mine.state) == described(theirs.state)
    saved, expected = mine.state_dict(), theirs.state_dict()
    assert saved["state"].keys() == expected["state"].keys()
    assert [list(values) for values in saved["state"].values()] == [list(v) for v in expected["state"].values()]
    assert described(saved["state"]) == described(expected["state"])


@every_case
def test_param_groups_are_torchs(case, backend):
    theirs = case.make_torch(make_params(of=case.optimizer)).state_dict()["param_groups"]
    loop = {"foreach": False} if "foreach" in theirs[0] else {}
    mine = case.make(make_params(of=case.optimizer), backend=backend, **loop).state_dict()["param_groups"]
    assert [{key: group[key] for key in expected} for group, expected in zip(mine, theirs, strict=True)] == theirs
    assert [[key for key in group if key in theirs[0]] for group in mine] == [list(group) for group in theirs]


def test_without_momentum_sgd_keeps_nothing(backend):
    sgd = fusedopt.SGD(make_params(), lr=0.1, weight_decay=0.1, backend=backend)
    train(sgd, range(2))
    assert len(sgd.state) == 0
    assert sgd.state_dict()["state"] == {}


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@every_optimizer
def test_step_has_torchs_dtype(name, backend, default):
    torch.set_default_dtype(default)
    try:
        mine, theirs = (
            make(name, make_params(torch.float32, of=name), backend=backend),
            make_torch(name, make_params(of=name)),
        )
        begun = [values.get("step") for values in mine.state.values()]  # Adagrad's
        train(mine, range(1))
        train(theirs, range(1))
    finally:
        torch.set_default_dtype(torch.float32)
    for values, expected in zip(mine.state.values(), theirs.state.values(), strict=True):
        if "step" in expected:
            assert values["step"].dtype == expected["step"].dtype
    assert all(step.dtype in (torch.float32, default) and step.dtype != torch.bfloat16 for step in begun)


@every_case
def test_torch_goes_on_from_our_checkpoint(case, backend):
    mine, uninterrupted = (
        case.make(make_params(of=case.optimizer), backend=backend),
        case.make_torch(make_params(of=case.optimizer)),
    )
    train(mine, range(3))
    train(uninterrupted, range(6))

    theirs = case.make_torch([p.detach().clone().requires_grad_() for p in params_of(mine)])
    theirs.load_state_dict(saved_and_loaded(mine.state_dict()))
    train(theirs, range(3, 6))
    assert_same(theirs, uninterrupted, check_dtype=False)  # torch casts every state but step as it loads


@every_case
def test_we_go_on_from_torchs_checkpoint(case, backend):
    theirs = case.make_torch(make_params(of=case.optimizer))
    train(theirs, range(3))
    mine = case.make([p.detach().clone().requires_grad_() for p in params_of(theirs)], backend=backend)
    mine.load_state_dict(saved_and_loaded(theirs.state_dict()))
    train(mine, range(3, 6))
    train(theirs, range(3, 6))
    assert_same(mine, theirs)


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam", "AdamW"])
def test_we_go_on_from_torchs_fused_checkpoint(name, backend):
    fused = make_torch(name, make_params(), fused=True, foreach=None)
    train(fused, range(3))
    mine = make(name, [p.detach().clone().requires_grad_() for p in params_of(fused)], backend=backend)
    mine.load_state_dict(saved_and_loaded(fused.state_dict()))
    theirs = make_torch(name, [p.detach().clone().requires_grad_() for p in params_of(fused)], fused=False)
    theirs.load_state_dict(fused.state_dict())
    train(mine, range(3, 5))
    train(theirs, range(3, 5))
    assert_same(mine, theirs)


# -0.0, a NaN with a payload, infinity, a subnormal, one that bf16 cannot hold.
ODD_BITS = torch.tensor([-0x80000000, 0x7FC12345, 0x7F800000, 0x00000001, 0x3F8ABCDE, 0], dtype=torch.int32)


@every_optimizer
def test_a_saved_state_comes_back_bit_for_bit(name, backend, device):
    odd = ODD_BITS.view(torch.float32).reshape(2, 3).to(device)

    def fresh():
        return make(name, [torch.nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16, device=device))], backend=backend)

    mine = fresh()
    train(mine, range(1))
    (values,) = mine.state.values()
    for key in mine.states:
        if key in values:
            values[key] = odd.t().contiguous().t()  # fp32, and the strides are not the parameter's
    saved = mine.state_dict()
    other = fresh()
    other.load_state_dict(saved_and_loaded(saved))
    (loaded,) = other.state.values()
    assert {key: bits(value) for key, value in loaded.items()} == {
        key: bits(value) for key, value in saved["state"][0].items()
    }
    train(other, range(1, 2))
    (loaded,) = other.state.values()
    assert all(loaded[key].dtype == torch.float32 for key in other.states if key in loaded)


@every_optimizer
def test_a_loaded_dict_is_left_alone(name, backend):
    mine = make(name, make_params(of=name), backend=backend, lr=torch.tensor(0.1))
    train(mine, range(2))
    saved = copy.deepcopy(mine.state_dict())
    before = {key: {k: bits(v) for k, v in values.items()} for key, values in saved["state"].items()}
    other = make(name, make_params(of=name), backend=backend)
    other.load_state_dict(state_dict=saved)
    other.param_groups[0]["lr"].fill_(0.5)
    train(other, range(2))
    assert {key: {k: bits(v) for k, v in values.items()} for key, values in saved["state"].items()} == before
    assert saved["param_groups"][0]["lr"] == torch.tensor(0.1)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("SGD", {"lr_in_momentum": True, "zero_init_momentum": True}),
        ("Adagrad", {"eps_in_sqrt": True}),
        ("RMSprop", {"eps_in_sqrt": True}),
    ],
    ids=["SGD", "Adagrad", "RMSprop"],
)
def test_own_options_survive_a_torch_checkpoint(name, own, backend):
    theirs = make_torch(name, make_params(), lr=0.25)
    train(theirs, range(1))
    in_group = make(name, [{"params": make_params(), **own}], backend=backend)
    for mine in (make(name, make_params(), backend=backend, **own), in_group):
        mine.load_state_dict(theirs.state_dict())
        assert mine.param_groups[0]["lr"] == 0.25
        assert {key: mine.param_groups[0][key] for key in own} == own


def test_keys_of_others_are_the_checkpoints(backend):
    """A scheduler's of a run that is given up do not survive a checkpoint from before it."""
    mine, theirs = make("SGD", make_params(), backend=backend), make_torch("SGD", make_params())
    for optimizer in (mine, theirs):
        before = copy.deepcopy(optimizer.state_dict())
        torch.optim.lr_scheduler.LinearLR(optimizer, 1e-7)
        optimizer.param_groups[0]["note"] = "of the user's"
        optimizer.load_state_dict(before)
        assert not optimizer.param_groups[0].keys() & {"initial_lr", "note"}
        before["param_groups"][0]["note"] = "saved"
        optimizer.load_state_dict(before)
        assert optimizer.param_groups[0]["note"] == "saved"


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam", "AdamW"])
@pytest.mark.parametrize("saved", [True, False, None])
@pytest.mark.parametrize("own", [None, False])
def test_a_loaded_fused_decides_nothing(name, saved, own, backend):
    if own is False and backend != "eager":
        return  # is refused
    theirs = make_torch(name, make_params(), fused=saved)
    train(theirs, range(1))
    mine = make(name, make_params(), backend=backend, fused=own)
    mine.load_state_dict(theirs.state_dict())
    assert mine.param_groups[0]["fused"] is own
    train(mine, range(1, 2))
    assert all(entry.kernels == (backend != "eager") for entry in mine._stepper.plan.entries)


@pytest.mark.parametrize(
    ("saved", "name", "missing"),
    [
        ("Adadelta", "Adam", "'exp_avg' and no 'exp_avg_sq', but 'acc_delta', 'square_avg'"),
        ("RMSprop", "NAdam", "'mu_product' and no 'exp_avg' and no 'exp_avg_sq', but 'square_avg'"),
        ("Adam", "Adagrad", "'sum', but 'exp_avg', 'exp_avg_sq'"),
        ("Adam", "Rprop", "'prev' and no 'step_size', but 'exp_avg', 'exp_avg_sq'"),
    ],
)
def test_the_state_of_another_class_is_refused(saved, name, missing, backend):
    other = make(saved, make_params(), backend=backend)
    train(other, range(1))
    mine = make(name, make_params(), backend=backend)
    mine.load_state_dict(other.state_dict())
    before = snapshot(mine)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=re.escape(f"parameter 0 of group 0 has no {missing}: {name} cannot go")):
            train(mine, range(1))
        assert snapshot(mine)["params"] == before["params"]
    for values in mine.state.values():
        values.clear()
    train(mine, range(1))


@pytest.mark.parametrize("lost", ["step", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.5, "skip_nonfinite": True}], ids=str)
def test_half_a_state_is_refused(lost, options, backend):
    """As apex saves it, say, which keeps the number of steps in the group."""
    mine = make("Adam", make_params(), backend=backend, **options)
    train(mine, range(2))
    saved = copy.deepcopy(mine.state_dict())
    del saved["state"][1][lost]
    mine.load_state_dict(saved)
    with pytest.raises(RuntimeError, match=f"parameter 1 of group 0 has no '{lost}': Adam cannot go on"):
        train(mine, range(1))


def test_keys_of_the_users_in_a_state_are_none_of_its_parts(backend):
    mine, plain = make("Adam", make_params(), backend=backend), make("Adam", make_params(), backend=backend)
    for param in params_of(mine):
        mine.state[param].update({"tag": 1, 2: "two"})
    for optimizer in (mine, plain):
        train(optimizer, range(2))
    assert snapshot(mine)["params"] == snapshot(plain)["params"]
    del mine.state[params_of(mine)[0]]["exp_avg"]
    with pytest.raises(RuntimeError, match="has no 'exp_avg', but 'tag', 2: Adam"):
        train(mine, range(1))


def test_a_subclass_may_make_a_state_of_the_others(backend):
    class Slow(fusedopt.Adam):
        states = (*fusedopt.Adam.states, "slow")

        def init_state(self, param, state, group):
            begun = "exp_avg" in state
            super().init_state(param, state, group)
            state["slow"] = state["exp_avg"].clone() if begun else state["slow"]

        @staticmethod
        def reference(param, grad, states, scalars):
            fusedopt.Adam.reference(param, grad, states[:3], scalars)

    saved = make("Adam", make_params(), backend="eager")
    train(saved, range(1))
    mine = Slow(make_params(), backend="eager")
    mine.load_state_dict(saved.state_dict())
    train(mine, range(1))
    assert all("slow" in values for values in mine.state.values())


def test_a_class_assigned_object_keeps_its_options(backend):
    mine = make_torch("NAdam", make_params())
    train(mine, range(1))
    saved = mine.state_dict()
    mine.__class__ = fusedopt.NAdam
    mine.backend = backend
    mine.param_groups[0].update(in_group(max_grad_norm=1e-3, ema_decay=0.5))
    saved["param_groups"][0]["fused"] = False
    mine.load_state_dict(saved)
    group = mine.param_groups[0]
    assert (group["fusedopt_max_grad_norm"], group["fusedopt_ema_decay"]) == (1e-3, 0.5)
    assert "fused" not in group


STEPS = {
    "int": 3,
    "float": 3.0,
    "int tensor": torch.tensor(3),
    "1-d tensor": torch.tensor([3.0]),
    "float64 tensor": torch.tensor(3.0, dtype=torch.float64),
    "bf16 tensor": torch.tensor(3.0, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("SGD", "Muon")])  # which count no steps
def test_any_form_of_step_is_taken(name, step, backend):
    uninterrupted = make(name, make_params(of=name), backend=backend)
    train(uninterrupted, range(3))
    saved = copy.deepcopy(uninterrupted.state_dict())
    for values in saved["state"].values():
        values["step"] = copy.deepcopy(step)
    mine = make(name, [p.detach().clone().requires_grad_() for p in params_of(uninterrupted)], backend=backend)
    mine.load_state_dict(saved)
    if not isinstance(step, torch.Tensor):  # torch makes a tensor of it at once
        assert all(isinstance(values["step"], torch.Tensor) for values in mine.state.values())
    train(mine, range(3, 5))
    train(uninterrupted, range(3, 5))
    assert_same(mine, uninterrupted, check_dtype=False)  # a step in float64 stays one, as in torch


@pytest.mark.parametrize(
    ("name", "options", "later", "state"),
    [
        ("SGD", {"momentum": 0}, {"momentum": 0.9}, "momentum_buffer"),
        ("SGD", {"momentum": 0}, {"momentum": 0.9, "dampening": 0.5}, "momentum_buffer"),
        ("RMSprop", {}, {"momentum": 0.9}, "momentum_buffer"),
        ("RMSprop", {}, {"centered": True}, "grad_avg"),
        ("Adam", {}, {"amsgrad": True}, "max_exp_avg_sq"),
    ],
    ids=["SGD-momentum", "SGD-dampening", "RMSprop-momentum", "RMSprop-centered", "Adam-amsgrad"],
)
@pytest.mark.parametrize("how", ["group", "checkpoint"])
def test_a_state_can_be_switched_on_later(name, options, later, state, how, backend):
    mine, theirs = make(name, make_params(), backend=backend, **options), make_torch(name, make_params(), **options)
    train(mine, range(2))
    train(theirs, range(2))
    if how == "checkpoint":
        saved = copy.deepcopy(mine.state_dict())
        saved["param_groups"][0].update(later)
        mine = make(name, params_of(mine), backend=backend)
        mine.load_state_dict(saved)
    for optimizer in (mine, theirs):
        optimizer.param_groups[0].update(later)
    for param in params_of(theirs):  # where torch raises a KeyError, the state begins at zero
        if name != "SGD":
            theirs.state[param][state] = torch.zeros_like(param)
    train(mine, range(2, 5))
    train(theirs, range(2, 5))
    assert_same(mine, theirs)


def test_a_checkpoint_with_more_options(backend):
    rich = torch.optim.Adam(make_params(), amsgrad=True, weight_decay=0.1)
    train(rich, range(2))
    saved = rich.state_dict()
    saved["param_groups"][0]["note"] = "kept"
    saved["state"][0]["shadow"] = torch.tensor([1.0, 2.0], dtype=torch.float64)
    mine, theirs = fusedopt.Adam(make_params(), backend=backend), torch.optim.Adam(make_params(), foreach=False)
    for optimizer in (mine, theirs):
        optimizer.load_state_dict(copy.deepcopy(saved))
        train(optimizer, range(2, 4))
    assert_same(mine, theirs)
    assert mine.state_dict()["param_groups"][0]["note"] == "kept"
    assert mine.state_dict()["state"][0]["shadow"].tolist() == [1.0, 2.0]


@every_optimizer
def test_a_checkpoint_that_does_not_fit(name, backend):
    mine, theirs = make(name, make_params(of=name), backend=backend), make_torch(name, make_params(of=name))
    train(mine, range(1))
    before = snapshot(mine)
    fewer = make_torch(name, make_params(of=name)[:2]).state_dict()
    more_groups = make_torch(name, [{"params": param} for param in make_params(of=name)]).state_dict()
    for saved in (fewer, more_groups):
        with pytest.raises(ValueError, match="loaded state dict") as expected:
            theirs.load_state_dict(saved)
        with pytest.raises(ValueError, match=str(expected.value)):
            mine.load_state_dict(saved)
    assert snapshot(mine) == before


@every_optimizer
def test_loading_the_own_state_at_once(name, backend):
    """Accelerate's `prepare` does that before the first step."""
    mine, theirs = make(name, make_params(of=name), backend=backend), make_torch(name, make_params(of=name))
    mine.load_state_dict(mine.state_dict())
    train(mine, range(2))
    mine.load_state_dict(mine.state_dict())
    train(mine, range(2, 4))
    train(theirs, range(4))
    assert_same(mine, theirs)


def test_a_shallow_copy_counts_for_itself(backend):
    mine = make("SGD", make_params(), lr=0.1, max_grad_norm=1.0, backend=backend)
    train(mine, range(1))
    norm = mine.grad_norm
    other = copy.copy(mine)
    assert other.grad_norm is None
    set_grads(params_of(other), 7)
    other.step()
    assert other.grad_norm != norm
    assert mine.grad_norm is norm
    mine._stepper.skipped_steps = 3
    other.load_state_dict(other.state_dict())
    assert mine.skipped_steps == 3


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@every_optimizer
def test_a_copy_of_model_and_optimizer_goes_on(name, copied, backend):
    model = torch.nn.ParameterList(make_params(of=name))
    mine = make(name, model.parameters(), backend=backend)
    train(mine, range(2))
    before = snapshot(mine)
    other_model, other = copied((model, mine))
    assert other.backend == backend
    assert type(other) is type(mine)
    assert all(a is b for a, b in zip(other_model.parameters(), params_of(other), strict=True))
    train(other, range(2, 4))
    assert snapshot(mine)["params"] == before["params"]
    assert snapshot(mine)["state"] == before["state"]
    train(mine, range(2, 4))
    assert snapshot(other)["params"] == snapshot(mine)["params"]


def test_the_backend_is_no_part_of_the_state(backend):
    mine = fusedopt.Adam(make_params(), backend=backend)
    train(mine, range(1))
    assert backend not in repr(mine.state_dict())
    assert "backend" not in repr(mine.state_dict())
    other = fusedopt.Adam(make_params(), backend="auto")
    other.load_state_dict(mine.state_dict())
    assert other.backend == "auto"
    assert copy.deepcopy(mine).backend == pickle.loads(pickle.dumps(mine)).backend == backend


def test_a_tensor_lr_stays_one_object(backend):
    first, *rest = make_params()
    mine = fusedopt.SGD([{"params": [first]}, {"params": rest}], lr=torch.tensor(0.5), backend=backend)
    for optimizer in (mine, copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert optimizer.param_groups[0]["lr"] is optimizer.param_groups[1]["lr"]
        optimizer.param_groups[0]["lr"].fill_(0.25)
        before = [param.detach().clone() for param in params_of(optimizer)]
        train(optimizer, range(1))
        expected = [old - 0.25 * param.grad for old, param in zip(before, params_of(optimizer), strict=True)]
        torch.testing.assert_close([p.detach() for p in params_of(optimizer)], expected)


@pytest.mark.parametrize("to", ["half", "bfloat16", "double"])
@every_optimizer
def test_the_model_changes_its_dtype_between_steps(name, to, backend):
    """Its states go on as they are; torch does that for half of its optimizers and raises for the others."""
    model = torch.nn.ParameterList(make_params(torch.float32, of=name))
    mine = make(name, model.parameters(), backend=backend, lr=0.1)
    wide = make(name, [p.detach().clone().requires_grad_() for p in model.parameters()], backend="eager", lr=0.1)
    train(mine, range(2))
    train(wide, range(2))
    getattr(model, to)()
    for step in range(2, 4):
        train(mine, range(step, step + 1))
        for param, narrow in zip(params_of(wide), model.parameters(), strict=True):
            param.grad = narrow.grad.to(param.dtype)
        wide.step()
    assert all(param.dtype != torch.float32 for param in model.parameters())
    tolerance = 1e-5 if to == "double" else 5e-2
    torch.testing.assert_close(
        [p.detach().float() for p in params_of(mine)],
        [p.detach() for p in params_of(wide)],
        rtol=tolerance,
        atol=tolerance,
    )
    for values in mine.state.values():
        assert all(values[key].dtype == torch.float32 for key in mine.states if key in values)
