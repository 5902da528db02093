"""The classes are used as torch.optim's: signatures, arguments, hooks, closures, groups."""

import collections
import importlib
import inspect
import re
import sys
import typing
import warnings
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fusedopt
from fusedopt.options import CommonOptions
from tests.conftest import DEVICE
from tests.twins import (
    BACKENDS,
    KERNELS,
    OPTIMIZERS,
    assert_same,
    make,
    make_params,
    make_torch,
    params_of,
    set_grads,
    snapshot,
    train,
)

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def every_optimizer_with(argument):
    """Of those that torch's Muon lacks."""
    names = [name for name in OPTIMIZERS if argument in inspect.signature(getattr(torch.optim, name)).parameters]
    return pytest.mark.parametrize("name", names)


both_backends = pytest.mark.parametrize("backend", BACKENDS)
pytestmark = pytest.mark.usefixtures("exact_products")


def torch_test_inputs():
    """torch's own lists of good and bad arguments, without its test suite: that would set hypothesis' profile."""
    testing = "torch.testing._internal"
    needed = ("common_device_type", "common_methods_invocations", "common_utils", "common_optimizers")
    stub = MagicMock(_TestParametrizer=object)
    with patch.dict(sys.modules, {f"{testing}.{name}": stub for name in needed[:-1]}):
        return importlib.import_module(f"{testing}.common_optimizers")


TORCH = torch_test_inputs()
INPUTS = [
    pytest.param(name, given.kwargs, id=f"{name}-{given.desc}")
    for name in OPTIMIZERS
    # On "cuda" the list is longer, but nothing of it lies there.
    for given in getattr(TORCH, f"optim_inputs_func_{name.lower()}")(device="cuda")
]
BAD_INPUTS = [
    pytest.param(name, bad, id=f"{name}-{bad.optimizer_error_input.desc}")
    for name in OPTIMIZERS
    for bad in getattr(TORCH, f"optim_error_inputs_func_{name.lower()}")("cpu", torch.float32)
    if bad.error_regex != "Muon only supports 2D parameters"  # ours takes batches of matrices
]


@every_optimizer
def test_signature(name):
    theirs = list(inspect.signature(getattr(torch.optim, name)).parameters.values())
    mine = list(inspect.signature(getattr(fusedopt, name)).parameters.values())
    assert [(p.name, p.default, p.kind) for p in mine[: len(theirs)]] == [(p.name, p.default, p.kind) for p in theirs]
    extras = mine[len(theirs) :]
    assert all(p.kind is p.KEYWORD_ONLY for p in extras[:-1])
    assert extras[-1].kind is extras[-1].VAR_KEYWORD
    assert set(CommonOptions.__annotations__) == set(inspect.signature(fusedopt.FusedOptimizer).parameters) - {
        "params",
        "defaults",
    }
    optional = getattr(fusedopt, name).optional
    assert {p.name: p.default for p in extras[:-1]} == optional


@pytest.mark.parametrize(("name", "options"), INPUTS)
@both_backends
def test_what_torch_is_tested_with(name, options, backend):
    mine = make(name, make_params(of=name), backend=backend, **options)
    theirs = make_torch(name, make_params(of=name), **options)
    assert {key: mine.defaults[key] for key in theirs.defaults if key != "foreach"} == {
        key: value for key, value in theirs.defaults.items() if key != "foreach"
    }
    if options.get("capturable") and DEVICE == "cpu":
        for group in theirs.param_groups:
            group["capturable"] = False  # torch refuses to step so on the CPU
    train(mine, range(2))
    train(theirs, range(2))
    torch.testing.assert_close(params_of(mine), params_of(theirs), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("name", "bad"), BAD_INPUTS)
def test_what_torch_refuses(name, bad):
    given = bad.optimizer_error_input
    params = make_params(torch.float32, of=name) if given.params is None else given.params

    def tried(optimizer):
        made = optimizer(params, **given.kwargs)
        if bad.error_on is TORCH.OptimizerErrorEnum.STEP_ERROR:
            made.step()

    for optimizer in (getattr(torch.optim, name), getattr(fusedopt, name)):
        with pytest.raises(bad.error_type, match=bad.error_regex) as caught:
            tried(optimizer)
        assert type(caught.value) is bad.error_type
    if bad.error_type is UserWarning:  # a warning like torch's, and then an optimizer
        with pytest.warns(UserWarning, match=bad.error_regex):
            getattr(fusedopt, name)(params, **given.kwargs)


