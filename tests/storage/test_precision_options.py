"""The options of low precision: what they exclude, switching them, states that begin in their dtype, own rules."""

from __future__ import annotations

import pytest
import torch

import fusedopt
import fusedopt.engines.tables
from tests.cases import BF16, FP16, FP32, Mode
from tests.conftest import DEVICE
from tests.optimizer.test_custom import readme_class  # noqa: F401
from tests.storage.test_precision_state import between_two, make_params
from tests.twins import BACKENDS, bits, in_group, set_grads, snapshot, train

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


INITIAL = {
    "Rprop": ("step_size", {"lr": 0.1}),
    "Adagrad": ("sum", {"lr": 0.0, "initial_accumulator_value": 0.1}),
}


@pytest.mark.parametrize("name", INITIAL)
@pytest.mark.parametrize(("dtype", "state_dtype"), [(BF16, FP32), (FP32, FP16), (FP16, BF16)])
def test_states_begin_in_their_dtype(name, backend, dtype, state_dtype):
    state, options = INITIAL[name]
    param = torch.nn.Parameter(torch.ones(3, dtype=dtype, device=DEVICE))
    optimizer = getattr(fusedopt, name)([param], state_dtype=state_dtype, backend=backend, **options)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    expected = torch.full((3,), 0.1, dtype=state_dtype, device=DEVICE)
    assert bits(optimizer.state[param][state]) == bits(expected)


def test_complex_states_have_parts_of_the_dtype(backend):
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.complex128, device=DEVICE))
    optimizer = fusedopt.Adam([param], state_dtype=FP32, backend=backend)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert {optimizer.state[param][name].dtype for name in ("exp_avg", "exp_avg_sq")} == {torch.complex64}


# Every option; what they make of each other is the same for any rule.
OWN = [
    Mode(FP32, {"state_dtype": BF16}),
    Mode(BF16, {"master_weights": True, "rounding": "stochastic"}),
    Mode(FP16, {"kahan": True}),
    Mode(BF16, {"state_dtype": "8bit", "rounding": "stochastic"}),
]


@pytest.mark.parametrize("mode", OWN, ids=lambda mode: mode.id)
def test_a_users_own_rule(readme_class, mode, backend):  # noqa: F811
    """The AdaBelief of docs/custom.md takes the options of every optimizer, and does what a wide run does."""
    params, wide_params = make_params(mode.dtype), [p.detach().float() for p in make_params(mode.dtype)]
    optimizer = readme_class(params, lr=0.01, backend=backend, **mode.options)
    wide = readme_class(wide_params, lr=0.01, backend=backend)
    for step in range(3):
        set_grads(params, step)
        for param, twin in zip(params, wide_params, strict=True):
            twin.grad = param.grad.float()
        optimizer.step()
        wide.step()
    extra = {
        "master_param" if "master_weights" in mode.options else "",
        "kahan_comp" if "kahan" in mode.options else "",
    } - {""}
    for param, twin in zip(params, wide_params, strict=True):
        assert optimizer.state[param].keys() == wide.state[twin].keys() | extra
        torch.testing.assert_close(param.float(), twin, rtol=2**-6, atol=2**-6)


EXCLUSIVE = [
    (BF16, {"master_weights": True, "kahan": True}, "master_weights and kahan of group 0"),
    (FP32, {"rounding": "stochastic"}, "rounding='stochastic' has nothing to round: the parameters are torch.float32"),
    (FP32, {"rounding": "stochastic", "state_dtype": FP32}, "rounding='stochastic' has nothing to round"),
    (BF16, {"rounding": "stochastic", "state_dtype": FP32, "master_weights": True}, "master_weights keeps what"),
    (FP16, {"rounding": "stochastic", "state_dtype": FP32, "kahan": True}, "kahan keeps what"),
    (FP32, {"master_weights": True}, "master_weights=True: a copy in fp32 helps 16-bit parameters only"),
    (torch.float64, {"kahan": True}, "kahan=True: a compensation helps 16-bit parameters only"),
    (torch.complex64, {"state_dtype": BF16}, "states of its complex parameters"),
    (BF16, {"state_dtype": torch.float64}, "Invalid state_dtype of group 0: torch.float64"),
    (BF16, {"state_dtype": "bfloat16"}, "Invalid state_dtype"),
    (BF16, {"rounding": "up"}, "Invalid rounding of group 0: 'up'"),
    (BF16, {"seed": -1}, "Invalid seed of group 0: -1"),
    (BF16, {"seed": 2**64}, "Invalid seed"),
    (BF16, {"seed": 1.0}, "seed of group 0 must be an int"),
    (BF16, {"seed": True}, "seed of group 0 must be an int"),
    (BF16, {"kahan": "no"}, "kahan of group 0 must be True or False"),
    (BF16, {"master_weight": True}, "unexpected keyword argument 'master_weight'"),
]


