"""torch.compile around a step: the graph breaks before it, the numbers stay, and nothing is compiled twice."""

import copy
import shutil

import pytest
import torch
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import fusedopt
from tests.conftest import DEVICE
from tests.twins import (
    BACKENDS,
    KERNELS,
    OPTIMIZERS,
    assert_same,
    bits,
    make,
    make_params,
    make_torch,
    set_grads,
    snapshot,
    train,
)

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


def make_model(name="AdamW"):
    torch.manual_seed(0)
    first, last = (torch.nn.Linear(*sizes, bias=name != "Muon") for sizes in [(4, 3), (3, 2)])
    return torch.nn.Sequential(first, torch.nn.Tanh(), last).to(DEVICE, torch.float64)


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


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_step(name):
    models = make_model(name), make_model(name)
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
    assert pair[0].skipped_steps == pair[1].skipped_steps == (1 if backend != "eager" else 0)
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
    pair = make("AdamW", models[0].parameters(), backend=KERNELS), make_torch("AdamW", models[1].parameters())
    compiled = torch.compile(one, options={"compile_threads": 1})
    for step in range(3):
        list(map(set_numbers, pair, [step, step]))
        inputs = batch(step).float()
        torch.testing.assert_close(compiled(models[0], pair[0], inputs), one(models[1], pair[1], inputs))
    assert_same(*pair)


class Sizes(torch.nn.Module):
    """More sizes than dynamo compiles a function for."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.ParameterList([torch.linspace(-1, 1, 2 + size) for size in range(10)])

    def forward(self, inputs):
        return sum((weight * inputs.sum()).square().sum() for weight in self.weights)


def make_pair(model, backend):
    """A model that steps in backward, and one that steps afterwards."""
    models = model, copy.deepcopy(model)
    steps = fusedopt.step_in_backward(models[0], lambda params: make("AdamW", params, backend=backend))
    return models, steps, make("AdamW", models[1].parameters(), backend=backend)


def backward(model, inputs):
    model(inputs).square().mean().backward()


def with_compiled_autograd(graphs):
    def run(*args):
        with compiled_autograd._enable(torch.compile(backend=graphs)):
            backward(*args)

    return run


def with_all_compiled(graphs):
    compiled = torch.compile(backward, backend=graphs)

    def run(*args):
        with torch._dynamo.config.patch(compiled_autograd=True):
            compiled(*args)

    return run


@pytest.mark.parametrize("how", [with_compiled_autograd, with_all_compiled])
@both_backends
def test_steps_in_backward_are_not_traced(backend, how):
    """Each ends a graph."""
    models, steps, other = make_pair(Sizes().to(DEVICE), backend)
    graphs, frames = CompileCounter(), []
    run = how(graphs)
    for step in range(3):
        with torch._dynamo.config.patch(error_on_recompile=False):  # torch's own functions, for each size
            run(models[0], batch(step))
        assert all(param.grad is None for param in models[0].parameters())
        backward(models[1], batch(step))
        other.step()
        other.zero_grad()
        frames.append(graphs.frame_count)
    assert frames[0] == frames[-1] <= 2 + len(models[0].weights)
    assert [*map(bits, models[0].weights)] == [*map(bits, models[1].weights)]
    assert_same(steps.optimizer, other)


def test_what_compiled_autograd_cannot_do_is_refused():
    (model, _), steps, _ = make_pair(make_model(), "eager")
    before = [param.tolist() for param in model.parameters()]

    def refused(error, match, **options):
        with compiled_autograd._enable(torch.compile(backend="eager", **options)), pytest.raises(error, match=match):
            backward(model, batch(0))
        model.zero_grad()
        torch._dynamo.reset()

    refused(torch._dynamo.exc.Unsupported, "step_in_backward.*fullgraph=False", fullgraph=True)
    hook = steps.optimizer.register_step_post_hook(print)
    refused(RuntimeError, "post-hook cannot be called.*compiled autograd")
    hook.remove()
    checkpointed = checkpoint(model, batch(0).requires_grad_(), use_reentrant=True)
    with (
        compiled_autograd._enable(torch.compile(backend="eager")),
        pytest.raises(RuntimeError, match="another one has"),
    ):
        checkpointed.sum().backward()
    model.zero_grad()
    bias = model[2].bias
    steps.optimizer.param_groups[0]["params"][3] = torch.nn.Parameter(bias.detach().clone())
    loss = torch.nn.Sequential(*model)(batch(0)).sum()  # calls no hook of the model
    with compiled_autograd._enable(torch.compile(backend="eager")), pytest.raises(RuntimeError, match=r"refresh\(\)"):
        loss.backward()
    assert [param.tolist() for param in model.parameters()] == before


def test_a_compiled_model_takes_new_parameters():
    """Its graph is whole: what is done before its forward is not in it."""
    models, steps, other = make_pair(make_model(), "eager")
    compiled = torch.compile(models[0], backend="aot_eager", fullgraph=True)
    for step in range(4):
        for model, optimizer in zip(models, (steps.optimizer, other), strict=True):
            if step == 2:
                bias = torch.nn.Parameter(model[2].bias.detach() + 1)
                optimizer.state[bias] = optimizer.state.pop(model[2].bias)
                optimizer.param_groups[0]["params"][3] = model[2].bias = bias
        with torch._dynamo.config.patch(error_on_recompile=False):
            backward(compiled, batch(step))
        backward(models[1], batch(step))
        other.step()
        other.zero_grad()
        assert all(param.grad is None for param in models[0].parameters())
    assert_same(steps.optimizer, other)
