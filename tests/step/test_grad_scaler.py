"""torch.amp.GradScaler: with kernels it leaves unscaling and skipping to the step, else it does both itself."""

import functools

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fusedopt
from tests.bounded import Bounded, exact
from tests.cases import BF16, FP16, FP32
from tests.conftest import DEVICE
from tests.step.test_gate import COMPLEX, INF, NAN, everything, norm_of, zeros
from tests.tolerance import assert_close
from tests.twins import BACKENDS, KERNELS, make, make_torch, params_of, random, set_grads, snapshot

both_backends = pytest.mark.parametrize("backend", BACKENDS)


def new_scaler(**options):
    return torch.amp.GradScaler(DEVICE, init_scale=3.0, growth_interval=3, **options)  # no power of two: 1/3 is rounded


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).to(DEVICE)


OVERFLOWS = (0, 3, 4)


def train(model, optimizer, scaler, *, unscale=False, max_norm=None):
    """Seven iterations, of which some overflow; the weights after each, and the scales."""
    history = []
    for step in range(7):
        optimizer.zero_grad()
        batch = random((4, 6), step, FP32)
        scaler.scale(model(batch).square().sum()).backward()
        if step in OVERFLOWS:
            model[2].bias.grad[1] = INF if step else NAN
        if unscale:
            scaler.unscale_(optimizer)
        if max_norm is not None:
            clip_grad_norm_(model.parameters(), max_norm)
        scaler.step(optimizer)
        scaler.update()
        history.append(([param.detach().clone() for param in model.parameters()], scaler.get_scale()))
    return history


def assert_trained_alike(mine, theirs):
    for step, ((params, scale), (expected, expected_scale)) in enumerate(zip(mine, theirs, strict=True)):
        torch.testing.assert_close(params, expected, msg=lambda text, step=step: f"step {step}: {text}")
        assert scale == expected_scale


class StoppedError(Exception):
    """Raised by a scaler as soon as it is known who unscales."""


def is_left_to_the_step(stepped):
    """Whether GradScaler leaves unscaling and skipping to the step of what it is given."""
    scaler = new_scaler()
    scaler.scale(torch.ones((), device=DEVICE))
    told = []
    for name in ("unscale_", "_check_inf_per_device"):

        def stop(_, name=name):
            told.append(name)
            raise StoppedError

        setattr(scaler, name, stop)
    with pytest.raises(StoppedError):
        scaler.step(stepped)
    return told == ["_check_inf_per_device"]


@both_backends
def test_is_recognised_where_the_kernels_run(backend):
    params = zeros(((3,), FP32), ((2,), FP32))
    assert is_left_to_the_step(fusedopt.Adam(params, backend=backend)) == (backend != "eager")
    groups = [{"params": params[:1]}, {"params": params[1:], "fused": False}]
    optimizer = fusedopt.Adam(groups, backend=backend)
    for _ in range(2):  # before the first step, and after
        assert not is_left_to_the_step(optimizer)
        set_grads(params, 0)
        optimizer.step()


