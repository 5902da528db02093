"""Bad input is one clear error that names its place, before anything has been written."""

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from torch.nn import Parameter

from tests.conftest import DEVICE, HAS_GPU
from tests.twins import BACKENDS, OPTIMIZERS, make, make_params, make_torch, params_of, set_grads, snapshot, train

both_backends = pytest.mark.parametrize("backend", BACKENDS)
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
first_and_later = pytest.mark.parametrize("steps", [0, 2], ids=["first step", "later"])
WHERE = r"parameter 1 of group 1 \('worst'\)"


@contextmanager
def refused(optimizer, error, match):
    """The block raises and writes nothing: neither parameters nor gradients nor states, which it does not create."""
    before = snapshot(optimizer)
    groups = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(error, match=match):
        yield
    assert snapshot(optimizer) == before
    assert [dict(group) for group in optimizer.param_groups] == groups


def make_three(name, backend, steps=0, **options):
    """Two groups with named parameters; what is wrong is put into the last one."""
    first, second, third = make_params(of=name)
    groups = [
        {"params": [("first", first)]},
        {"params": [("second", second), ("worst", Parameter(torch.ones(2, 3, device=DEVICE)))]},
        {"params": [("third", third)], "lr": 0.1},
    ]
    optimizer = make(name, groups, backend=backend, **options)
    train(optimizer, range(steps))
    set_grads(params_of(optimizer), steps)
    return optimizer, params_of(optimizer)[2]


class GivenGrad(Parameter):
    """A parameter whose gradient is what it was given: autograd does not let one lie on another device."""

    grad = None


BAD_GRADS = [
    (torch.ones(3, 2), "shape"),
    (torch.ones(7), "shape"),
    (torch.ones(2, 3, dtype=torch.complex64), "complex64"),
    (torch.ones(2, 3, device="meta"), "on meta"),
]


@first_and_later
@both_backends
@every_optimizer
def test_gradient(name, backend, steps):
    optimizer, worst = make_three(name, backend, steps)
    worst.__class__ = GivenGrad
    for grad, match in BAD_GRADS:
        worst.grad = grad if grad.device.type == "meta" else grad.to(DEVICE)
        with refused(optimizer, RuntimeError, f"{WHERE}.*{match}"):
            optimizer.step()
    worst.grad = torch.ones(2, 3, device=DEVICE)
    optimizer.step()


@both_backends
@every_optimizer
def test_complex_parameter_with_a_real_gradient(name, backend):
    params = make_params(torch.complex64, of=name)
    optimizer = make(name, params, backend=backend)
    set_grads(params, 0)
    params[1].__class__ = GivenGrad
    params[1].grad = torch.ones(params[1].shape, device=DEVICE)
    with refused(optimizer, RuntimeError, "parameter 1 of group 0 is torch.complex64, but its gradient is"):
        optimizer.step()


SPARSE_MESSAGES = {
    "RMSprop": "RMSprop does not support sparse gradients",
    "Muon": "Muon does not support sparse gradients",
    "Adadelta": "Adadelta does not support sparse gradients",
    "Adam": "Adam does not support sparse gradients, please consider SparseAdam instead",
    "AdamW": "Adam does not support sparse gradients, please consider SparseAdam instead",
}


