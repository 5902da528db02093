"""What training code does around an optimizer: schedulers, scalers, averages, wrappers."""

import copy

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import SWALR, AveragedModel
from torch.utils._pytree import tree_map

import fusedopt
from tests.cases import CASES, MATRIX_CASES
from tests.conftest import DEVICE
from tests.twins import BACKENDS, OPTIMIZERS, assert_same, make, make_params, make_torch, params_of, train

pytestmark = pytest.mark.usefixtures("exact_products")
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
both_backends = pytest.mark.parametrize("backend", BACKENDS)


def both(name, backend, **options):
    """The optimizer and torch's, each with its own copy of the same parameters."""
    return make(name, make_params(of=name), backend=backend, **options), make_torch(
        name, make_params(of=name), **options
    )


SCHEDULERS = {
    "StepLR": lambda optimizer: StepLR(optimizer, step_size=2, gamma=0.5),
    "ExponentialLR": lambda optimizer: ExponentialLR(optimizer, gamma=0.5),
    "LambdaLR": lambda optimizer: LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch)),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=5, cycle_momentum=False),
    "LinearLR, then CosineAnnealingLR": lambda optimizer: SequentialLR(
        optimizer, [LinearLR(optimizer, 0.1, total_iters=2), CosineAnnealingLR(optimizer, T_max=3)], milestones=[2]
    ),
    "SWALR": lambda optimizer: SWALR(optimizer, swa_lr=0.05, anneal_epochs=2),
}


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["float", "tensor"])
@pytest.mark.parametrize("make_scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
@both_backends
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_scheduler(name, backend, make_scheduler, lr):
    pair = both(name, backend)
    rates = []
    for optimizer in pair:
        optimizer.param_groups[0]["lr"] = copy.deepcopy(lr)
        scheduler = make_scheduler(optimizer)
        for step in range(4):
            train(optimizer, range(step, step + 1))
            scheduler.step()
            rates.append(float(optimizer.param_groups[0]["lr"]))
    assert rates[:4] == pytest.approx(rates[4:])
    assert len(set(rates)) > 1
    assert_same(*pair)


@both_backends
@every_optimizer
def test_step_scheduler_for_every_class(name, backend):
    pair = both(name, backend)
    for optimizer in pair:
        scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
        for step in range(3):
            train(optimizer, range(step, step + 1))
            scheduler.step()
    assert_same(*pair)


@both_backends
@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adam", "AdamW", "Muon"])
def test_one_cycle_turns_momentum_or_betas(name, backend):
    options = {"momentum": 0.9} if name in ("RMSprop", "Muon") else {}
    pair = both(name, backend, **options)
    for optimizer in pair:
        scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=5, cycle_momentum=True)
        for step in range(4):
            train(optimizer, range(step, step + 1))
            scheduler.step()
    turned = "betas" if name.startswith("Adam") else "momentum"
    assert pair[0].param_groups[0][turned] == pair[1].param_groups[0][turned] != pair[0].defaults[turned]
    assert_same(*pair)


@both_backends
def test_plateau(backend):
    pair = both("Adam", backend, lr=0.1)
    for optimizer in pair:
        scheduler = ReduceLROnPlateau(optimizer, patience=0)
        for step in range(4):
            train(optimizer, range(step, step + 1))
            scheduler.step(1.0)
        assert optimizer.param_groups[0]["lr"] < 0.1
    assert_same(*pair)


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "1-d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@both_backends
@every_optimizer
def test_a_tensor_lr_changed_in_place(name, backend, shape, dtype):
    pair = both(name, backend)
    for optimizer in pair:
        lr = torch.full(shape, 0.5, dtype=dtype)
        optimizer.param_groups[0]["lr"] = lr
        for step in range(3):
            train(optimizer, range(step, step + 1))
            lr.mul_(0.5)
        assert optimizer.param_groups[0]["lr"] is lr
    assert_same(*pair)


