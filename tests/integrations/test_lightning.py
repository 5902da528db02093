"""The loops of Lightning and Fabric."""

import pytest
import torch
from torch.optim.lr_scheduler import StepLR

import fusedopt
from tests.conftest import DEVICE
from tests.loops import (
    OPTIONS,
    assert_nothing_lost,
    assert_trained_the_same,
    loss_of,
    make_loader,
    make_net,
    make_scaler,
    mine,
)
from tests.twins import BACKENDS, params_of

lightning = pytest.importorskip("lightning", reason="needs the extra [integrations]")

from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision as FabricMixedPrecision
from lightning.fabric.strategies import SingleDeviceStrategy
from lightning.fabric.wrappers import _FabricOptimizer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import MixedPrecision

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning's own use of it
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
both_backends = pytest.mark.parametrize("backend", BACKENDS)
every_precision = pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])


class Module(lightning.LightningModule):
    def __init__(self, make_optimizer, *, overflows=False):
        super().__init__()
        self.net = make_net()
        self.make_optimizer = make_optimizer
        self.overflows = overflows

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.net.parameters())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 1, 0.7), "interval": "step"}}

    def training_step(self, batch, index):
        return loss_of(self.net(batch[0]), batch[1], index if self.overflows else None)


def make_trainer(max_epochs=2, **options):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return lightning.Trainer(accelerator="auto", devices=1, max_epochs=max_epochs, **quiet, **options)


def precision_options(precision, plugin=MixedPrecision):
    """On a CPU it offers fp16 only in this way."""
    return (
        {"plugins": plugin(precision, DEVICE, make_scaler())} if precision == "16-mixed" else {"precision": precision}
    )


@every_precision
@both_backends
def test_automatic_optimization(backend, precision):
    """Lightning refuses to clip for an optimizer that says that it unscales, even where nothing is scaled."""

    def run(make_optimizer):
        trainer = make_trainer(gradient_clip_val=0.3, accumulate_grad_batches=2, **precision_options(precision))
        trainer.fit(Module(make_optimizer, overflows=precision == "16-mixed"), make_loader())
        return trainer.optimizers[0]

    optimizer = assert_trained_the_same(run, backend)
    # Once in each of two epochs. Beside the reference GradScaler skips, the kernels do it by themselves.
    assert optimizer.skipped_steps == (2 if (backend != "eager", precision) == (True, "16-mixed") else 0)


class ManualModule(Module):
    automatic_optimization = False

    def training_step(self, batch, index):
        wrapper = self.optimizers()
        assert wrapper is not self.trainer.optimizers[0]
        with wrapper.toggle_model(sync_grad=index % 2 == 1):
            self.manual_backward(super().training_step(batch, index))
            if index % 2:
                self.clip_gradients(wrapper, gradient_clip_val=0.3, gradient_clip_algorithm="norm")
                wrapper.step()
                wrapper.zero_grad()
                self.lr_schedulers().step()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@both_backends
def test_manual_optimization(backend, precision):
    def run(make_optimizer):
        trainer = make_trainer(**precision_options(precision))
        trainer.fit(ManualModule(make_optimizer), make_loader())
        return trainer.optimizers[0]

    assert_trained_the_same(run, backend)


@pytest.mark.parametrize(
    "wrap", [LightningOptimizer, lambda optimizer: _FabricOptimizer(optimizer, SingleDeviceStrategy())]
)
@both_backends
def test_what_a_wrapper_knows(backend, wrap):
    """It is of a class made at run time, and what it has not itself it asks of the optimizer."""
    optimizer = mine(backend, max_grad_norm=1.0, ema_decay=0.9)(make_net().parameters())
    wrapper = wrap(optimizer)
    assert isinstance(wrapper, fusedopt.AdamW)
    for param in params_of(optimizer):
        param.grad = torch.ones_like(param)
    optimizer.found_inf = torch.ones((), device=DEVICE)
    optimizer.step()
    del optimizer.found_inf
    optimizer.step()
    assert wrapper.skipped_steps == optimizer.skipped_steps == 1
    assert wrapper.grad_norm is optimizer.grad_norm
    assert wrapper.grad_norm == pytest.approx(sum(param.numel() for param in params_of(wrapper)) ** 0.5)
    assert repr(wrapper).partition("\n")[2] == repr(optimizer).partition("\n")[2]
    for outer, inner in ((wrapper, optimizer), (optimizer, wrapper)):
        with outer.swap_ema():
            for forbidden in (optimizer.step, inner.state_dict, inner.swap_ema().__enter__):
                with pytest.raises(RuntimeError, match="within swap_ema"):
                    forbidden()
    optimizer.step()


@both_backends
def test_resumed_run(backend, tmp_path):
    unbroken, first, resumed = make_trainer(), make_trainer(max_epochs=1), make_trainer()
    unbroken.fit(Module(mine(backend, **OPTIONS)), make_loader())
    first.fit(Module(mine(backend, **OPTIONS)), make_loader())
    first.save_checkpoint(tmp_path / "checkpoint")
    module = Module(mine(backend, **OPTIONS))
    resumed.fit(module, make_loader(), ckpt_path=tmp_path / "checkpoint", weights_only=True)
    assert_nothing_lost(resumed.optimizers[0], unbroken.optimizers[0])


def train_in_fabric(make_optimizer, precision, saved=None, batches=range(6)):
    """Returns the optimizer, and what is to be saved."""
    fabric = Fabric(accelerator="auto", devices=1, **precision_options(precision, FabricMixedPrecision))
    net = make_net()
    optimizer = make_optimizer(net.parameters())
    scheduler = StepLR(optimizer, 1, 0.7)
    net, wrapper = fabric.setup(net, optimizer)
    state = {"net": net, "optimizer": wrapper, "scheduler": scheduler}
    if saved is not None:
        fabric.load(saved, state)
    for index, (data, target) in enumerate(fabric.setup_dataloaders(make_loader())):
        if index in batches:
            fabric.backward(loss_of(net(data), target, index if precision == "16-mixed" else None))
            if index % 2:
                fabric.clip_gradients(net, wrapper, max_norm=0.3, error_if_nonfinite=False)
                wrapper.step()
                wrapper.zero_grad()
                scheduler.step()
    return optimizer, lambda path: fabric.save(path, state)


@every_precision
@both_backends
def test_fabric(backend, precision):
    optimizer = assert_trained_the_same(lambda make_optimizer: train_in_fabric(make_optimizer, precision)[0], backend)
    assert optimizer.skipped_steps == (1 if (backend != "eager", precision) == (True, "16-mixed") else 0)


@both_backends
def test_resumed_run_in_fabric(backend, tmp_path):
    unbroken, _ = train_in_fabric(mine(backend, **OPTIONS), "32-true")
    _, save = train_in_fabric(mine(backend, **OPTIONS), "32-true", batches=range(4))
    save(tmp_path / "checkpoint")
    resumed, _ = train_in_fabric(mine(backend, **OPTIONS), "32-true", tmp_path / "checkpoint", batches=range(4, 6))
    assert_nothing_lost(resumed, unbroken)