def sparse_grad(seed=0, dtype=torch.float32, shape=(2, 3)):
    """Not coalesced: a row stands twice."""
    rows = torch.tensor([[1, 0, 1]], device=DEVICE)
    values = torch.randn(3, *shape[1:], generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return torch.sparse_coo_tensor(rows, values, shape, check_invariants=True)


@first_and_later
@both_backends
@pytest.mark.parametrize("name", SPARSE_MESSAGES)
def test_sparse_gradient_refused(name, backend, steps):
    optimizer, worst = make_three(name, backend, steps)
    worst.grad = sparse_grad()
    with refused(optimizer, RuntimeError, f"^{SPARSE_MESSAGES[name]}.*{WHERE}"):
        optimizer.step()


@first_and_later
@both_backends
@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_sparse_gradient_with_weight_decay(name, backend, steps):
    optimizer, worst = make_three(name, backend, steps, weight_decay=0.1)
    worst.grad = sparse_grad()
    match = f"^weight_decay option is not compatible with sparse gradients.*{WHERE}"
    with refused(optimizer, RuntimeError, match if name == "Adagrad" else WHERE):
        optimizer.step()


SPARSE_OPTIONS = [
    ("SGD", {"momentum": 0}),
    ("SGD", {"momentum": 0, "maximize": True}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "dampening": 0.5}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("Adagrad", {}),
    ("Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.1, "maximize": True}),
]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's Adagrad
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@both_backends
@pytest.mark.parametrize(("name", "options"), SPARSE_OPTIONS, ids=str)
def test_sparse_gradient_taken(name, options, backend, dtype):
    pair = []
    for factory, extra in ((make, {"backend": backend}), (make_torch, {})):
        params = [Parameter(torch.ones(4, 3, dtype=dtype, device=DEVICE)) for _ in range(2)]
        optimizer = factory(name, params, lr=0.1, **options, **extra)
        for step in range(3):
            params[0].grad = sparse_grad(step, dtype, (4, 3))
            params[1].grad = torch.full_like(params[1], 0.5)
            given = params[0].grad.clone()
            optimizer.step()
            assert torch.equal(params[0].grad.to_dense(), given.to_dense())
            assert not params[0].grad.is_coalesced()
        pair.append(optimizer)
    tolerance = {"rtol": 0.05, "atol": 0.01} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(params_of(pair[0]), params_of(pair[1]), **tolerance)
    for values, expected in zip(pair[0].state.values(), pair[1].state.values(), strict=True):
        for key in expected:
            torch.testing.assert_close(
                values[key].to_dense(), expected[key].to_dense(), check_device=False, **tolerance
            )
            assert values[key].layout == expected[key].layout


@both_backends
def test_sparse_and_dense_gradients_take_turns(backend):
    mine, theirs = (
        factory("SGD", [Parameter(torch.ones(4, 3, device=DEVICE))], lr=0.1, momentum=0, **extra)
        for factory, extra in ((make, {"backend": backend}), (make_torch, {}))
    )
    for step in range(4):
        for optimizer in (mine, theirs):
            (param,) = params_of(optimizer)
            param.grad = sparse_grad(step, shape=(4, 3)) if step % 2 else torch.ones_like(param)
            optimizer.step()
    torch.testing.assert_close(params_of(mine), params_of(theirs))


@first_and_later
@both_backends
@every_optimizer
def test_no_tensor_in_a_group(name, backend, steps):
    optimizer, worst = make_three(name, backend, steps)
    for stranger in ("text", None, 3.0, Parameter):
        optimizer.param_groups[1]["params"][1] = stranger
        with refused(optimizer, TypeError, f"{WHERE} must be a Tensor"):
            optimizer.step()
    optimizer.param_groups[1]["params"][1] = worst
    optimizer.step()


@every_optimizer
def test_parameters_that_torch_refuses(name):
    leaf = torch.ones(2, requires_grad=True)
    for params in ([leaf * 2], [leaf.detach(), "text"], leaf, [], [{"params": {leaf}}], ["text"]):
        with pytest.raises(Exception) as theirs:  # noqa: PT011 – whatever torch says
            make_torch(name, params)
        with pytest.raises(type(theirs.value)) as mine:
            make(name, params)
        assert str(mine.value) == str(theirs.value)


@both_backends
@every_optimizer
def test_expanded_parameter(name, backend):
    optimizer, worst = make_three(name, backend)
    worst.data = torch.ones(1, 3, device=DEVICE).expand(2, 3)
    with refused(optimizer, RuntimeError, f"{WHERE} is expanded"):
        optimizer.step()


BAD_STATES = [
    lambda good: torch.ones(7, dtype=good.dtype, device=good.device),
    lambda good: good.new_zeros(()),
    lambda good: good.to(torch.complex64),
    lambda good: torch.ones_like(good, dtype=torch.int64),
    lambda good: good.to("meta"),
    lambda good: "text",
    lambda good: 1.5,
    lambda good: [1.0, 2.0],
]


@pytest.mark.parametrize("loaded", [False, True], ids=["put", "loaded"])
@both_backends
@every_optimizer
def test_state(name, backend, loaded):
    optimizer, worst = make_three(name, backend, 2)
    params_of(optimizer)[1].grad = None
    del optimizer.state[params_of(optimizer)[0]]  # which must not come back
    key = next(key for key in optimizer.states if key in optimizer.state[worst])
    good = optimizer.state[worst][key]
    for make_bad in BAD_STATES:
        bad = make_bad(good)
        if loaded:
            saved = optimizer.state_dict()
            saved["state"][2] = {**saved["state"][2], key: bad}
            if isinstance(bad, torch.Tensor) and bad.device.type == "meta":  # nothing to copy
                with refused(optimizer, NotImplementedError, "meta"):
                    optimizer.load_state_dict(saved)
                continue
            optimizer.load_state_dict(saved)
        else:
            optimizer.state[worst][key] = bad
        with refused(optimizer, (RuntimeError, TypeError), f"state '{key}' of {WHERE}"):
            optimizer.step()


@both_backends
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("SGD", "Muon")])  # which count no steps
def test_step_that_is_no_number(name, backend):
    optimizer, worst = make_three(name, backend, 1)
    for bad in ("text", [1, 2], torch.ones(2), None, {}):
        optimizer.state[worst]["step"] = bad
        with refused(optimizer, (RuntimeError, TypeError), f"state 'step' of {WHERE}"):
            optimizer.step()


