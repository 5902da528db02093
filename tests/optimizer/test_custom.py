"""Optimizers that users declare: that of docs/custom.md, word by word, and declarations that do not hold together."""

import copy
import importlib.util
import re
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import fusedopt
from tests.conftest import DEVICE
from tests.twins import ENGINES

PAGE = (Path(__file__).parents[2] / "docs" / "custom.md").read_text()


@pytest.fixture(scope="module")
def readme_class(tmp_path_factory):
    """The class of the page, from a file of its own: Triton reads the source of what it compiles."""
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "(FusedOptimizer)" in block]
    path = tmp_path_factory.mktemp("readme") / "adabelief.py"
    path.write_text(block)
    spec = importlib.util.spec_from_file_location("adabelief", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.AdaBelief


def parameters(seed=0):
    """fp64, fp32, bf16, and fp32 with a bf16 gradient, in shapes that fill no block."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = [(torch.float64,) * 2, (torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)]
    params = []
    for size, (dtype, grad_dtype) in enumerate(dtypes, start=5):
        param = torch.randn(size, 3, generator=generator).to(DEVICE, dtype).requires_grad_()
        param.grad_dtype = grad_dtype
        param.grad = torch.randn(size, 3, generator=generator).to(DEVICE, grad_dtype)
        params.append(param)
    return params


def adabelief(param, grad, lr, beta1, beta2, eps, steps):
    """The paper's equations in float64, for a gradient that stays."""
    m = v = np.zeros_like(param)
    for t in range(1, steps + 1):
        m = beta1 * m + (1 - beta1) * grad
        v = beta2 * v + (1 - beta2) * (grad - m) ** 2
        param = param - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
    return param


@pytest.mark.parametrize("backend", ENGINES)
def test_readmes_optimizer(readme_class, backend):
    """Two groups, four dtypes and three steps, against numpy."""
    params = parameters()
    before = [param.detach().clone().double().cpu().numpy() for param in params]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.3, "betas": (0.5, 0.9)}]
    optimizer = readme_class(groups, lr=0.1, backend=backend)
    for _ in range(3):
        optimizer.step()
    for i, (param, old) in enumerate(zip(params, before, strict=True)):
        lr, betas = (0.1, (0.9, 0.999)) if i < 2 else (0.3, (0.5, 0.9))
        expected = adabelief(old, param.grad.double().cpu().numpy(), lr, *betas, 1e-8, steps=3)
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-6}[param.dtype]
        np.testing.assert_allclose(param.detach().double().cpu().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ENGINES)
def test_readmes_optimizer_goes_on_from_a_state_dict(readme_class, backend):
    params = parameters()
    optimizer = readme_class(params, lr=0.1, backend=backend)
    optimizer.step()
    others = [copy.deepcopy(param.detach()).requires_grad_() for param in params]
    other = readme_class(others, lr=0.7, backend=backend)
    other.load_state_dict(optimizer.state_dict())
    for param, twin in zip(params, others, strict=True):
        twin.grad_dtype = param.grad.dtype
        twin.grad = param.grad.clone()
    optimizer.step()
    other.step()
    for param, twin in zip(params, others, strict=True):
        assert torch.equal(param, twin)
        assert optimizer.state[param]["step"] == other.state[twin]["step"] == 2


@triton.jit
def scalars(hyper, scalar_states):
    return (hyper[0],), (scalar_states[0] + 1,)


@triton.jit
def update(param, grad, states, scalars, STATES: tl.constexpr):
    return param - scalars[0] * grad, (states[0],)


@triton.jit
def update_without_states(param, grad, states, scalars, STATES: tl.constexpr):
    return param - scalars[0] * grad, ()


@triton.jit
def two_scalars(hyper, scalar_states):
    return (hyper[0], hyper[0]), (scalar_states[0] + 1,)


class Whole(fusedopt.FusedOptimizer):
    kernel = (scalars, update)
    hyperparameters = ("lr",)
    scalar_states = ("step",)
    states = ("memory",)

    def __init__(self, params, **defaults):
        super().__init__(params, {"lr": 0.1, **defaults})

    @staticmethod
    def scalars(hyper, scalar_states):
        return (hyper[0],), (scalar_states[0] + 1,)

    @staticmethod
    def reference(param, grad, states, scalars):
        param.sub_(scalars[0] * grad)


