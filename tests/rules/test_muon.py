"""Muon: torch.optim.Muon's numbers and interface, AdamW beside it, and every option of the frame."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import fusedopt
from bench.transformer import Transformer
from fusedopt.matrices import batches
from tests.cases import BF16, FP32, MATRIX_CASES, MODES, Mode
from tests.conftest import DEVICE
from tests.matrices.exact import exact_products, step, stepped_by_torch  # noqa: F401
from tests.matrices.test_batches import CLOSE, gradients, parameters, random
from tests.twins import BACKENDS, ENGINES, bits

SHAPES = [(8, 16), (16, 8), (8, 8), (3, 5), (1, 7)]
IN_TORCH = [case for case in MATRIX_CASES if case.in_torch]
OF_TORCH = {"lr": 0.1, "weight_decay": 0.1}


def by_id(item):
    return item.id


def mixed(dtype=torch.float64, seed=0):
    """Matrices and what is none."""
    return parameters(SHAPES, dtype), [torch.nn.Parameter(random(shape, 50 + seed, dtype)) for shape in [(5,), (4, 3)]]


def make(matrices, others, backend="auto", adamw=(), **options):
    groups = [{"params": matrices}, {"params": others, "use_muon": False, "lr": 0.01, **dict(adamw)}]
    return fusedopt.Muon(groups, backend=backend, **{**OF_TORCH, **options})


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("case", [*IN_TORCH, MATRIX_CASES[3]], ids=by_id)
def test_equals_torch(case, backend):
    options = {key: value for key, value in case.options.items() if key != "ns_coefficients"}
    params = parameters(SHAPES)
    grads = gradients(params, 3)
    expected = stepped_by_torch(params, grads, options)
    optimizer = fusedopt.Muon(params, backend=backend, **options)
    step(optimizer, params, grads)
    for param, (of_torch, momentum) in zip(params, expected, strict=True):
        torch.testing.assert_close(param, of_torch, **CLOSE)
        torch.testing.assert_close(optimizer.state[param]["momentum_buffer"], momentum, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("case", IN_TORCH, ids=by_id)
def test_equals_torch_in_the_precision_of_its_products(case, dtype, backend):
    """An update has singular values of at most 1.3 or so, and products of bf16 in other orders differ by few ULP of it.

    The parameter is rounded once more.
    """
    params = parameters([(64, 96), (96, 64), (48, 48), (33, 20)], dtype)
    grads = gradients(params, 3)
    expected = stepped_by_torch(params, grads[:1], case.options)
    optimizer = fusedopt.Muon(params, backend=backend, **case.options)
    step(optimizer, params, grads[:1])
    for param, (of_torch, momentum) in zip(params, expected, strict=True):
        scale = batches.spectral_scale(case.options.get("adjust_lr_fn"), *param.shape)
        within = 8 * torch.finfo(BF16).eps * case.options["lr"] * scale
        within += 0 if dtype == FP32 else torch.finfo(dtype).eps * float(param.detach().abs().max())
        torch.testing.assert_close(param.detach(), of_torch.detach(), rtol=0, atol=within)
        if dtype == FP32:  # torch 2.13 normalizes a momentum in bf16 in place, without Nesterov's
            torch.testing.assert_close(optimizer.state[param]["momentum_buffer"], momentum)


def test_a_momentum_in_bf16_is_not_normalized():
    """As in torch 2.15. Without Nesterov's form it is the direction itself."""
    (param,) = parameters([(16, 16)], BF16)
    ((grad,),) = gradients([param], 1)
    step(optimizer := fusedopt.Muon([param], lr=0.1, momentum=0.5, nesterov=False), [param], [[grad]])
    assert torch.equal(optimizer.state[param]["momentum_buffer"], (0.5 * grad.float()).bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", [Mode(FP32, {}), MODES[3], MODES[8], MODES[-1]], ids=by_id)
def test_the_group_without_muon_is_adamw(mode, backend):
    """Bit for bit, in a launch of its own."""
    shapes = [(5,), (80, 60)]
    mine, theirs = parameters(shapes, mode.dtype), parameters(shapes, mode.dtype)
    options = {"lr": 0.01, "weight_decay": 0.1, "backend": backend, **mode.options}
    muon = fusedopt.Muon(mine, use_muon=False, **options)
    adamw = fusedopt.AdamW(theirs, **options)
    grads = gradients(mine, 3)
    step(muon, mine, grads)
    step(adamw, theirs, grads)
    for one, other in zip(mine, theirs, strict=True):
        assert bits(one) == bits(other)
        for name, value in adamw.state[other].items():
            assert bits(muon.state[one][name]) == bits(value)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("backend", ENGINES)
def test_both_kinds_step_together(backend):
    matrices, others = mixed()
    grads, of_others = gradients(matrices, 3), gradients(others, 3)
    expected = stepped_by_torch(matrices, grads, OF_TORCH)
    twins = [torch.nn.Parameter(param.detach().clone()) for param in others]
    adamw = torch.optim.AdamW(twins, lr=0.01, weight_decay=0.2, betas=(0.8, 0.99), eps=1e-6, foreach=False)
    step(adamw, twins, of_others)
    optimizer = make(matrices, others, backend, {"weight_decay": 0.2, "betas": (0.8, 0.99), "eps": 1e-6})
    step(optimizer, [*matrices, *others], [[*a, *b] for a, b in zip(grads, of_others, strict=True)])
    for param, (of_torch, _) in zip(matrices, expected, strict=True):
        torch.testing.assert_close(param, of_torch, **CLOSE)
    for param, twin in zip(others, twins, strict=True):
        torch.testing.assert_close(param, twin, **CLOSE)
    assert set(optimizer.state[matrices[0]]) == {"momentum_buffer"}
    assert set(optimizer.state[others[0]]) == {"step", "exp_avg", "exp_avg_sq"}


IDENTITY = {"ns_steps": 1, "ns_coefficients": (1.0, 0.0, 0.0), "eps": 1.0, "adjust_lr_fn": "spectral_unclamped"}
ROUNDED = Mode(BF16, {"rounding": "stochastic"})


def sgd_of(params, momentum, backend, mode):
    """An element-wise optimizer that does what Muon does where the product changes nothing."""
    options = {"lr": 0.1, "momentum": momentum, "dampening": momentum, "zero_init_momentum": True}
    return fusedopt.SGD(params, backend=backend, **options, **mode.options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", [Mode(FP32, {}), *MODES, Mode(BF16, {"ema_decay": 0.9, "kahan": True})], ids=by_id)
def test_options_of_the_frame(mode, backend):
    """With a product that changes nothing, and directions that bf16 holds, Muon is SGD with an average of gradients.

    Square matrices of a norm of at most 1, so that they are divided by 1.
    """
    if mode.options.get("rounding") == "stochastic" and mode.dtype == FP32 and "state_dtype" not in mode.options:
        pytest.skip("nothing is rounded")
    mine, theirs = parameters([(64, 64), (72, 72)], mode.dtype), parameters([(64, 64), (72, 72)], mode.dtype)
    momentum = 0.5
    muon = fusedopt.Muon(
        mine, lr=0.1, momentum=momentum, nesterov=False, weight_decay=0, backend=backend, **IDENTITY, **mode.options
    )
    sgd = sgd_of(theirs, momentum, backend, mode)
    for at in range(2):
        for one, other in zip(mine, theirs, strict=True):
            # One bit each, so that half of it is exact, too.
            grad = torch.zeros_like(one)
            grad.view(-1)[at::97] = 2.0**-7
            one.grad, other.grad = grad, grad.clone()
        muon.step()
        sgd.step()
    for one, other in zip(mine, theirs, strict=True):
        # SGD's sum is rounded otherwise before it is stored in 8 bits, and the streams have other random numbers.
        is_coded, is_random = mode.options.get("state_dtype") == "8bit", mode.options.get("rounding") == "stochastic"
        assert set(muon.state[one]) == set(sgd.state[other])
        for name, value in [("parameter", other), *sgd.state[other].items()]:
            actual = one if name == "parameter" else muon.state[one][name]
            if is_coded or (is_random and name != "momentum_buffer"):
                torch.testing.assert_close(actual, value, rtol=2**-7, atol=2**-9)
            else:
                assert bits(actual) == bits(value), name


@pytest.mark.parametrize("backend", ENGINES)
def test_the_parameter_is_rounded_at_random_and_the_direction_to_nearest(backend):
    """Half of the updates, which are half an ULP, are rounded up. A direction that was, too, would be another one."""
    (param,) = [torch.nn.Parameter(torch.ones(128, 128, dtype=BF16, device=DEVICE))]
    lr = 2.0**-9 / 2.0**-8
    optimizer = fusedopt.Muon(
        [param],
        lr=lr,
        momentum=0,
        nesterov=False,
        weight_decay=0,
        rounding="stochastic",
        seed=7,
        backend=backend,
        **IDENTITY,
    )
    param.grad = torch.full_like(param, 2.0**-8)
    optimizer.step()
    went = (param.detach().float() - 1) / -(2.0**-8)
    assert set(went.unique().tolist()) == {0.0, 1.0}
    assert 0.45 < float(went.mean()) < 0.55


@pytest.mark.parametrize("backend", BACKENDS)
def test_engines_agree(backend):
    """All options at once: the directions are the same bits, and so are the products."""

    def run(backend):
        matrices, others = mixed(FP32)
        optimizer = make(matrices, others, backend, max_grad_norm=0.5, ema_decay=0.9, skip_nonfinite=True)
        params = [*matrices, *others]
        step(optimizer, params, gradients(params, 3))
        return params, [optimizer.state[param]["ema"] for param in params]

    for mine, theirs in zip(run(backend), run("triton"), strict=True):
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-3)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("backend", BACKENDS)
class TestGate:
    def test_clips_by_the_norm_of_all(self, backend):
        matrices, others = mixed()
        params = [*matrices, *others]
        grads = gradients(params, 2)
        norm = torch.cat([grad.flatten() for grad in grads[0]]).norm()
        optimizer = make(matrices, others, backend, max_grad_norm=0.5)
        twins = [torch.nn.Parameter(param.detach().clone()) for param in params]
        twin = make(twins[: len(matrices)], twins[len(matrices) :], "eager")
        for of_step in grads:
            step(optimizer, params, [of_step])
            for param, grad in zip(twins, of_step, strict=True):
                param.grad = grad.clone()
            if of_step is grads[0]:
                torch.testing.assert_close(optimizer.grad_norm, norm.cpu().double(), check_device=False)
            torch.nn.utils.clip_grad_norm_(twins, 0.5)
            twin.step()
        for one, other in zip(params, twins, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)

    def test_a_clip_to_nothing_leaves_the_momentum_at_work(self, backend):
        """The factor is that of gradients, and not of directions."""
        matrices, others = mixed()
        optimizer = make(matrices, others, backend, max_grad_norm=1.0, weight_decay=0)
        params = [*matrices, *others]
        step(optimizer, params, gradients(params, 1))
        before = [param.detach().clone() for param in matrices]
        for group in optimizer.param_groups:
            group["fusedopt_max_grad_norm"] = 0.0
        step(optimizer, params, gradients(params, 1))
        for param, was in zip(matrices, before, strict=True):
            assert float((param.detach() - was).norm()) > 0.01

    @pytest.mark.parametrize("first", [0, 1])
    def test_skips_all_or_nothing(self, backend, first):
        matrices, others = mixed()
        params = [*matrices, *others]
        optimizer = make(matrices, others, backend, skip_nonfinite=True, ema_decay=0.9)
        step(optimizer, params, gradients(params, first))
        before = [bits(param) for param in params]
        states = [{name: bits(value) for name, value in optimizer.state[param].items()} for param in params]
        bad = gradients(params, 1)
        bad[0][1][0, 0] = float("inf")
        step(optimizer, params, bad)
        assert [bits(param) for param in params] == before
        if first:
            now = [{name: bits(value) for name, value in optimizer.state[param].items()} for param in params]
            assert now == states
        assert int(optimizer.skipped_steps) == 1
        step(optimizer, params, gradients(params, 1))
        assert all(bits(param) != was for param, was in zip(params, before, strict=True))
        for param in params if not first else ():  # the average began with the first step that was taken
            torch.testing.assert_close(optimizer.state[param]["ema"], param.detach())

    def test_unscales_like_grad_scaler(self, backend):
        matrices, others = mixed()
        params = [*matrices, *others]
        twins = [torch.nn.Parameter(param.detach().clone()) for param in params]
        optimizer = make(matrices, others, backend)
        twin = make(twins[: len(matrices)], twins[len(matrices) :], backend)
        (of_step,) = gradients(params, 1)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0, device=DEVICE), torch.tensor(0.0, device=DEVICE)
        step(optimizer, params, [[4 * grad for grad in of_step]])
        step(twin, twins, [of_step])
        for one, other, grad in zip(params, twins, of_step, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)
            assert torch.equal(one.grad, grad)
        before = [bits(param) for param in params]
        optimizer.found_inf = torch.tensor(1.0, device=DEVICE)
        optimizer.step()
        assert [bits(param) for param in params] == before


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("backend", BACKENDS)
class TestState:
    def test_goes_to_torch_and_comes_from_it(self, backend):
        params = parameters(SHAPES)
        grads = gradients(params, 2)
        expected = stepped_by_torch(params, grads, OF_TORCH)
        theirs = [torch.nn.Parameter(param.detach().clone()) for param in params]
        step(fused := fusedopt.Muon(params, backend=backend, **OF_TORCH), params, grads[:1])
        step(of_torch := torch.optim.Muon(theirs, **OF_TORCH), theirs, grads[:1])
        assert fused.state_dict().keys() == of_torch.state_dict().keys()
        assert fused.state_dict()["param_groups"][0].keys() == of_torch.state_dict()["param_groups"][0].keys()
        new_fused = fusedopt.Muon(theirs, lr=9.0, backend=backend)
        new_fused.load_state_dict(of_torch.state_dict())
        new_torch = torch.optim.Muon(params, lr=9.0)
        new_torch.load_state_dict(fused.state_dict())
        step(new_fused, theirs, grads[1:])
        step(new_torch, params, grads[1:])
        for one, other, (wanted, _) in zip(params, theirs, expected, strict=True):
            torch.testing.assert_close(one, wanted, **CLOSE)
            torch.testing.assert_close(other, wanted, **CLOSE)

    @pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
    def test_survives(self, backend, way):
        matrices, others = mixed()
        params = [*matrices, *others]
        optimizer = make(matrices, others, backend, {"betas": (0.8, 0.9)}, ema_decay=0.5)
        grads = gradients(params, 2)
        step(optimizer, params, grads[:1])
        if way == "state_dict":
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            twins = [torch.nn.Parameter(param.detach().clone()) for param in params]
            other = make(twins[: len(matrices)], twins[len(matrices) :], backend, ema_decay=0.5)
            other.load_state_dict(torch.load(file))
        else:
            other = pickle.loads(pickle.dumps(optimizer)) if way == "pickle" else copy.deepcopy(optimizer)
            twins = [param for group in other.param_groups for param in group["params"]]
        step(optimizer, params, grads[1:])
        step(other, twins, grads[1:])
        for one, twin in zip(params, twins, strict=True):
            assert bits(one) == bits(twin)
            assert {name: bits(value) for name, value in optimizer.state[one].items()} == {
                name: bits(value) for name, value in other.state[twin].items()
            }


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "key", ["lr", "weight_decay", "momentum", "nesterov", "ns_steps", "ns_coefficients", "eps", "adjust_lr_fn"]
)
def test_every_key_counts_in_the_next_step(key, backend):
    values = {
        "lr": 0.5, "weight_decay": 0.7, "momentum": 0.1, "nesterov": False, "ns_steps": 2,
        "ns_coefficients": (2.0, -1.5, 0.5), "eps": 100.0, "adjust_lr_fn": "match_rms_adamw",
    }  # fmt: skip
    params = parameters(SHAPES)
    theirs = [torch.nn.Parameter(param.detach().clone()) for param in params]
    mine, of_torch = fusedopt.Muon(params, backend=backend, **OF_TORCH), torch.optim.Muon(theirs, **OF_TORCH)
    for optimizer, tensors in ((mine, params), (of_torch, theirs)):
        grads = gradients(tensors, 3)
        step(optimizer, tensors, grads[:1])
        optimizer.param_groups[0][key] = values[key]
        step(optimizer, tensors, grads[1:])
    for one, other in zip(params, theirs, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.usefixtures("exact_products")
def test_numbers_may_be_tensors_and_schedulers_work():
    params = parameters(SHAPES)
    theirs = [torch.nn.Parameter(param.detach().clone()) for param in params]
    numbers = {name: torch.tensor(value, device=DEVICE) for name, value in {**OF_TORCH, "momentum": 0.9}.items()}
    mine, of_torch = fusedopt.Muon(params, **numbers), torch.optim.Muon(theirs, **{**OF_TORCH, "momentum": 0.9})
    for optimizer, tensors in ((mine, params), (of_torch, theirs)):
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        for of_step in gradients(tensors, 3):
            step(optimizer, tensors, [of_step])
            scheduler.step()
    for one, other in zip(params, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)  # the tensors are fp32


@pytest.mark.usefixtures("exact_products")
def test_every_form_of_decay_acts_on_matrices():
    for form in ("fully_decoupled", "corrected", "cautious", "cautious_fully_decoupled", "cautious_corrected"):
        decayed, plain = parameters([(8, 16)]), parameters([(8, 16)])
        before = plain[0].detach().clone()
        ((grad,),) = gradients(plain, 1)
        options = {"lr": 0.1, "max_lr": 0.2, "weight_decay_form": form}
        step(fusedopt.Muon(decayed, weight_decay=0.3, **options), decayed, [[grad]])
        step(fusedopt.Muon(plain, weight_decay=0.0, **options), plain, [[grad]])
        update = before - plain[0].detach()
        rate = {"fully_decoupled": 0.5 * 0.3, "corrected": 0.5 * 0.1 * 0.3}.get(
            form.removeprefix("cautious_"), 0.1 * 0.3
        )
        where = update * before >= 0 if "cautious" in form else torch.ones_like(update, dtype=torch.bool)
        torch.testing.assert_close(decayed[0].detach(), plain[0].detach() - rate * before * where, **CLOSE)


ERRORS = [
    ({"lr": -1.0}, ValueError, "Learning rate should be >= 0 but is: -1.0"),
    ({"momentum": -1.0}, ValueError, "momentum should be >= 0 but is: -1.0"),
    ({"weight_decay": -1.0}, ValueError, "weight decay should be >= 0 but is: -1.0"),
    ({"adjust_lr_fn": "x"}, ValueError, "Adjust learning rate function x is not supported"),
    ({"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element"),
]
OWN_ERRORS = [
    ({"ns_steps": 100}, ValueError, "Number of steps must be less than 100 for computational efficiency"),
    ({"ns_steps": -1}, ValueError, "ns_steps of group 0 must be an integer that is not negative"),
    ({"ns_steps": 2.5}, ValueError, "ns_steps of group 0 must be an integer that is not negative"),
    ({"ns_coefficients": (1.0, 2.0)}, ValueError, "Coefficients must be a tuple of exactly 3 values"),
    ({"ns_coefficients": 3.4}, ValueError, "Coefficients must be a tuple of exactly 3 values"),
    ({"ns_coefficients": ((1.0, 2.0, 3.0), 4.0)}, ValueError, "Coefficients must be a tuple of exactly 3 values"),
    ({"ns_coefficients": (float("nan"), 1.0, 1.0)}, ValueError, "Coefficients must be a tuple of exactly 3 values"),
    ({"split": True}, ValueError, "split of group 0"),
    ({"eps": torch.tensor(1e-7, device="meta")}, TypeError, "eps of group 0"),
    ({"ns_coefficients": ()}, ValueError, "Coefficients must be a tuple of exactly 3 values"),
    ({"ns_coefficients": "polar"}, ValueError, "'polar_express'"),
    ({"eps": -1.0}, ValueError, "eps of group 0"),
    ({"betas": (0.9, 1.0)}, ValueError, "Invalid beta parameter at index 1"),
    ({"use_muon": "no"}, TypeError, "use_muon of group 0"),
    ({"split": 0}, ValueError, "split of group 0"),
    ({"split": 2.0}, ValueError, "split of group 0"),
    ({"split": (2, -1)}, ValueError, "split of group 0"),
    (
        {"split": 3},
        ValueError,
        r"split=3 does not divide parameter 0 of group 0: its shape is \(8, 16\), hence it has 8",
    ),
    ({"split": (3, 4)}, ValueError, r"split=\(3, 4\) does not divide"),
    ({"split": 3, "split_dim": -1}, ValueError, "16 columns"),
    ({"split": 2, "split_dim": 0}, ValueError, "split_dim of group 0 must be -2 for rows or -1 for columns"),
]


@pytest.mark.parametrize(("options", "error", "message"), ERRORS)
def test_errors_are_torchs(options, error, message):
    params = parameters([(8, 16)])
    with pytest.raises(error, match=message):
        torch.optim.Muon(params, **options)
    with pytest.raises(error, match=message):
        fusedopt.Muon(params, **options)


@pytest.mark.parametrize(("options", "error", "message"), OWN_ERRORS)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        fusedopt.Muon(parameters([(8, 16)]), **options)


@pytest.mark.parametrize(("key", "value"), [("ns_coefficients", (1.0,)), ("ns_steps", 100), ("split", 3)])
def test_errors_of_keys_that_change_come_before_anything_is_written(key, value):
    params = parameters([(8, 16)])
    optimizer = fusedopt.Muon(params, lr=0.1)
    step(optimizer, params, gradients(params, 1))
    before = bits(params[0]), bits(optimizer.state[params[0]]["momentum_buffer"])
    optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match=f"{key}|Coefficients|Number of steps"):
        step(optimizer, params, gradients(params, 1))
    assert (bits(params[0]), bits(optimizer.state[params[0]]["momentum_buffer"])) == before


def test_what_is_no_matrix_is_named():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    with pytest.raises(ValueError, match=r"\('0.bias'\) of shape \(4,\); .*\('1.weight'\).*\('1.bias'\).*muon_groups"):
        fusedopt.Muon(model.named_parameters())
    with pytest.raises(ValueError, match="and 5 more"):
        fusedopt.Muon([torch.zeros(3)] * 1 + [torch.nn.Parameter(torch.zeros(3)) for _ in range(14)])
    optimizer = fusedopt.Muon(parameters([(3, 4)]))
    with pytest.raises(ValueError, match="parameter 0 of group 1"):
        optimizer.add_param_group({"params": parameters([(3,)])})
    assert len(optimizer.param_groups) == 1
    refused = {"params": parameters([(3,)]), "use_muon": False, "fusedopt_clip": 1.0}
    before = set(refused)
    with pytest.raises(TypeError, match="fusedopt_clip"):
        optimizer.add_param_group(refused)
    assert set(refused) == before


@pytest.mark.parametrize(
    ("shape", "message"), [((16,), "orthogonalizes matrices"), ((7, 16), "split=2 does not divide")]
)
def test_a_parameter_that_comes_later_is_checked_too(shape, message):
    params = parameters([(8, 16)])
    optimizer = fusedopt.Muon(params, split=2)
    step(optimizer, params, gradients(params, 1))
    optimizer.param_groups[0]["params"] = parameters([shape])
    with pytest.raises(ValueError, match=f"{message}.*parameter 0 of group 0"):
        step(optimizer, optimizer.param_groups[0]["params"], gradients(parameters([shape]), 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_no_step_can_take(backend):
    complex_one = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.complex64, device=DEVICE))
    complex_one.grad = torch.ones_like(complex_one)
    with pytest.raises(RuntimeError, match="Muon does not support complex parameters"):
        fusedopt.Muon([complex_one], backend=backend).step()
    (sparse,) = parameters([(3, 4)])
    sparse.grad = torch.ones_like(sparse).to_sparse()
    with pytest.raises(RuntimeError, match="Muon does not support sparse gradients"):
        fusedopt.Muon([sparse], backend=backend).step()


def test_a_parameter_may_change_its_group_but_not_lose_half_of_a_state():
    """Muon begins with a momentum of its own, whatever AdamW has left; AdamW needs all that it had."""
    (param,) = parameters([(8, 16)])
    step(optimizer := fusedopt.Muon([param], use_muon=False), [param], gradients([param], 2))
    optimizer.param_groups[0]["use_muon"] = True
    step(optimizer, [param], gradients([param], 1))
    assert set(optimizer.state[param]) == {"step", "exp_avg", "exp_avg_sq", "momentum_buffer"}
    optimizer.param_groups[0]["use_muon"] = False
    del optimizer.state[param]["step"]
    with pytest.raises(RuntimeError, match="has no 'step'"):
        step(optimizer, [param], gradients([param], 1))


def test_eps_of_a_group_of_adamw():
    others = parameters([(3,)])
    assert fusedopt.Muon([{"params": others, "use_muon": False}]).param_groups[0]["eps"] == 1e-8
    assert fusedopt.Muon([{"params": others, "use_muon": False, "eps": 1e-6}]).param_groups[0]["eps"] == 1e-6
    assert fusedopt.Muon(parameters([(3, 4)])).param_groups[0]["eps"] == 1e-7
    assert fusedopt.Muon(others, use_muon=False).param_groups[0]["eps"] == 1e-8
    assert fusedopt.Muon(others, use_muon=False, eps=1e-3).param_groups[0]["eps"] == 1e-3


def test_schedulers_turn_the_momentum():
    """Which they ask the defaults for, where `betas` would go before it."""
    optimizer = fusedopt.Muon(parameters([(8, 16)]))
    assert "betas" not in optimizer.defaults
    assert "betas" not in pickle.loads(pickle.dumps(optimizer)).defaults
    assert fusedopt.Muon(parameters([(8, 16)]), betas=(0.5, 0.6)).defaults["betas"] == (0.5, 0.6)


def test_the_optimizer_can_be_made_again_from_its_defaults():
    optimizer = fusedopt.Muon(parameters([(8, 16)]), split=2, betas=(0.5, 0.6))
    again = fusedopt.Muon(parameters([(8, 16)]), **optimizer.defaults)
    assert {k: v for k, v in again.param_groups[0].items() if k != "params"} == {
        k: v for k, v in optimizer.param_groups[0].items() if k != "params"
    }


class TestGroups:
    def test_of_a_transformer(self):
        model = Transformer(32, 4, 1)
        muon, adamw = fusedopt.muon_groups(model, lr=3e-4, betas=(0.8, 0.9))
        assert [name for name, _ in muon["params"]] == [
            "blocks.0.to_qkv.weight",
            "blocks.0.from_heads.weight",
            "blocks.0.layers.0.weight",
            "blocks.0.layers.2.weight",
        ]
        assert muon["use_muon"] is True
        assert (adamw["use_muon"], adamw["lr"], adamw["betas"]) == (False, 3e-4, (0.8, 0.9))
        listed = [param for group in (muon, adamw) for _, param in group["params"]]
        assert sorted(map(id, listed)) == sorted(map(id, model.parameters()))
        fusedopt.Muon([muon, adamw])

    def test_heads_convolutions_norms_experts_and_ties(self):
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.table, self.tied = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5, bias=False)
                self.tied.weight = self.table.weight
                self.conv, self.hidden = torch.nn.Conv2d(3, 4, 2), torch.nn.Linear(4, 4, bias=False)
                self.classifier = torch.nn.Linear(4, 9, bias=False)
                self.experts = torch.nn.Parameter(torch.zeros(2, 4, 4))
                self.frozen = torch.nn.Parameter(torch.zeros(4, 4), requires_grad=False)
                self.odd = torch.nn.Linear(4, 4)

        model = Model()
        names = lambda group: [name for name, _ in group["params"]]  # noqa: E731
        muon, adamw = fusedopt.muon_groups(model, adamw=["odd"])
        assert sorted(names(muon)) == ["experts", "hidden.weight"]
        assert sorted(names(adamw)) == [
            "classifier.weight",
            "conv.bias",
            "conv.weight",
            "odd.bias",
            "odd.weight",
            "table.weight",
        ]
        for entry in (model.odd, model.odd.weight, "odd.weight", [model.odd]):
            assert "odd.weight" in names(fusedopt.muon_groups(model, adamw=entry)[1])
        with pytest.raises(ValueError, match="'even'"):
            fusedopt.muon_groups(model, adamw=["even"])
        for foreign in (torch.zeros(2, 2), torch.nn.Linear(2, 2)):
            with pytest.raises(ValueError, match="is not in the model"):
                fusedopt.muon_groups(model, adamw=[foreign])
        wrapped = torch.nn.ModuleDict({"module": model})
        for name in ("odd", "module.odd"):
            assert "module.odd.weight" in names(fusedopt.muon_groups(wrapped, adamw=name)[1])
        with pytest.raises(TypeError, match="int"):
            fusedopt.muon_groups(model, adamw=[3])

    def test_what_is_called_output_within_repeated_layers_is_none(self):
        """As in BERT, and as attention heads are often called."""

        def layer():
            output, heads = torch.nn.Module(), torch.nn.ModuleList(torch.nn.Linear(4, 2) for _ in range(2))
            output.dense = torch.nn.Linear(4, 4)
            return torch.nn.ModuleDict({"output": output, "heads": heads})

        model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer()]), "classifier": torch.nn.Linear(4, 3)})
        model.cls_token, model.pos_embed = (torch.nn.Parameter(torch.zeros(1, n, 4)) for n in (1, 5))
        model.attention = torch.nn.MultiheadAttention(4, 2, add_bias_kv=True)
        model.normalized = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 4))
        muon, adamw = fusedopt.muon_groups(model)
        assert sorted(name for name, _ in muon["params"]) == [
            "attention.in_proj_weight",
            "attention.out_proj.weight",
            "layers.0.heads.0.weight",
            "layers.0.heads.1.weight",
            "layers.0.output.dense.weight",
            "normalized.parametrizations.weight.original1",
        ]
        assert {"classifier.weight", "cls_token", "pos_embed", "attention.bias_k"} <= {
            name for name, _ in adamw["params"]
        }

    def test_a_group_without_parameters_is_left_out(self):
        (group,) = fusedopt.muon_groups(torch.nn.Linear(3, 4, bias=False))
        assert group["use_muon"]
        (group,) = fusedopt.muon_groups(torch.nn.LayerNorm(3))
        assert not group["use_muon"]