class Delegating:
    """A wrapper that is no optimizer, as many frameworks have one."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name):
        return getattr(self.optimizer, name)


class Clipping(fusedopt.Adam):
    def step(self, closure=None):
        clip_grad_norm_(self.param_groups[0]["params"], 0.01)
        return super().step(closure)


class Plain(fusedopt.Adam):
    """A subclass with nothing of its own around the step."""


def class_assigned(params):
    optimizer = torch.optim.Adam(params)
    optimizer.__class__ = Clipping
    optimizer.backend = KERNELS
    return optimizer


def decorated(params):
    optimizer = fusedopt.Adam(params, backend=KERNELS)
    plain = optimizer.step

    @functools.wraps(plain)
    def step(*args):
        clip_grad_norm_(params, 0.01)
        return plain(*args)

    optimizer.step = step
    return optimizer


def hooked(kind):
    def make_hooked(params):
        optimizer = fusedopt.Adam(params, backend=KERNELS)
        getattr(optimizer, f"register_step_{kind}_hook")(lambda *_: None)
        return optimizer

    return make_hooked


OTHERS = {
    "wrapper": lambda params: Delegating(fusedopt.Adam(params, backend=KERNELS)),
    "subclass": lambda params: Clipping(params, backend=KERNELS),
    "assigned class": class_assigned,
    "decorated step": decorated,
    "pre hook": hooked("pre"),
    "post hook": hooked("post"),
}


@pytest.mark.parametrize("make_other", OTHERS.values(), ids=OTHERS)
def test_is_not_left_to_what_else_looks_at_gradients(make_other):
    assert not is_left_to_the_step(make_other(zeros(((3,), FP32), ((2,), FP32))))


def test_is_not_left_where_all_optimizers_have_a_hook():
    optimizer = fusedopt.Adam(zeros(((3,), FP32)), backend=KERNELS)
    hook = register_optimizer_step_pre_hook(lambda *_: None)
    assert not is_left_to_the_step(optimizer)
    hook.remove()
    assert is_left_to_the_step(optimizer)


def test_is_left_to_a_step_that_schedulers_watch():
    optimizer = Plain(zeros(((3,), FP32)), backend=KERNELS)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    torch.optim.lr_scheduler.StepLR(optimizer, 2)
    assert "step" in vars(optimizer)
    assert is_left_to_the_step(optimizer)


def test_who_else_asks_is_told_no():
    """They take a yes for other things, or would not set the attributes."""
    optimizer = fusedopt.Adam(zeros(((3,), FP32)), backend=KERNELS)
    assert not optimizer._step_supports_amp_scaling
    assert not Delegating(optimizer)._step_supports_amp_scaling


WRAPPED = {"wrapper": Delegating, "plain": lambda optimizer: optimizer}


@both_backends
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("clips", [False, True])
def test_trains_as_torch_whatever_is_around(backend, wrap, clips):
    """Scaled gradients reach nobody: neither a clipping step, nor the step of a wrapper, nor a hook."""

    class ClippingTorch(torch.optim.Adam):
        def step(self, closure=None):
            clip_grad_norm_(self.param_groups[0]["params"], 0.01)
            return super().step(closure)

    mine, theirs = make_model(), make_model()
    ours = (Clipping if clips else fusedopt.Adam)(mine.parameters(), lr=0.01, backend=backend)
    twin = (ClippingTorch if clips else torch.optim.Adam)(theirs.parameters(), lr=0.01)
    seen = {}
    for optimizer in (ours, twin):
        norms = seen[optimizer] = []
        optimizer.register_step_pre_hook(lambda opt, *_, norms=norms: norms.append(float(norm_of(params_of(opt)))))
    assert_trained_alike(train(mine, wrap(ours), new_scaler()), train(theirs, wrap(twin), new_scaler()))
    assert seen[ours] == pytest.approx(seen[twin], rel=1e-5)  # hooks are not called in steps that are skipped


TRAINED = {
    "SGD": {"lr": 0.01, "momentum": 0.9, "dampening": 0.5},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "Adagrad": {"lr": 0.1, "lr_decay": 0.1},
    "NAdam": {"lr": 0.01},
}


@both_backends
@pytest.mark.parametrize("name", TRAINED)
def test_trains_as_torch(backend, name):
    """The first iteration overflows too, where SGD's buffer must not begin."""
    mine, theirs = make_model(), make_model()
    optimizer = make(name, mine.parameters(), backend=backend, **TRAINED[name])
    history = train(mine, optimizer, new_scaler())
    assert_trained_alike(history, train(theirs, make_torch(name, theirs.parameters(), **TRAINED[name]), new_scaler()))
    assert optimizer.skipped_steps == (len(OVERFLOWS) if backend != "eager" else 0)  # else no step is called
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")
    assert optimizer.grad_norm is None


@both_backends
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("option", [False, True])
def test_clipping_takes_unscaled_gradients(backend, option, unscale):
    """By the option, whoever unscales; or by the user, between unscale_ and step."""
    if not (option or unscale):
        return  # would clip scaled gradients
    mine, theirs = make_model(), make_model()
    options = {"max_grad_norm": 0.5, "skip_nonfinite": True} if option else {}
    optimizer = fusedopt.Adam(mine.parameters(), lr=0.01, backend=backend, **options)
    history = train(mine, optimizer, new_scaler(), unscale=unscale, max_norm=None if option else 0.5)
    expected = train(theirs, torch.optim.Adam(theirs.parameters(), lr=0.01), new_scaler(), unscale=True, max_norm=0.5)
    assert_trained_alike(history, expected)


def test_the_norm_is_that_of_unscaled_gradients():
    model = make_model()
    optimizer = fusedopt.Adam(model.parameters(), backend=KERNELS, max_grad_norm=1.0)
    scaler = new_scaler()
    scaler.scale(model(random((4, 6), 0, FP32)).square().sum()).backward()
    norm = norm_of(model.parameters()) / 3
    scaler.step(optimizer)
    assert float(optimizer.grad_norm) == pytest.approx(float(norm), rel=1e-14)


class Told:
    """An optimizer as GradScaler leaves it before the step."""

    def __init__(self, optimizer, grad_scale, found_inf):
        self.optimizer = optimizer
        self.numbers = {"grad_scale": grad_scale, "found_inf": found_inf}

    def step(self):
        vars(self.optimizer).update(self.numbers)
        self.optimizer.step()
        for name in self.numbers:
            delattr(self.optimizer, name)


def number(value, shape=(), dtype=FP32):
    return torch.full(shape, value, dtype=dtype, device=DEVICE)