@both_backends
@every_optimizer
def test_a_state_that_is_no_dict(name, backend):
    optimizer, worst = make_three(name, backend, 1)
    for bad in ([1, 2], "text", None, 5):
        optimizer.state[worst] = bad
        with refused(optimizer, (RuntimeError, TypeError), WHERE):
            optimizer.step()


@first_and_later
@both_backends
@every_optimizer
def test_hyperparameter_that_is_no_number(name, backend, steps):
    optimizer, _ = make_three(name, backend, steps)
    group = optimizer.param_groups[1]
    for key in optimizer.hyperparameters:
        good = {**optimizer.optional, **group}[key]
        for bad in ["fast", "0.5", [1, 2], 1j, {}]:
            if not (isinstance(good, tuple) and bad == [1, 2]):  # that may be a pair of betas
                group[key] = bad
                with refused(optimizer, (TypeError, ValueError), f"{key} of group 1 must be"):
                    optimizer.step()
        group[key] = good
    optimizer.step()


@both_backends
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_betas(name, backend):
    optimizer, _ = make_three(name, backend, 1)
    for bad in [(0.9,), (0.9, 0.99, 0.999), 0.9, (), (0.9, "x"), (0.9, None), None]:
        optimizer.param_groups[1]["betas"] = bad
        with refused(optimizer, (TypeError, ValueError), "betas of group 1 must be"):
            optimizer.step()
        with pytest.raises((TypeError, ValueError)):
            make(name, make_params(), betas=bad)


@both_backends
@every_optimizer
def test_a_tensor_of_several_learning_rates(name, backend):
    optimizer, _ = make_three(name, backend)
    optimizer.param_groups[2]["lr"] = torch.tensor([0.1, 0.2])
    with refused(optimizer, ValueError, "lr of group 2 must be"):
        optimizer.step()


@every_optimizer
def test_unknown_backend(name):
    for bad in ("cuda", "", None, True, ["triton"]):
        with pytest.raises(ValueError, match=r"Invalid backend: .*'auto', 'triton', 'compiled', 'eager'"):
            make(name, make_params(of=name), backend=bad)


@pytest.mark.skipif(HAS_GPU, reason="asks for the kernels on the CPU")
def test_kernels_on_the_cpu_without_the_interpreter():
    code = """
import torch, fusedopt
param = torch.nn.Parameter(torch.ones(2))
try:
    fusedopt.Adam([("weight", param)], backend="triton")
except ValueError as error:
    print(error)
optimizer = fusedopt.Adam([param])
optimizer.backend = "triton"
param.grad = torch.ones(2)
try:
    optimizer.step()
except RuntimeError as error:
    print(error, param.tolist())
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert ran.stderr == ""
    first, second = ran.stdout.splitlines()
    assert "parameter 0 of group 0" in first
    assert "TRITON_INTERPRET=1" in first
    assert "parameter 0 of group 0" in second
    assert second.endswith("[1.0, 1.0]")


@both_backends
def test_a_late_group_that_the_backend_cannot_step(backend):
    optimizer, _ = make_three("Adam", backend, 1)
    groups = len(optimizer.param_groups)
    late = {"params": [("late", Parameter(torch.ones(2, device="meta")))]}
    if backend != "eager":
        with pytest.raises(ValueError, match="parameter 0 of group 3"):
            optimizer.add_param_group(late)
        assert len(optimizer.param_groups) == groups
    else:
        optimizer.add_param_group(late)
    set_grads(params_of(optimizer)[:4], 1)
    optimizer.step()


JUNK = {
    "text": lambda good: "text",
    "none": lambda good: None,
    "empty": lambda good: {},
    "no state": lambda good: {"param_groups": good["param_groups"]},
    "no groups": lambda good: {"state": good["state"]},
    "state is None": lambda good: {**good, "state": None},
    "groups are a number": lambda good: {**good, "param_groups": 5},
    "a group is a number": lambda good: {**good, "param_groups": [5]},
    "a group has no params": lambda good: {**good, "param_groups": [{"lr": 0.1}]},
}


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK)
@both_backends
def test_loading_junk(backend, junk):
    mine, theirs = make("Adam", make_params(), backend=backend), make_torch("Adam", make_params())
    train(mine, range(1))
    given = junk(mine.state_dict())
    with pytest.raises(Exception) as expected:  # noqa: PT011 – whatever torch says
        theirs.load_state_dict(given)
    with refused(mine, type(expected.value), None):
        mine.load_state_dict(given)
    train(mine, range(1, 2))
