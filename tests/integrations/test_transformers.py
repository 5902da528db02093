"""The Trainer of transformers."""

import pytest
import torch

import fusedopt
from tests.conftest import DEVICE
from tests.loops import OPTIONS, assert_nothing_lost, assert_trained_the_same, loss_of, make_loader, make_net
from tests.twins import BACKENDS, assert_same

transformers = pytest.importorskip("transformers", reason="needs the extra [integrations]")
pytest.importorskip("accelerate", reason="needs the extra [integrations]")

from accelerate.state import AcceleratorState, GradientState

both_backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def forgotten_accelerator():
    """The first choice of device and precision would be the whole process's."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make_net()

    def forward(self, x, labels):
        output = self.net(x)
        return {"loss": loss_of(output, labels), "output": output}


def make_trainer(folder, make_optimizer=None, *, bf16=False, save_strategy="no", **options):
    arguments = transformers.TrainingArguments(
        str(folder),
        use_cpu=DEVICE == "cpu",
        bf16=bf16,
        per_device_train_batch_size=4,
        num_train_epochs=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.3,
        lr_scheduler_type="linear",
        save_strategy=save_strategy,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    net = Net()
    data = [{"x": x, "labels": labels} for x, labels in make_loader().dataset]
    optimizer = None if make_optimizer is None else make_optimizer(net.parameters())
    return transformers.Trainer(net, arguments, train_dataset=data, optimizers=(optimizer, None), **options)


@pytest.mark.parametrize("bf16", [False, True])
@both_backends
def test_an_optimizer(backend, bf16, tmp_path):
    def run(make_optimizer):
        trainer = make_trainer(tmp_path, make_optimizer, bf16=bf16)
        trainer.train()
        return trainer.optimizer.optimizer

    assert_trained_the_same(run, backend)


@both_backends
def test_a_class_and_its_arguments(backend, tmp_path):
    optimizers = []
    for optimizer, own in ((fusedopt.AdamW, {"backend": backend}), (torch.optim.AdamW, {"foreach": False})):
        trainer = make_trainer(tmp_path, optimizer_cls_and_kwargs=(optimizer, {"lr": 0.1, "weight_decay": 0.1, **own}))
        trainer.train()
        assert isinstance(trainer.optimizer.optimizer, optimizer)
        optimizers.append(trainer.optimizer.optimizer)
    assert_same(*optimizers)


@both_backends
def test_resumed_run(backend, tmp_path):
    options = {"optimizer_cls_and_kwargs": (fusedopt.AdamW, {"lr": 0.1, "backend": backend, **OPTIONS})}
    unbroken, resumed = (make_trainer(tmp_path, save_strategy="epoch", **options) for _ in range(2))
    unbroken.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_nothing_lost(resumed.optimizer.optimizer, unbroken.optimizer.optimizer)