NEGATIVE = [
    (name, {argument: -1.0})
    for name, arguments in {
        "SGD": ["lr", "momentum", "weight_decay"],
        "Adagrad": ["lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"],
        "RMSprop": ["lr", "alpha", "eps", "weight_decay", "momentum"],
        "Adadelta": ["lr", "rho", "eps", "weight_decay"],
        "Adam": ["lr", "eps", "weight_decay"],
        "AdamW": ["lr", "eps", "weight_decay"],
        "NAdam": ["lr", "eps", "weight_decay", "momentum_decay"],
        "RAdam": ["lr", "eps", "weight_decay"],
        "Adamax": ["lr", "eps", "weight_decay"],
        "ASGD": ["lr", "weight_decay"],
        "Rprop": ["lr"],
        "Muon": ["lr", "momentum", "weight_decay"],
    }.items()
    for argument in arguments
]
OTHERS = [
    ("SGD", {"nesterov": True}),
    ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
    ("Adam", {"betas": (0.9, -0.1)}),
    ("Adam", {"betas": (0.9, 1.0)}),
    ("Adam", {"betas": 0.9}),
    ("Adam", {"betas": (torch.tensor([0.9]), torch.tensor([0.9, 0.9]))}),
    ("AdamW", {"lr": float("nan")}),
    ("Adagrad", {"lr": "fast"}),
    *[(name, {"fused": True, "foreach": True}) for name in ("SGD", "Adagrad", "Adam", "AdamW")],
    *[(name, {"fused": True, "differentiable": True}) for name in ("SGD", "Adagrad", "Adam", "AdamW")],
    *[(name, {"unheard_of": 1}) for name in OPTIMIZERS],
]


@pytest.mark.parametrize(("name", "options"), NEGATIVE + OTHERS, ids=str)
def test_more_that_torch_refuses(name, options):
    with pytest.raises(Exception) as theirs:  # noqa: PT011 – whatever torch says
        getattr(torch.optim, name)(make_params(of=name), **options)
    with pytest.raises(type(theirs.value)) as mine:
        getattr(fusedopt, name)(make_params(of=name), **options)
    assert type(mine.value) is type(theirs.value)
    if not isinstance(theirs.value, (TypeError, IndexError)):
        assert str(mine.value) == str(theirs.value)


@pytest.mark.parametrize("argument", ["lambd", "alpha"])
@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_what_only_newer_torch_refuses(argument, bad):
    """Since 2.15."""
    with pytest.raises(ValueError, match=f"^Invalid {argument} value: {bad}$"):
        fusedopt.ASGD(make_params(), **{argument: bad})


@every_optimizer
def test_a_set_of_parameters(name):
    """torch 2.15 warns, since the order of a set is another one in each process; older releases take it."""

    def told(make, params):
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            optimizer = make(name, params)
        assert {id(param) for param in optimizer.param_groups[0]["params"]} == set(map(id, params))
        return [(warning.category, str(warning.message)) for warning in record]

    params = set(make_params(of=name))
    assert told(make, params) == told(make_torch, params)
    for given in (make, make_torch):
        with pytest.raises(TypeError, match="ordered collections"):
            given(name, [{"params": params}])