@pytest.mark.parametrize("lr", ["number", "tensor", "tensor on a device"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@both_backends
def test_an_lr_that_changes_while_the_plan_holds(backend, momentum, lr, monkeypatch):
    """What has been computed from it must not outlive it."""
    monkeypatch.setattr("fusedopt.plan.DEBUG", False)  # under which every step makes a new plan
    if lr == "tensor on a device":  # whose value the host does not compare
        as_it_is = lambda value, *_: value if isinstance(value, torch.Tensor) else float(value)  # noqa: E731
        monkeypatch.setattr("fusedopt.step.hyper._number", as_it_is)
    pair = both("SGD", backend, momentum=momentum)
    for optimizer in pair:
        group = optimizer.param_groups[0]
        group["lr"] = 0.5 if lr == "number" else torch.tensor(0.5, dtype=torch.float64, device=DEVICE)
        train(optimizer, range(2))
        stepper = getattr(optimizer, "_stepper", None)
        plan = stepper and stepper.plan
        for step in range(2, 4):
            group["lr"] = group["lr"] * 0.5 if lr == "number" else group["lr"].mul_(0.5)
            train(optimizer, range(step, step + 1))
        assert (stepper and stepper.plan) is plan
    assert_same(*pair)


@both_backends
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_tensor_betas_changed_in_place(name, backend):
    beta1, beta2 = torch.tensor([[0.5]], dtype=torch.float64), torch.tensor([0.75], dtype=torch.float64)
    mine = make(name, make_params(), betas=(beta1, beta2), backend=backend)
    theirs = make_torch(name, make_params(), betas=(0.5, 0.75))
    train(mine, range(2))
    train(theirs, range(2))
    beta1.fill_(0.25)
    theirs.param_groups[0]["betas"] = (0.25, 0.75)
    train(mine, range(2, 4))
    train(theirs, range(2, 4))
    assert_same(mine, theirs)


WITH_NUMBERS = [*CASES, *MATRIX_CASES]
WITH_NUMBERS = [case for case in WITH_NUMBERS if case.options.get("weight_decay") or case.optimizer == "Rprop"]


@pytest.mark.parametrize("case", WITH_NUMBERS, ids=lambda case: case.id)
@both_backends
def test_every_number_may_be_a_tensor(case, backend, monkeypatch):
    """Also one that is read where it lies."""
    defaults = case.make(make_params(of=case.optimizer)).param_groups[0]
    numbers = {key: defaults[key] for key in case.optimizer_class.hyperparameters if key in defaults}
    numbers = {key: value for key, value in numbers.items() if not isinstance(value, (bool, str))}
    if case.optimizer == "Muon":
        del numbers["eps"]  # of products, which the host asks for
    tensors = tree_map(lambda number: torch.tensor(float(number), dtype=torch.float64, device=DEVICE), numbers)
    as_it_is = lambda value, *_: value if isinstance(value, torch.Tensor) else float(value)  # noqa: E731
    monkeypatch.setattr("fusedopt.step.hyper._number", as_it_is)
    optimizer = case.optimizer_class(make_params(of=case.optimizer), backend=backend, **{**case.options, **tensors})
    twin = case.make(make_params(of=case.optimizer), backend=backend)
    assert tensors.keys() >= ({"lr", "etas", "step_sizes"} if case.optimizer == "Rprop" else {"lr", "weight_decay"})
    for each in (optimizer, twin):
        train(each, range(3))
    assert_same(optimizer, twin)


def make_model(name):
    torch.manual_seed(0)
    first, last = (torch.nn.Linear(*sizes, bias=name != "Muon") for sizes in [(4, 3), (3, 2)])
    return torch.nn.Sequential(first, torch.nn.Tanh(), last).to(DEVICE, torch.float64)


def loss_of(model, step):
    batch = torch.randn(5, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(DEVICE)
    return model(batch).square().mean()


@both_backends
@every_optimizer
def test_grad_scaler_and_clipping(name, backend):
    models = make_model(name), make_model(name)
    pair = make(name, models[0].parameters(), backend=backend), make_torch(name, models[1].parameters())
    for model, optimizer in zip(models, pair, strict=True):
        scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0, growth_interval=2)
        for step in range(5):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            if step == 2:  # an overflow: nothing may move, the step count included
                model[0].weight.grad[1, 2] = float("inf")
            if step % 2:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() != 1024.0
    assert_same(*pair)
    steps = [int(values["step"]) for values in pair[0].state.values() if "step" in values]
    assert set(steps) <= {4}


@both_backends
@every_optimizer
def test_averaged_weights(name, backend):
    models = make_model(name), make_model(name)
    pair = make(name, models[0].parameters(), backend=backend), make_torch(name, models[1].parameters())
    averages = []
    for model, optimizer in zip(models, pair, strict=True):
        average, scheduler = AveragedModel(model), SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
            average.update_parameters(model)
            scheduler.step()
        averages.append(list(average.parameters()))
    torch.testing.assert_close(*averages)


@both_backends
@every_optimizer
def test_a_step_inside_the_backward_pass(name, backend):
    models = make_model(name), make_model(name)
    for model, factory, extra in zip(models, (make, make_torch), ({"backend": backend}, {}), strict=True):
        optimizers = {param: factory(name, [param], **extra) for param in model.parameters()}

        def hook(param, optimizers=optimizers):
            optimizers[param].step()
            optimizers[param].zero_grad()

        for param in model.parameters():
            param.register_post_accumulate_grad_hook(hook)
        for step in range(3):
            loss_of(model, step).backward()
    torch.testing.assert_close(list(models[0].parameters()), list(models[1].parameters()))


@both_backends
@every_optimizer
def test_a_subclass_made_at_run_time(name, backend):
    subclass = type(f"Fused{name}", (getattr(fusedopt, name),), {})
    mine, theirs = both(name, backend)
    made = subclass(make_params(of=name), backend=backend, **({"momentum": 0.9} if name == "SGD" else {}))
    train(mine, range(1))
    mine.__class__ = subclass  # and not a word to __init__
    train(mine, range(1, 3))
    train(made, range(3))
    train(theirs, range(3))
    assert_same(mine, theirs)
    assert_same(made, theirs)
    assert repr(mine).startswith(f"Fused{name} (\nbackend: {backend}")


@every_optimizer
def test_an_object_of_torchs_class_becomes_one_of_ours(name):
    mine, theirs = (make_torch(name, make_params(of=name)) for _ in range(2))
    train(mine, range(1))
    mine.__class__ = getattr(fusedopt, name)
    train(mine, range(1, 3))
    train(theirs, range(3))
    for optimizer in (mine, theirs):
        optimizer.add_param_group({"params": make_params(of=name)})
        train(optimizer, range(3, 4))
    assert_same(mine, theirs)


class Wrapper:
    """As Lightning and Fabric do: an instance that poses as a subclass of the optimizer's class."""

    def __init__(self, optimizer):
        hidden = ("state_dict", "step", "zero_grad", "__del__")
        self.__dict__ = {key: value for key, value in optimizer.__dict__.items() if key not in hidden}
        self.__class__ = type("Wrapped" + type(optimizer).__name__, (self.__class__, type(optimizer)), {})
        self._inner = optimizer

    def step(self, closure=None):
        return self._inner.step(closure)

    def state_dict(self):
        return self._inner.state_dict()


@both_backends
@every_optimizer
def test_a_wrapper_that_poses_as_the_class(name, backend):
    mine, theirs = both(name, backend)
    wrapped = Wrapper(mine)
    assert isinstance(wrapped, getattr(fusedopt, name))
    scheduler, expected = StepLR(wrapped, 1, 0.5), StepLR(theirs, 1, 0.5)
    for step in range(3):
        train(wrapped, range(step, step + 1))
        train(theirs, range(step, step + 1))
        scheduler.step()
        expected.step()
        wrapped.zero_grad()
    assert_same(mine, theirs)
    assert repr(wrapped).startswith(f"Wrapped{name} (")


@both_backends
@every_optimizer
def test_no_weak_references_are_held(name, backend):
    """`torch.utils.swap_tensors`, which `module.to` may use, refuses tensors that have some."""
    mine, theirs = both(name, backend)
    for optimizer in (mine, theirs):
        train(optimizer, range(2))
        for param in params_of(optimizer):
            param.grad = None
            torch.utils.swap_tensors(param, torch.nn.Parameter(param.detach() + 1))
        train(optimizer, range(2, 4))
    assert_same(mine, theirs)


@both_backends
@every_optimizer
def test_moved_memory_is_not_kept_alive(name, backend):
    """Offloading counts on it."""
    mine = make(name, make_params(of=name), backend=backend)
    train(mine, range(2))
    first = params_of(mine)[0]
    old = StorageWeakRef(first.untyped_storage()), StorageWeakRef(first.grad.untyped_storage())
    first.data = torch.zeros_like(first)
    first.grad = None
    assert [storage.expired() for storage in old] == [True, True]


@every_optimizer
def test_meta_tensors(name):
    param = torch.nn.Parameter(torch.ones(3, 4, device="meta"))
    param.grad = torch.ones_like(param)
    optimizer = make(name, [param])
    optimizer.step()
    optimizer.step()
    (state,) = optimizer.state.values()
    assert {value.device.type for key, value in state.items() if key in optimizer.states} == {"meta"}


@every_optimizer
def test_fake_tensors(name):
    """Memory estimators run a step on tensors without memory, silently."""
    with torch._subclasses.fake_tensor.FakeTensorMode():
        params = [torch.nn.Parameter(torch.ones(3, 4))]
        optimizer = make(name, params)
        for _ in range(2):
            params[0].grad = torch.ones(3, 4)
            optimizer.step()
    (state,) = optimizer.state.values()
    assert {value.shape for key, value in state.items() if key in optimizer.states} == {(3, 4)}


@both_backends
@every_optimizer
def test_default_device_and_grad_modes(name, backend):
    mine, theirs = both(name, backend)
    with torch.device(DEVICE), torch.no_grad():
        train(mine, range(2))
    train(theirs, range(2))
    assert_same(mine, theirs)


@both_backends
def test_constant_lr_of_zero_changes_nothing(backend):
    mine = make("Adam", make_params(), backend=backend, lr=0.0)
    before = [param.detach().clone() for param in params_of(mine)]
    ConstantLR(mine)
    train(mine, range(3))
    assert all(torch.equal(a, b) for a, b in zip(before, params_of(mine), strict=True))
