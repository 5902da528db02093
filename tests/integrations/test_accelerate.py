"""The loop of Accelerate."""

import copy

import pytest
import torch
from torch.optim.lr_scheduler import StepLR

from tests.conftest import DEVICE
from tests.loops import (
    BATCHES,
    OPTIONS,
    OVERFLOW,
    assert_nothing_lost,
    assert_trained_the_same,
    loss_of,
    make_loader,
    make_net,
    make_scaler,
    mine,
    muon,
)
from tests.twins import BACKENDS, params_of

accelerate = pytest.importorskip("accelerate", reason="needs the extra [integrations]")

from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState, GradientState

both_backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def make_accelerator():
    """Makes accelerators. The first choice of device and precision would be the whole process's."""

    def make(precision="no"):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        cpu = DEVICE == "cpu"
        return accelerate.Accelerator(cpu=cpu, mixed_precision=precision, gradient_accumulation_steps=2)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(accelerator, make_optimizer, saved=None, batches=range(BATCHES)):
    net = make_net()
    optimizer = make_optimizer(net.parameters())
    net, wrapper, loader, scheduler = accelerator.prepare(net, optimizer, make_loader(), StepLR(optimizer, 1, 0.7))
    if saved is not None:
        accelerator.load_state(saved)
    for index, (data, target) in enumerate(loader):
        if index in batches:
            with accelerator.accumulate(net):
                accelerator.backward(loss_of(net(data), target))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), 0.3)
                wrapper.step()
                scheduler.step()
                wrapper.zero_grad()
    return optimizer


@pytest.mark.parametrize("precision", ["no", "bf16"])
@both_backends
def test_loop(make_accelerator, backend, precision):
    assert_trained_the_same(lambda make_optimizer: train(make_accelerator(precision), make_optimizer), backend)


@both_backends
def test_prepare_loads_the_state_at_once(make_accelerator, backend):
    """Also that of an optimizer which has stepped."""
    prepared = mine(backend, **OPTIONS)(make_net().parameters())
    step(prepared)
    twin = copy.deepcopy(prepared)
    make_accelerator().prepare(prepared)
    step(prepared)
    step(twin)
    assert_nothing_lost(prepared, twin)


def step(optimizer):
    for param in params_of(optimizer):
        param.grad = torch.ones_like(param)
    optimizer.step()


@pytest.mark.parametrize(("made", "backend"), [*((mine, backend) for backend in BACKENDS), (muon, "eager")])
def test_resumed_run(make_accelerator, made, backend, tmp_path):
    unbroken = train(make_accelerator(), made(backend, **OPTIONS))
    accelerator = make_accelerator()
    train(accelerator, made(backend, **OPTIONS), batches=range(4))
    accelerator.save_state(tmp_path)
    resumed = train(make_accelerator(), made(backend, **OPTIONS), tmp_path, batches=range(4, BATCHES))
    assert_nothing_lost(resumed, unbroken)


@both_backends
def test_an_overflow_is_a_skipped_step(make_accelerator, backend):
    """Accelerate infers that from GradScaler's not calling `step`. Its schedulers do not step then."""
    make_accelerator()

    def run(make_optimizer):
        net, scaler = make_net(), make_scaler()
        optimizer = make_optimizer(net.parameters())
        scheduler = StepLR(optimizer, 1, 0.7)
        wrapper = AcceleratedOptimizer(optimizer, scaler=scaler)
        scheduler = AcceleratedScheduler(scheduler, wrapper, split_batches=True)
        skipped = []
        for index, (data, target) in enumerate(make_loader()):
            scaler.scale(loss_of(net(data.to(DEVICE)), target.to(DEVICE), index)).backward()
            wrapper.step()
            scheduler.step()
            wrapper.zero_grad()
            skipped.append(wrapper.step_was_skipped)
        assert skipped == [index == OVERFLOW for index in range(BATCHES)]
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.7 ** (BATCHES - 1))
        return optimizer

    assert_trained_the_same(run, backend)