@both_backends
@pytest.mark.parametrize("dtype", [torch.float64, FP32, BF16, FP16, COMPLEX], ids=str)
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}], ids=str)
def test_divides_by_the_scale(backend, dtype, options):
    """As the reference does too, which a sparse gradient can leave a parameter to that the kernels were to step."""
    params = zeros(((40,), dtype), ((2, 3), FP32))
    optimizer = fusedopt.SGD(params, lr=1.0, backend=backend, **options)
    set_grads(params, 0)
    params[1].grad = params[1].grad.to_sparse()
    grads = [param.grad.to_dense().clone() for param in params]
    norm = norm_of(params) / 3
    factor = (1 if not options else 0.5 / (norm + 1e-6)) / Bounded.of(3)
    Told(optimizer, number(3.0), number(0.0)).step()
    for param, grad in zip(params, grads, strict=True):
        assert_close(param, -(Bounded.of(exact(grad)) * factor))


@both_backends
@pytest.mark.parametrize("found_inf", [1.0, 2.0, NAN])
@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_found_inf_skips(backend, found_inf, skip_nonfinite):
    """Also where the gradients here are finite: GradScaler may have clipped, or sum over ranks."""
    params = zeros(((40,), FP32), ((2, 3), BF16))
    optimizer = fusedopt.AdamW(params, backend=backend, skip_nonfinite=skip_nonfinite, ema_decay=0.5)
    set_grads(params, 0)
    optimizer.step()
    before = snapshot(optimizer)
    for grad_scale in (None, number(2.0), number(0.0)):
        Told(optimizer, grad_scale, number(found_inf)).step()
        assert snapshot(optimizer) == before
    assert optimizer.skipped_steps == 3
    params[0].grad[0] = NAN
    Told(optimizer, number(2.0), number(found_inf)).step()
    assert optimizer.skipped_steps == 4, "counted once for both reasons"
    params[0].grad[0] = 1.0
    Told(optimizer, number(2.0), number(0.0)).step()
    assert snapshot(optimizer) != before
    assert optimizer.skipped_steps == 4


@both_backends
@pytest.mark.parametrize(
    ("grad_scale", "found_inf"),
    [
        (number(2.0, (1,)), number(0.0, (1,))),
        (number(2.0, dtype=torch.float64), number(0, dtype=torch.int64)),
        (2.0, 0),
    ],
    ids=["one-element tensors", "other dtypes", "numbers"],
)
def test_numbers_in_other_forms(backend, grad_scale, found_inf):
    (param,) = zeros(((5,), FP32))
    optimizer = fusedopt.SGD([param], lr=1.0, backend=backend)
    set_grads([param], 0)
    grad = param.grad.clone()
    Told(optimizer, grad_scale, found_inf).step()
    assert torch.equal(param.detach(), -param.grad)
    assert torch.equal(param.grad, grad / 2)


def test_a_scale_of_the_users_own_counts_too():
    """GradScaler multiplies it with its own."""
    (param,) = zeros(((5,), FP32))
    optimizer = fusedopt.SGD([param], lr=1.0, backend=KERNELS)
    set_grads([param], 0)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0)
    scaler.scale(param.sum())
    optimizer.grad_scale = number(2.0)
    grad = param.grad.clone()
    scaler.step(optimizer)
    assert torch.equal(param.detach(), -grad / 8)


def test_fp16_gradients():
    """Which GradScaler refuses to unscale itself."""
    params = zeros(((40,), FP16), ((2, 3), FP16))
    optimizer = fusedopt.SGD(params, lr=1.0, momentum=0.9, backend=KERNELS)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    scaler.scale(params[0].sum())
    set_grads(params, 0)
    params[1].grad[0, 0] = INF
    scaler.step(optimizer)
    scaler.update()
    assert not any(param.any() for param in params)
    params[1].grad[0, 0] = 6e4
    grads = [exact(param.grad) for param in params]
    scaler.step(optimizer)
    assert scaler.get_scale() == 512
    for param, grad in zip(params, grads, strict=True):
        assert_close(param, Bounded.of(-grad / 512))


def test_without_any_gradient():
    optimizer = fusedopt.SGD(zeros(((5,), FP32)), lr=1.0, backend=KERNELS, max_grad_norm=1.0)
    scaler = new_scaler()
    scaler.scale(torch.ones((), device=DEVICE))
    scaler.step(optimizer)  # found_inf is the number 0 here
    assert optimizer.skipped_steps == optimizer.grad_norm == 0


@both_backends
def test_a_disabled_scaler(backend):
    mine, theirs = make_model(), make_model()
    first = fusedopt.Adam(mine.parameters(), lr=0.01, backend=backend)
    second = fusedopt.Adam(theirs.parameters(), lr=0.01, backend=backend)
    scaler = new_scaler(enabled=False)
    for step in range(2):
        for model, optimizer in ((mine, first), (theirs, second)):
            optimizer.zero_grad()
            model(random((4, 6), step, FP32)).square().sum().backward()
        scaler.step(first)
        scaler.update()
        second.step()
    assert everything(first) == everything(second)
    assert len(params_of(first)) == 4