@pytest.mark.parametrize(("dtype", "options", "message"), EXCLUSIVE, ids=[str(row[1]) for row in EXCLUSIVE])
def test_errors_say_which_and_why(backend, dtype, options, message):
    params = make_params(dtype)
    with pytest.raises((ValueError, TypeError), match=message):
        fusedopt.Adam(params, backend=backend, **options)
    if "nothing" in message or "helps" in message or "keeps" in message or "keyword" in message:
        return
    optimizer = fusedopt.Adam(params, backend=backend)
    with pytest.raises((ValueError, TypeError), match=message.replace("group 0", "group 1")):
        optimizer.add_param_group({"params": make_params(dtype), **in_group(**options)})
    assert len(optimizer.param_groups) == 1
    train(optimizer, range(1))
    optimizer.param_groups[0].update(in_group(**options))
    set_grads(params, 1)
    before = snapshot(optimizer)
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.step()
    assert snapshot(optimizer) == before


def test_one_group_of_16_bits_is_enough(backend):
    """Norms and biases often stay in fp32: to them the options simply do not apply."""
    for options in ({"master_weights": True}, {"kahan": True}, {"rounding": "stochastic"}):
        groups = [{"params": make_params(BF16)}, {"params": make_params(FP32)}]
        optimizer = fusedopt.Adam(groups, backend=backend, **options)
        train(optimizer, range(2))
        extra = {"master_param", "kahan_comp"}
        assert all(bool(extra & optimizer.state[p].keys()) == ("rounding" not in options) for p in groups[0]["params"])
        assert not any(extra & optimizer.state[p].keys() for p in groups[1]["params"])


def test_options_switched_on_and_off_between_steps(backend):
    optimizer = fusedopt.Adam(make_params(BF16), backend=backend)
    for step, options in enumerate(
        [
            {},
            {"master_weights": True},
            {"master_weights": False, "kahan": True},
            {"rounding": "stochastic"},
            {"kahan": False},
        ]
    ):
        optimizer.param_groups[0].update(in_group(**options))
        train(optimizer, range(step, step + 1))
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        assert ("master_param" in state) == (step >= 1)
        assert ("kahan_comp" in state) == (step >= 2)
        assert ("fusedopt_rounding_step" in optimizer.param_groups[0]) == (step >= 3)
    assert optimizer.param_groups[0]["fusedopt_rounding_step"] == 2


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("options", [{"master_weights": True}, {"kahan": True}, {"rounding": "stochastic"}], ids=str)
def test_sparse_gradients(backend, options):
    param = torch.nn.Parameter(torch.ones(4, 2, dtype=BF16, device=DEVICE))
    optimizer = fusedopt.SGD([param], lr=1.0, backend=backend, **options)
    param.grad = torch.sparse_coo_tensor([[1, 3]], torch.full((2, 2), 2**-12), (4, 2), dtype=BF16, device=DEVICE)
    if "rounding" in options:
        with pytest.raises(RuntimeError, match="rounding='stochastic' does not support sparse gradients"):
            optimizer.step()
        return
    for _ in range(16):
        optimizer.step()
    assert param.float()[:, 0].tolist() == [1, 1 - 2**-8, 1, 1 - 2**-8]


def test_an_error_is_raised_again_and_the_option_not_lost(backend):
    """A step that fails leaves what is new to the next one."""
    param = between_two(4)
    optimizer = fusedopt.SGD([param], lr=1.0, backend=backend)
    optimizer.step()
    optimizer.param_groups[0].update(in_group(kahan=True, master_weights=True))
    for _ in range(2):
        with pytest.raises(ValueError, match="choose one"):
            optimizer.step()
    optimizer.param_groups[0]["fusedopt_kahan"] = False
    optimizer.param_groups[0]["params"].append("none")
    with pytest.raises(TypeError, match="must be a Tensor"):
        optimizer.step()
    optimizer.param_groups[0]["params"].pop()
    optimizer.step()
    assert "master_param" in optimizer.state[param]


def test_groups_have_only_the_options_that_differ(backend):
    """So that checkpoints of torch.optim, which lack them, can be loaded key by key."""
    params = make_params(BF16)
    optimizer = fusedopt.SGD(params, lr=0.1, momentum=0.9, backend=backend)
    assert optimizer.param_groups[0].keys() == torch.optim.SGD(params, lr=0.1).param_groups[0].keys()
    optimizer = fusedopt.SGD([{"params": params, "fusedopt_kahan": False}], lr=0.1, kahan=True, seed=0, backend=backend)
    assert not optimizer.param_groups[0].keys() & {"kahan", "seed"}
    train(optimizer, range(1))
    assert len(optimizer.state) == 0


def test_parameters_that_come_later(backend):
    optimizer = fusedopt.AdamW([{"params": []}], master_weights=True, backend=backend)
    optimizer.param_groups[0]["params"] += make_params(BF16)
    train(optimizer, range(1))
    assert all("master_param" in state for state in optimizer.state.values())
    lazy = torch.nn.LazyLinear(3, dtype=BF16, device=DEVICE)
    fusedopt.AdamW(lazy.parameters(), state_dtype=FP16, kahan=True, backend="eager")