PAIRS = {
    "tuple": tuple,
    "list": list,
    "array": np.array,
    "sequence": collections.UserList,
    "tensor": lambda pair: torch.tensor(pair, dtype=torch.float64),
}
PAIR_OF = {name: {"betas": (0.8, 0.75)} for name in ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Muon")}
PAIR_OF["Rprop"] = {"etas": (0.25, 1.5), "step_sizes": (0.125, 2.0)}


@pytest.mark.parametrize("kind", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("name", PAIR_OF)
@both_backends
def test_a_pair_is_any_sequence(name, kind, backend):
    pairs = {key: kind(value) for key, value in PAIR_OF[name].items()}
    expected = make(name, make_params(of=name), backend=backend, **PAIR_OF[name])
    given = make(name, make_params(of=name), backend=backend, **pairs)
    grouped = make(name, [{"params": make_params(of=name), **pairs}], backend=backend)
    later = make(name, make_params(of=name), backend=backend)
    later.param_groups[0].update(pairs)
    train(expected, range(3))
    for optimizer in (given, grouped, later):
        train(optimizer, range(3))
        assert snapshot(optimizer)["params"] == snapshot(expected)["params"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"nesterov": None, "maximize": None, "momentum": 0.9}),
        ("Adam", {"maximize": None, "amsgrad": None}),
        ("Adam", {"decoupled_weight_decay": None, "weight_decay": 0.5}),
        ("RMSprop", {"centered": None, "maximize": None}),
    ],
    ids=str,
)
@both_backends
def test_a_flag_may_be_none(name, options, backend):
    mine, theirs = make(name, make_params(), backend=backend, **options), make_torch(name, make_params(), **options)
    train(mine, range(3))
    train(theirs, range(3))
    assert_same(mine, theirs)


@both_backends
@pytest.mark.filterwarnings("error")
def test_an_lr_that_requires_a_gradient(backend):
    lr = torch.tensor(0.1, requires_grad=True)
    mine, theirs = make("Adam", make_params(), backend=backend, lr=lr), make_torch("Adam", make_params(), lr=0.1)
    train(mine, range(2))
    train(theirs, range(2))
    torch.testing.assert_close(params_of(mine), params_of(theirs), rtol=1e-6, atol=1e-7)  # 0.1 in fp32


@pytest.mark.parametrize("name", fusedopt.__all__)
def test_type_hints_can_be_read(name):
    """By pydantic and others that read them at run time."""
    given = getattr(fusedopt, name)
    assert typing.get_type_hints(given.__init__ if isinstance(given, type) else given)


@pytest.mark.parametrize("where", ["argument", "group"])
@every_optimizer_with("differentiable")
def test_differentiable_is_refused(name, where):
    params, options = make_params(of=name), {"differentiable": True}
    given = (params, options) if where == "argument" else ([{"params": params, **options}], {})
    with pytest.raises(RuntimeError, match="differentiable"):
        make(name, given[0], **given[1])


@pytest.mark.parametrize("options", [{"foreach": f} for f in (True, False, None)], ids=str)
@both_backends
@every_optimizer_with("foreach")
def test_foreach_changes_nothing(name, backend, options):
    mine, plain = (
        make(name, make_params(of=name), backend=backend, **options),
        make(name, make_params(of=name), backend=backend),
    )
    train(mine, range(2))
    train(plain, range(2))
    assert snapshot(mine)["params"] == snapshot(plain)["params"]
    assert mine.param_groups[0]["foreach"] is options["foreach"]


@pytest.mark.parametrize("fused", [True, False, None])
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam", "AdamW"])
def test_fused_chooses_the_reference_or_leaves_the_choice(name, fused):
    mine, theirs = make(name, make_params(), fused=fused), make_torch(name, make_params())
    assert f"backend: {'eager' if fused is False else KERNELS} (" in repr(mine)
    train(mine, range(2))
    train(theirs, range(2))
    assert_same(mine, theirs)
    if fused is False:
        with pytest.raises(ValueError, match="fused=False"):
            make(name, make_params(), fused=False, backend=KERNELS)


@both_backends
@every_optimizer_with("maximize")
def test_maximize_is_the_negative_gradient(name, backend):
    up, down = (make(name, make_params(of=name), backend=backend, maximize=maximize) for maximize in (True, False))
    for step in range(2):
        set_grads(params_of(up), step)
        for param, other in zip(params_of(up), params_of(down), strict=True):
            other.grad = -param.grad
        up.step()
        down.step()
    assert snapshot(up)["params"] == snapshot(down)["params"]


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_repr_says_what_runs(backend):
    runs = KERNELS if backend == "auto" else backend
    text = repr(fusedopt.Adam(make_params(), backend=backend))
    assert text.splitlines()[:2] == ["Adam (", f"backend: {runs} ({backend!r} asked for)"]
    assert "Parameter Group 0\n    amsgrad: False\n" in text


