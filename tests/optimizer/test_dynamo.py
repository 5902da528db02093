"""torch.compile around a step: the graph breaks before it, the numbers stay, and nothing is compiled twice."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import fusedopt
from tests.conftest import DEVICE
from tests.twins import BACKENDS, OPTIMIZERS, assert_same, make, make_params, make_torch, set_grads, snapshot, train

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from dynamo
both_backends = pytest.mark.parametrize("backend", BACKENDS)
ONE, INF = torch.tensor(1.0).to(DEVICE), torch.tensor(torch.inf).to(DEVICE)
AROUND = {"max_grad_norm": 0.5, "skip_nonfinite": True, "ema_decay": 0.9}


@pytest.fixture(autouse=True)
def compiled_once():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)).to(DEVICE, torch.float64)


def batch(step):
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(DEVICE)


def one(model, optimizer, inputs, weight=ONE):
    optimizer.zero_grad()
    loss = model(inputs).square().mean() * weight
    loss.backward()
    optimizer.step()
    return loss.detach()


def one_with_closure(model, optimizer, inputs, weight=ONE):
    def closure():
        optimizer.zero_grad()
        loss = model(inputs).square().mean() * weight
        loss.backward()
        return loss

    return optimizer.step(closure).detach()


def set_numbers(optimizer, step):
    for group in optimizer.param_groups:
        group["lr"] = 0.1 / (1 + step)
        group["weight_decay"] = 0.01 * step


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_step(name):
    models = make_model(), make_model()
    pair = make(name, models[0].parameters(), backend="eager"), make_torch(name, models[1].parameters())
    compiled = torch.compile(one, backend="eager")
    for step in range(3):
        if name != "Rprop":  # which has no weight decay
            list(map(set_numbers, pair, [step, step]))
        torch.testing.assert_close(compiled(models[0], pair[0], batch(step)), one(models[1], pair[1], batch(step)))
    assert_same(*pair)


def test_an_object_of_torchs_class():
    """Turned into ours by its class, it has nothing of ours yet when the step is traced."""
    pair = [make_torch("Adam", make_params()) for _ in range(2)]
    counter = CompileCounter()
    for optimizer in pair:
        optimizer.__class__ = fusedopt.Adam
        set_grads([param for group in optimizer.param_groups for param in group["params"]], 0)
    compiled = torch.compile(pair[0].step, backend=counter)
    for _ in range(3):
        compiled()
        pair[1].step()
    assert counter.frame_count == 0
    assert_same_bits(*pair)


def assert_same_bits(mine, theirs):
    mine, theirs = snapshot(mine), snapshot(theirs)
    assert mine["params"] == theirs["params"]
    assert list(mine["state"].values()) == list(theirs["state"].values())


@pytest.mark.parametrize("train_one", [one, one_with_closure])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@both_backends
def test_what_is_around_the_step(backend, name, train_one):
    """Clipping, skipping, averaging. With a closure its model is compiled too."""
    models = make_model(), make_model()
    pair = [make(name, model.parameters(), backend=backend, **AROUND) for model in models]
    graphs = CompileCounter()
    compiled = torch.compile(train_one, backend=graphs)
    for step in range(4):
        list(map(set_numbers, pair, [step, step]))
        weight = INF if step == 2 else ONE
        losses = compiled(models[0], pair[0], batch(step), weight), train_one(models[1], pair[1], batch(step), weight)
        assert torch.equal(*losses)
        torch.testing.assert_close(pair[0].grad_norm, pair[1].grad_norm, rtol=0, atol=0, equal_nan=True)
    assert graphs.op_count >= 3  # those of the model
    assert pair[0].skipped_steps == 1
    assert_same_bits(*pair)


@both_backends
def test_a_compiled_step(backend):
    pair = [make("AdamW", make_params(), backend=backend, **AROUND) for _ in range(2)]
    step = torch.compile(pair[0].step, backend="eager")
    for seed in range(3):
        list(map(set_numbers, pair, [seed, seed]))
        set_grads(pair[0].param_groups[0]["params"], seed)
        step()
        train(pair[1], range(seed, seed + 1))
    assert_same_bits(*pair)


@both_backends
def test_gradient_scaling(backend):
    """The kernels still skip by themselves. Of torch's GradScaler dynamo compiles parts twice."""
    models = make_model(), make_model()
    pair = [make("SGD", model.parameters(), backend=backend) for model in models]
    scalers = [torch.amp.GradScaler(DEVICE, init_scale=4.0) for _ in range(2)]

    def scaled(model, optimizer, scaler, inputs, weight):
        optimizer.zero_grad()
        scaler.scale(model(inputs).square().mean() * weight).backward()
        scaler.step(optimizer)
        scaler.update()

    with torch._dynamo.config.patch(error_on_recompile=False):
        compiled = torch.compile(scaled, backend="eager")
        for step in range(4):
            weight = INF if step == 0 else ONE
            compiled(models[0], pair[0], scalers[0], batch(step), weight)
            scaled(models[1], pair[1], scalers[1], batch(step), weight)
    assert pair[0].skipped_steps == pair[1].skipped_steps == (1 if backend == "triton" else 0)
    assert_same_bits(*pair)


@pytest.mark.skipif(DEVICE == "cpu" and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # from inductor itself
def test_inductor():
    """A network of one product, since the C++ compiler takes seconds for each kernel."""

    class Product(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 4, device=DEVICE))

        def forward(self, inputs):
            return self.weight * inputs

    models = Product(), Product()
    pair = make("AdamW", models[0].parameters(), backend="triton"), make_torch("AdamW", models[1].parameters())
    compiled = torch.compile(one, options={"compile_threads": 1})
    for step in range(3):
        list(map(set_numbers, pair, [step, step]))
        inputs = batch(step).float()
        torch.testing.assert_close(compiled(models[0], pair[0], inputs), one(models[1], pair[1], inputs))
    assert_same(*pair)
