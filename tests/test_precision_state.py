"""Low precision over many steps: the same bits again, checkpoints, values that somebody writes, wrong options."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import BF16, FP16, FP32, MODES
from conftest import DEVICE
from test_custom import readme_class  # noqa: F401
from test_state import saved_and_loaded
from test_state_distributed import make_model
from test_state_distributed import options as distributed_options
from test_state_distributed import train as train_model
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from twins import BACKENDS, bits, params_of, random, set_grads, snapshot, train
from twins import make as make_named

import fusedopt
import fusedopt.tables

pytestmark = pytest.mark.parametrize("backend", BACKENDS)

every_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.id)
STOCHASTIC = [mode for mode in MODES if mode.options.get("rounding") == "stochastic"]
SHAPES = [(3, 4), (1000,), (), (70, 3)]


def make_params(dtype, shapes=SHAPES):
    return [torch.nn.Parameter(random(shape, seed, dtype)) for seed, shape in enumerate(shapes)]


def make(mode, backend, params=None, **options):
    params = make_params(mode.dtype) if params is None else params
    return fusedopt.AdamW(params, lr=0.01, amsgrad=True, backend=backend, **{**mode.options, **options})


def twin_params(optimizer):
    return [torch.nn.Parameter(param.detach().clone()) for param in params_of(optimizer)]


def values(optimizer):
    """The bits of parameters and states, whichever object holds them."""
    params = params_of(optimizer)
    states = [{name: bits(value) for name, value in optimizer.state[param].items()} for param in params]
    return [bits(param) for param in params], states


@every_mode
def test_the_same_run_gives_the_same_bits(mode, backend):
    first, second = make(mode, backend), make(mode, backend)
    train(first, range(3))
    train(second, range(3))
    assert values(first) == values(second)


def through_a_file(optimizer, mode, backend):
    other = make(mode, backend, twin_params(optimizer))
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    return other


COPIES = {
    "file": through_a_file,
    "deepcopy": lambda optimizer, *_: copy.deepcopy(optimizer),
    "pickle": lambda optimizer, *_: pickle.loads(pickle.dumps(optimizer)),
}


COPIED = [(mode, "file") for mode in MODES]
COPIED += [(mode, how) for mode in MODES if mode.dtype == BF16 and len(mode.options) == 1 for how in COPIES]


@pytest.mark.parametrize(("mode", "how"), COPIED, ids=[f"{mode.id}-{how}" for mode, how in COPIED])
def test_a_resumed_run_gives_the_bits_of_an_unbroken_one(mode, backend, how):
    unbroken, first = make(mode, backend), make(mode, backend)
    train(unbroken, range(4))
    train(first, range(2))
    resumed = COPIES[how](first, mode, backend)
    assert values(resumed) == values(first)
    train(resumed, range(2, 4))
    assert values(resumed) == values(unbroken)


@every_mode
def test_it_goes_on_on_the_other_backend(mode, backend):
    """A checkpoint of one loads into the other, which finds all states that it needs."""
    first = make(mode, backend)
    train(first, range(2))
    other = make(mode, *({*BACKENDS} - {backend}), twin_params(first))
    other.load_state_dict(saved_and_loaded(first.state_dict()))
    names = [set(state) for state in other.state.values()]
    train(other, range(2, 3))
    train(first, range(2, 3))
    assert [set(state) for state in other.state.values()] == names
    for param, twin in zip(params_of(first), params_of(other), strict=True):
        torch.testing.assert_close(param, twin, rtol=2**-7, atol=2**-7)


def with_tiling(monkeypatch, block_size, chunk_size):
    monkeypatch.setattr(fusedopt.tables.Signature, "tiling", property(lambda signature: (block_size, chunk_size)))


@pytest.mark.parametrize("mode", STOCHASTIC, ids=lambda mode: mode.id)
def test_the_bits_do_not_depend_on_chunks_or_alignment(mode, backend, monkeypatch):
    def run(params):
        optimizer = make(mode, backend, params)
        for step in range(2):
            set_grads(params_of(optimizer), step)
            if len(params) > 1:
                grad = torch.empty(1001, dtype=mode.dtype, device=DEVICE)[1:]
                params[1].grad = grad.copy_(params[1].grad)
            optimizer.step()
        return values(optimizer)

    expected = run(make_params(mode.dtype))
    with_tiling(monkeypatch, 256, 512)
    assert run(make_params(mode.dtype)) == expected
    shifted = make_params(mode.dtype)
    shifted[1] = torch.nn.Parameter(torch.empty(1001, dtype=mode.dtype, device=DEVICE)[1:].copy_(shifted[1].detach()))
    assert run(shifted) == expected


def stochastic_sgd(params, backend, **options):
    return fusedopt.SGD(params, lr=1.0, rounding="stochastic", backend=backend, **options)


def decisions(param):
    """Which of many numbers halfway between two neighbours were rounded down."""
    return param.detach() == 1 - 2**-8


def between_two(count=4096):
    """bf16 ones, and gradients that take them halfway to the next number below."""
    param = torch.nn.Parameter(torch.ones(count, dtype=BF16, device=DEVICE))
    param.grad = torch.full_like(param, 2**-9)
    return param


def assert_independent(first, second):
    """About half of the decisions agree: within 4 standard errors."""
    agreeing = (first == second).sum().item()
    assert abs(agreeing - len(first) / 2) <= 4 * (len(first) / 4) ** 0.5


def test_tensors_steps_and_seeds_are_independent(backend):
    params = [between_two(), between_two()]
    optimizer = stochastic_sgd(params, backend)
    optimizer.step()
    first, second = map(decisions, params)
    assert_independent(first, torch.zeros_like(first))
    assert_independent(first, second)
    params[0].data.fill_(1)
    optimizer.step()
    assert_independent(first, decisions(params[0]))
    other = between_two()
    stochastic_sgd([other], backend, seed=1).step()
    assert_independent(first, decisions(other))


def test_replicas_agree(backend):
    """Whatever the state of torch's own random numbers, and wherever the memory lies."""
    replicas = [[between_two(), between_two()] for _ in range(2)]
    for seed, params in enumerate(replicas):
        torch.manual_seed(seed)
        stochastic_sgd(params, backend, seed=2**64 - 1).step()
    assert list(map(bits, replicas[0])) == list(map(bits, replicas[1]))