def test_repr_of_parameters_apart():
    first, *rest = make_params()
    mixed = fusedopt.SGD([{"params": rest}, {"params": first, "fused": False}], backend=KERNELS)
    assert f"backend: {KERNELS} for 2 of 3, eager for 1 of 3 (" in repr(mixed)
    assert "backend: eager" in repr(fusedopt.SGD([{"params": []}], backend="eager"))


@both_backends
@every_optimizer
def test_closure(name, backend):
    mine = make(name, make_params(of=name), backend=backend)
    loss = torch.tensor(3.0)

    def closure():
        assert torch.is_grad_enabled()
        mine.zero_grad()
        sum(param.square().sum() for param in params_of(mine)).backward()
        return loss

    before = snapshot(mine)["params"]
    with torch.no_grad():
        assert mine.step(closure) is loss
        assert mine.step(closure=closure) is loss
    assert mine.step() is None
    assert snapshot(mine)["params"] != before
    assert torch.is_grad_enabled()


@both_backends
def test_step_hooks(backend):
    mine = fusedopt.Adam(make_params(), backend=backend)
    set_grads(params_of(mine), 0)
    calls = []

    def hook(called):
        return lambda optimizer, args, kwargs: calls.append((called, optimizer is mine, len(optimizer.state)))

    handles = [
        register_optimizer_step_pre_hook(hook("global pre")),
        register_optimizer_step_post_hook(hook("global post")),
        mine.register_step_pre_hook(hook("pre")),
        mine.register_step_post_hook(hook("post")),
    ]
    mine.step()
    assert calls == [("global pre", True, 0), ("pre", True, 0), ("post", True, 3), ("global post", True, 3)]
    for handle in handles:
        handle.remove()
    mine.step()
    assert len(calls) == 4


@pytest.mark.parametrize("when", ["pre", "post"])
@pytest.mark.parametrize("of_all", [False, True])
def test_a_step_hook_alone(when, of_all):
    """A step that nobody watches does without torch's wrapper."""
    mine = fusedopt.SGD(make_params())
    everywhere = {"pre": register_optimizer_step_pre_hook, "post": register_optimizer_step_post_hook}
    register = everywhere[when] if of_all else getattr(mine, f"register_step_{when}_hook")
    train(mine, range(1))
    calls = []
    handle = register(lambda *args: calls.append(args))
    train(mine, range(1))
    handle.remove()
    train(mine, range(1))
    assert calls == [(mine, (mine,), {})]


@both_backends
def test_a_pre_hook_may_change_gradients_and_arguments(backend):
    mine, theirs = fusedopt.SGD(make_params(), backend=backend), make_torch("SGD", make_params(), momentum=0)

    def hook(optimizer, args, kwargs):
        for param in params_of(optimizer):
            param.grad = param.grad * 2
        return (optimizer, lambda: 5), kwargs

    for optimizer in (mine, theirs):
        optimizer.register_step_pre_hook(hook)
        set_grads(params_of(optimizer), 0)
        assert optimizer.step() == 5
    assert_same(mine, theirs)


@both_backends
@every_optimizer
def test_state_dict_hooks(name, backend):
    mine, calls = make(name, make_params(of=name), backend=backend), []
    train(mine, range(1))

    def renamed(optimizer, saved):
        calls.append("load pre")
        return {"state": saved["states"], "param_groups": saved["param_groups"]}

    mine.register_state_dict_pre_hook(lambda optimizer: calls.append("save pre"))
    mine.register_state_dict_post_hook(
        lambda optimizer, saved: {"states": saved["state"], "param_groups": saved["param_groups"]}
    )
    mine.register_load_state_dict_pre_hook(renamed)
    mine.register_load_state_dict_post_hook(lambda optimizer: calls.append("load post"))
    saved = mine.state_dict()
    assert set(saved) == {"states", "param_groups"}
    mine.load_state_dict(saved)
    mine.load_state_dict(mine.state_dict())  # no hook has been left behind
    assert calls == ["save pre", "load pre", "load post"] * 2
    train(mine, range(1, 2))