BROKEN = {
    "must define `reference`": {"reference": staticmethod(fusedopt.FusedOptimizer.reference)},
    "must define `scalars`": {"scalars": staticmethod(fusedopt.FusedOptimizer.scalars)},
    "`kernel` of Broken must be": {"kernel": update},
    "returns 0 states, but the class has 1": {"kernel": (scalars, update_without_states)},
    "returns 1 states, but the class has 2": {"states": ("memory", "more")},
    "returns 2 scalars, but the class has 1": {"kernel": (two_scalars, update)},
    "returns 1 scalar states, but 2 are declared": {"scalar_states": ("step", "other")},
    "declares 'momentum', but its defaults have no such key": {"hyperparameters": ("lr", "momentum")},
    "declares the state 'master_param'": {"states": ("master_param",)},
    "declares the state 'ema_begun'": {"scalar_states": ("ema_begun",)},
    "`choices` of Broken names 'form', which is none of its hyperparameters": {"choices": {"form": ("a", "b")}},
    "`begun` of Broken must name": {"begun": {"begun": "memory"}},
}


def test_a_default_of_an_option_that_all_have_is_an_error():
    with pytest.raises(TypeError, match="Whole has a default for 'seed'"):
        Whole([torch.zeros(1)], seed=0.5)


@pytest.mark.parametrize("backend", ENGINES)
def test_a_state_of_its_own_dtype_stays(backend):
    """Unless `state_dtype` asks for another."""

    def init_state(self, param, state, group):
        state.setdefault("memory", torch.zeros_like(param, dtype=torch.float64))
        state.setdefault("step", 0.0)

    own = type("Own", (Whole,), {"init_state": init_state})
    for option, expected in ((None, torch.float64), (torch.bfloat16, torch.bfloat16)):
        param = torch.nn.Parameter(torch.ones(3, device=DEVICE))
        optimizer = own([param])
        optimizer.backend = backend
        optimizer.param_groups[0]["fusedopt_state_dtype"] = option
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert optimizer.state[param]["memory"].dtype == expected


def test_a_whole_declaration_is_no_error():
    Whole([torch.zeros(1)])


@triton.jit
def scaled_scalars(hyper, scalar_states):
    lr, form, twice = hyper
    return (tl.where(form == 1, twice, lr),), (scalar_states[0] + 1,)


class Named(Whole):
    """A step of lr, or of twice as much, which follows from it."""

    kernel = (scaled_scalars, update)
    hyperparameters = ("lr", "form", "twice")
    optional: ClassVar = {"form": "once", "twice": None}
    choices: ClassVar = {"form": ("once", "doubled")}

    def __init__(self, params, **defaults):
        super().__init__(params, form="once", twice=None, **defaults)

    @staticmethod
    def settle_group(group, index):
        if group.get("twice") is None:
            group["twice"] = 2 * group["lr"]

    @staticmethod
    def scalars(hyper, scalar_states):
        lr, form, twice = hyper
        return (twice if form == 1 else lr,), (scalar_states[0] + 1,)


@pytest.mark.parametrize("backend", ENGINES)
def test_names_and_keys_that_follow_from_others(backend):
    param = torch.nn.Parameter(torch.zeros(3, device=DEVICE))
    optimizer = Named([param])
    optimizer.backend, (group,) = backend, optimizer.param_groups
    param.grad = torch.ones_like(param)
    expected = 0.0
    for form, change, step in (("once", {}, 0.1), ("doubled", {}, 0.2), ("doubled", {"lr": 0.5}, 0.2)):
        group.update(form=form, **change)
        optimizer.step()
        expected -= step
        torch.testing.assert_close(param, torch.full_like(param, expected))
    del group["twice"]
    optimizer.step()
    torch.testing.assert_close(param, torch.full_like(param, expected - 1))
    group["form"] = "trebled"
    with pytest.raises(ValueError, match="form of group 0 must be one of 'once', 'doubled', but it is 'trebled'"):
        optimizer.step()


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_declaration_is_an_error(message):
    broken = type("Broken", (Whole,), BROKEN[message])
    with pytest.raises(TypeError, match=re.escape(message)) as error:
        broken([torch.zeros(1)])
    assert "Broken" in str(error.value)


@pytest.mark.parametrize("attribute", ["kernel", "hyperparameters"])
def test_a_missing_name_is_an_error(attribute):
    names = {name: value for name, value in vars(Whole).items() if name != attribute}
    broken = type("Broken", (fusedopt.FusedOptimizer,), {**names, "__init__": lambda self, params: None})
    with pytest.raises(TypeError, match=f"Broken must declare `{attribute}`"):
        fusedopt.FusedOptimizer.__init__(broken([torch.zeros(1)]), [torch.zeros(1)], {"lr": 0.1})