def test_groups_have_their_own_seeds_and_a_new_one_is_noticed(backend):
    params = [between_two(), between_two()]
    groups = [{"params": params[:1], "seed": 3}, {"params": params[1:], "rounding": "nearest"}]
    optimizer = stochastic_sgd(groups, backend)
    optimizer.step()
    first = decisions(params[0])
    assert not decisions(params[1]).any(), "halfway, the even number is the nearest"
    assert "rounding_step" not in optimizer.state.get(params[1], {})

    alone = between_two()
    stochastic_sgd([alone], backend, seed=3).step()
    assert torch.equal(decisions(alone), first)
    for optimizer_of, param in ((optimizer, params[0]), (stochastic_sgd([alone], backend, seed=4), alone)):
        param.data.fill_(1)
        optimizer_of.param_groups[0]["seed"] = 4
        optimizer_of.state[param]["rounding_step"] = 0
        optimizer_of.step()
    assert torch.equal(decisions(alone), decisions(params[0]))
    assert_independent(first, decisions(alone))


def test_rounding_step_counts_the_steps_of_its_parameter(backend):
    params = [between_two(), between_two()]
    optimizer = stochastic_sgd(params, backend)
    optimizer.step()
    params[1].grad = None
    optimizer.step()
    counts = [optimizer.state_dict()["state"][i]["rounding_step"] for i in range(2)]
    assert [(count.item(), count.shape, count.dtype) for count in counts] == [
        (2, (), torch.float64),
        (1, (), torch.float64),
    ]


def master(backend, values=(1.0, -3.0, 0.3), **options):
    param = torch.nn.Parameter(torch.tensor(values, dtype=BF16, device=DEVICE))
    param.grad = torch.full_like(param, 2**-12)
    return param, fusedopt.SGD([param], lr=1.0, master_weights=True, backend=backend, **options)


def test_small_updates_add_up_in_the_master(backend):
    param, optimizer = master(backend)
    start = param.detach().float()
    for _ in range(100):
        optimizer.step()
    assert torch.equal(optimizer.state[param]["master_param"], start - 100 * 2.0**-12)  # exact
    assert torch.equal(param, (start - 100 * 2.0**-12).to(BF16))


@pytest.mark.parametrize("write", [lambda p: p.clamp_(max=0.5), lambda p: p.zero_(), lambda p: p.mul_(2)])
def test_what_is_written_into_a_parameter_counts(backend, write):
    param, optimizer = master(backend)
    optimizer.step()
    before = optimizer.state[param]["master_param"].clone()
    kept = param.detach().clone()
    with torch.no_grad():
        write(param)
    start = torch.where(param == kept, before, param.detach().float())
    assert not torch.equal(start, before)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["master_param"], start - 2.0**-12)