@both_backends
@every_optimizer
def test_named_parameters(name, backend):
    named = list(zip(["weight", "bias", "scale"], make_params(of=name), strict=True))
    mine, theirs = make(name, named, backend=backend), make_torch(name, make_params(of=name))
    train(mine, range(2))
    train(theirs, range(2))
    torch.testing.assert_close(params_of(mine), params_of(theirs))
    assert mine.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias", "scale"]
    other = make(name, make_params(of=name), backend=backend)
    other.load_state_dict(mine.state_dict())
    assert other.param_groups[0]["param_names"] == ["weight", "bias", "scale"]


@both_backends
@every_optimizer
def test_groups_with_options_and_a_late_one(name, backend):
    pair = []
    for factory, extra in ((make, {"backend": backend}), (make_torch, {})):
        first, second, third = make_params(of=name)
        optimizer = factory(name, [{"params": first}, {"params": [second], "lr": 0.5, "weight_decay": 0.1}], **extra)
        train(optimizer, range(2))
        optimizer.add_param_group({"params": third, "lr": 0.25})
        train(optimizer, range(2, 4))
        pair.append(optimizer)
    assert_same(*pair)


@both_backends
@every_optimizer
def test_zero_grad(name, backend):
    mine, theirs = make(name, make_params(of=name), backend=backend), make_torch(name, make_params(of=name))
    for optimizer in (mine, theirs):
        train(optimizer, range(1))
        optimizer.zero_grad()
        assert all(param.grad is None for param in params_of(optimizer))
        optimizer.step()  # nobody has a gradient
        set_grads(params_of(optimizer), 1)
        optimizer.zero_grad(set_to_none=False)
        assert all(param.grad is not None and not param.grad.any() for param in params_of(optimizer))
        optimizer.step()
    assert_same(mine, theirs)


@both_backends
@every_optimizer
def test_duplicate_parameters_step_twice(name, backend):
    pair = []
    once = {"momentum": 0} if name == "SGD" else {}  # torch.optim.SGD overwrites the first of the two new buffers
    for factory, extra in ((make, {"backend": backend}), (make_torch, {})):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            params = make_params(of=name)
            pair.append(factory(name, [*params, params[0]], **extra, **once))
        train(pair[-1], range(2))
    assert_same(*pair)


@every_optimizer
def test_the_profiler_names_the_step(name):
    mine = make(name, make_params(of=name))
    set_grads(params_of(mine), 0)
    with torch.profiler.profile() as profile:
        mine.step()
        mine.zero_grad()
    names = {event.name for event in profile.events()}
    assert {f"Optimizer.step#{name}.step", f"Optimizer.zero_grad#{name}.zero_grad"} <= names


@both_backends
@every_optimizer
def test_version_counters_grow(name, backend):
    """So that a backward pass through overwritten weights is noticed."""
    mine = make(name, make_params(of=name), backend=backend)
    first = params_of(mine)[0]
    loss = (first * first).sum()
    train(mine, range(1))
    with pytest.raises(RuntimeError, match=re.escape("modified by an inplace operation")):
        loss.backward()


def test_another_backend_between_two_steps():
    optimizer = fusedopt.Adam(make_params(), backend=KERNELS)
    train(optimizer, range(1))
    optimizer.backend = "eager"
    train(optimizer, range(1, 3))
    expected = torch.optim.Adam(make_params(), foreach=False)
    train(expected, range(3))
    assert not any(entry.kernels for entry in optimizer._stepper.plan.entries)
    assert_same(optimizer, expected)


@every_optimizer
def test_no_class_of_torchs_own(name):
    """By decision: who asks for one goes on to its internals, which are not here, and should hear no."""
    optimizer = make(name, make_params(of=name))
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert not any(isinstance(optimizer, getattr(torch.optim, other)) for other in OPTIMIZERS)
    assert not hasattr(optimizer, "_init_group")