def test_a_loaded_master_comes_back_exactly(backend):
    param, optimizer = master(backend)
    for _ in range(3):
        optimizer.step()
    saved = saved_and_loaded(optimizer.state_dict())
    weights = param.detach().clone()
    expected = optimizer.state[param]["master_param"].clone()
    other_param, other = master(backend, values=(9.0, 9.0, 9.0))
    other.load_state_dict(saved)
    with torch.no_grad():
        other_param.copy_(weights)
    other.step()
    assert torch.equal(other.state[other_param]["master_param"], expected - 2.0**-12)


def test_a_checkpoint_without_a_master_begins_with_the_parameter(backend):
    param = torch.nn.Parameter(torch.tensor([1.0, 0.3], dtype=BF16, device=DEVICE))
    theirs = torch.optim.Adam([param])
    param.grad = torch.ones_like(param)
    theirs.step()
    ours = fusedopt.Adam([param], lr=0.0, master_weights=True, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["master_weights"] is True
    ours.param_groups[0]["lr"] = 0.0
    ours.step()
    assert torch.equal(ours.state[param]["master_param"], param.detach().float())
    assert ours.state[param]["step"] == 2


def test_a_master_of_another_dtype_becomes_fp32(backend):
    param, optimizer = master(backend)
    optimizer.step()
    state = optimizer.state[param]
    state["master_param"] = state["master_param"].double()
    optimizer.step()
    assert state["master_param"].dtype == FP32
    assert torch.equal(state["master_param"], torch.tensor([1.0, -3.0, 0.30078125], device=DEVICE) - 2.0**-11)


def test_kahan_keeps_small_updates(backend):
    params = [torch.nn.Parameter(torch.ones(3, dtype=BF16, device=DEVICE)) for _ in range(2)]
    groups = [{"params": [params[0]], "kahan": True}, {"params": [params[1]]}]
    optimizer = fusedopt.SGD(groups, lr=1.0, backend=backend)
    for _ in range(100):
        for param in params:
            param.grad = torch.full_like(param, 2**-10)
        optimizer.step()
    assert params[1].tolist() == [1, 1, 1], "nearest rounding stalls"
    exact = 1 - 100 * 2.0**-10
    assert params[0].tolist() == [torch.tensor(exact).to(BF16).item()] * 3
    comp = optimizer.state[params[0]]["kahan_comp"]
    assert (params[0].float() + comp.float()).tolist() == [exact] * 3


def test_a_compensation_does_not_outlive_its_parameter(backend):
    param = torch.nn.Parameter(torch.full((3,), 100.0, dtype=BF16, device=DEVICE))
    optimizer = fusedopt.SGD([param], lr=1.0, kahan=True, backend=backend)
    param.grad = torch.full_like(param, 0.1)
    optimizer.step()
    assert optimizer.state[param]["kahan_comp"].ne(0).all()
    with torch.no_grad():
        param.zero_()
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert param.eq(0).all()


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


def test_loaded_states_keep_their_dtype(backend):
    """`state_dtype` is that of new states: a checkpoint loses nothing."""
    param = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    theirs = torch.optim.Adam([param])
    param.grad = torch.full_like(param, 1 / 3)
    theirs.step()
    ours = fusedopt.Adam([param], state_dtype=BF16, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    assert bits(ours.state[param]["exp_avg"]) == bits(theirs.state[param]["exp_avg"])
    ours.step()
    assert ours.state[param]["exp_avg"].dtype == FP32


@every_mode
def test_a_users_own_rule(readme_class, mode, backend):  # noqa: F811
    """README's AdaBelief takes the options of every optimizer, and does what a wide run does."""
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
        "rounding_step" if "rounding" in mode.options else "",
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
        optimizer.add_param_group({"params": make_params(dtype), **options})
    assert len(optimizer.param_groups) == 1
    train(optimizer, range(1))
    optimizer.param_groups[0].update(options)
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
        optimizer.param_groups[0].update(options)
        train(optimizer, range(step, step + 1))
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        assert ("master_param" in state) == (step >= 1)
        assert ("kahan_comp" in state) == (step >= 2)
        assert ("rounding_step" in state) == (step >= 3)
    assert state["rounding_step"] == 2


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


def states_of(model, optimizer):
    """Their bits, but for the number that `state_dict()` hides."""
    states = [optimizer.state[param] for param in model.parameters()]
    return [{key: bits(value) for key, value in state.items() if key != "momentum_begun"} for state in states]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
@every_mode
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_distributed_checkpoints(name, backend, flatten, mode):
    """All extra states arrive, and training goes on with the same bits."""
    how = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = make_model(mode.dtype)
    with torch.no_grad():
        model[0].weight[0] = torch.tensor([-0.0, 0.0, 1e-5, -1e4])
    optimizer = make_named(name, model.parameters(), backend=backend, **distributed_options(name), **mode.options)
    train_model(model, optimizer, range(2))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=how))
    other_model = copy.deepcopy(model)
    other_model.zero_grad()
    before = [bits(param) for param in other_model.parameters()]
    other = make_named(name, other_model.parameters(), backend=backend, **distributed_options(name), **mode.options)
    set_optimizer_state_dict(other_model, other, saved, options=how)
    assert [bits(param) for param in other_model.parameters()] == before
    assert states_of(model, optimizer) == states_of(other_model, other)
    train_model(model, optimizer, range(2, 4))
    train_model(other_model, other, range(2, 4))
    assert [bits(param) for param in other_model.parameters()] == [bits(param) for param in model.parameters()]


def test_an_error_is_raised_again_and_the_option_not_lost(backend):
    """A step that fails leaves what is new to the next one."""
    param = between_two(4)
    optimizer = fusedopt.SGD([param], lr=1.0, backend=backend)
    optimizer.step()
    optimizer.param_groups[0].update(kahan=True, master_weights=True)
    for _ in range(2):
        with pytest.raises(ValueError, match="choose one"):
            optimizer.step()
    optimizer.param_groups[0]["kahan"] = False
    optimizer.param_groups[0]["params"].append("none")
    with pytest.raises(TypeError, match="must be a Tensor"):
        optimizer.step()
    optimizer.param_groups[0]["params"].pop()
    optimizer.step()
    assert "master_param" in optimizer.state[param]


@pytest.mark.parametrize("options", [{}, {"kahan": True}, {"master_weights": True}], ids=str)
def test_a_step_of_nothing_keeps_negative_zeros(backend, options):
    param = torch.nn.Parameter(torch.tensor([-0.0, 0.0, -1.0], dtype=BF16, device=DEVICE))
    optimizer = fusedopt.SGD([param], lr=0.0, backend=backend, **options)
    before = bits(param)
    for _ in range(2):
        param.grad = torch.zeros_like(param)
        optimizer.step()
        assert bits(param) == before


def test_what_does_not_round_counts_alike(backend):
    """fp32 beside bf16, in a group that rounds at random: if it becomes bf16 later, both backends draw the same."""
    wide = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = fusedopt.Adam([wide, between_two(3)], rounding="stochastic", backend=backend)
    wide.grad = torch.ones_like(wide)
    for _ in range(3):
        optimizer.step()
    assert optimizer.state[wide]["rounding_step"] == 3


def test_groups_have_only_the_options_that_differ(backend):
    """So that checkpoints of torch.optim, which lack them, can be loaded key by key."""
    params = make_params(BF16)
    optimizer = fusedopt.SGD(params, lr=0.1, momentum=0.9, backend=backend)
    assert optimizer.param_groups[0].keys() == torch.optim.SGD(params, lr=0.1).param_groups[0].keys()
    optimizer = fusedopt.SGD([{"params": params, "kahan": False}], lr=0.1, kahan=True, seed=0, backend=backend)
    assert not optimizer.param_groups[0].keys() & {"kahan", "seed"}
    train(optimizer, range(1))
    assert len(optimizer.state) == 0


def test_a_checkpoint_without_the_options_leaves_them_on(backend):
    plain = fusedopt.AdamW(make_params(BF16), backend=backend)
    train(plain, range(2))
    ours = fusedopt.AdamW(twin_params(plain), master_weights=True, backend=backend)
    ours.load_state_dict(saved_and_loaded(plain.state_dict()))
    train(ours, range(2, 3))
    assert all("master_param" in ours.state[param] for param in params_of(ours))


def test_parameters_that_come_later(backend):
    optimizer = fusedopt.AdamW([{"params": []}], master_weights=True, backend=backend)
    optimizer.param_groups[0]["params"] += make_params(BF16)
    train(optimizer, range(1))
    assert all("master_param" in state for state in optimizer.state.values())
    lazy = torch.nn.LazyLinear(3, dtype=BF16, device=DEVICE)
    fusedopt.AdamW(lazy.parameters(), state_dtype=FP16, kahan=True, backend="eager")
