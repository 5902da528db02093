"""What only a GPU shows: real graphs, real waiting, real streams. The other tests of the kernels run there too."""

import copy

import pytest
import torch

import fusedopt
from fusedopt.options import KEYS
from tests.twins import assert_same, make_params, params_of, set_grads

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def ordinary_steps(monkeypatch):
    """Without FUSEDOPT_DEBUG, under which every step makes new tables."""
    monkeypatch.setattr("fusedopt.plan.DEBUG", False)


def static_grads(optimizer, seed):
    """New values where the old gradients are."""
    old = [param.grad for param in params_of(optimizer)]
    set_grads(params_of(optimizer), seed)
    for param, grad in zip(params_of(optimizer), old, strict=True):
        if grad is not None:
            param.grad = grad.copy_(param.grad)


def warmed_up(optimizer):
    """Stepped on a side stream, as torch.cuda.graph asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for seed in range(2):
            static_grads(optimizer, seed)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    return optimizer


def new_numbers(optimizers, seed, options):
    """Gradients, and the learning rate of the first group, which is a tensor. Once a step that the options skip."""
    for optimizer in optimizers:
        static_grads(optimizer, seed)
        optimizer.param_groups[0]["lr"].fill_(0.1 / seed)
        if seed == 4:
            params_of(optimizer)[0].grad.fill_(float("inf") if options else 1.0)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "skip_nonfinite": True, "ema_decay": 0.9}], ids=str)
def test_replays_follow_a_tensor_lr(options):
    lr = torch.tensor(0.1, device="cuda")
    optimizer = warmed_up(fusedopt.AdamW(make_params(torch.float32), lr=lr, capturable=True, **options))
    twin = copy.deepcopy(optimizer)
    set_grads(params_of(twin), 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for seed in range(2, 8):
        new_numbers((optimizer, twin), seed, options)
        junk = [torch.full((1000,), 7, dtype=torch.int64).pin_memory() for _ in range(20)]  # takes what was freed
        graph.replay()
        twin.step()
        torch.cuda.synchronize()
        del junk
        assert_same(optimizer, twin)


def test_every_number_on_the_device_is_live_in_a_graph():
    """Nothing waits for one at the capture, and a replay reads what it holds then."""
    first = {
        "lr": 0.1,
        "weight_decay": 0.1,
        "max_lr": 0.2,
        "max_grad_norm": 0.5,
        "skip_grad_norm": 1e6,
        "ema_decay": 0.5,
    }
    live = {name: torch.tensor(number, device="cuda") for name, number in first.items()}
    live["betas"] = tuple(torch.tensor(beta, device="cuda") for beta in (0.9, 0.99))
    options = {"capturable": True, "weight_decay_form": "cautious_corrected"}
    optimizer = warmed_up(fusedopt.AdamW(make_params(torch.float32), **options, **live))
    numbers = {name: float(number) for name, number in live.items() if name != "betas"}
    twin = warmed_up(fusedopt.AdamW(make_params(torch.float32), betas=(0.9, 0.99), **options, **numbers))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    (group,) = twin.param_groups
    changes = [*((name, 0.7 * number) for name, number in first.items()), ("skip_grad_norm", 1e-6), ("lr", 0.05)]
    for seed, (name, number) in enumerate(changes, start=2):
        live[name].fill_(number)
        group[KEYS.get(name, name)] = float(live[name])
        live["betas"][0].fill_(0.9 - 0.05 * seed)
        group["betas"] = float(live["betas"][0]), float(live["betas"][1])
        static_grads(optimizer, seed)
        static_grads(twin, seed)
        graph.replay()
        twin.step()
        torch.cuda.synchronize()
        assert_same(optimizer, twin)
    assert int(optimizer.skipped_steps) == int(twin.skipped_steps) == 2


def test_a_whole_training_step_is_captured():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).cuda()
    twin = copy.deepcopy(model)
    optimizer = fusedopt.Adam(model.parameters(), lr=0.01, capturable=True)
    twin_optimizer = fusedopt.Adam(twin.parameters(), lr=0.01)
    inputs = torch.randn(4, 8, device="cuda")

    def train(network, step):
        step.zero_grad(set_to_none=True)
        network(inputs).square().mean().backward()
        step.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            train(model, optimizer)
    torch.cuda.current_stream().wait_stream(stream)
    for _ in range(3):
        train(twin, twin_optimizer)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        train(model, optimizer)
    for _ in range(5):
        inputs.normal_()
        graph.replay()
        train(twin, twin_optimizer)
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "skip_nonfinite": True, "ema_decay": 0.9}], ids=str)
def test_a_step_of_matrices_is_captured(options):
    """Muon's products lie between two launches. Steps in between have other directions, and leave the graph's alone."""
    shapes = [(64, 96), (96, 64), (64, 96), (33, 20)]  # products in a batch, alone, and of a padded copy
    matrices = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in shapes]
    lr = torch.tensor(0.1, device="cuda")
    groups = [{"params": matrices}, {"params": make_params(torch.float32), "use_muon": False}]
    optimizer = warmed_up(fusedopt.Muon(groups, lr=lr, **options))
    twin = copy.deepcopy(optimizer)
    set_grads(params_of(twin), 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for seed in range(2, 8):
        new_numbers((optimizer, twin), seed, options)
        optimizer.step() if seed == 5 else graph.replay()
        twin.step()
        torch.cuda.synchronize()
        for param, other in zip(params_of(optimizer), params_of(twin), strict=True):
            # A graph and a step may take other kernels of torch's for the products, which end in bf16.
            torch.testing.assert_close(param, other, rtol=0, atol=1e-3)
    assert int(optimizer.skipped_steps) == int(twin.skipped_steps) == bool(options)


def test_graphs_and_steps_take_turns():
    """Each graph has the numbers of its capture, whatever the optimizer has done since."""
    optimizer = warmed_up(fusedopt.NAdam(make_params(torch.float32), lr=0.1, capturable=True, max_grad_norm=1.0))
    twin = copy.deepcopy(optimizer)
    set_grads(params_of(twin), 0)
    graphs = {lr: torch.cuda.CUDAGraph() for lr in (0.1, 0.7)}
    for lr, graph in graphs.items():
        optimizer.param_groups[0]["lr"] = lr
        with torch.cuda.graph(graph):
            optimizer.step()
    for seed, lr in enumerate((0.1, 0.3, 0.7, 0.1, 0.5, 0.5, 0.7), start=2):
        static_grads(optimizer, seed)
        static_grads(twin, seed)
        optimizer.param_groups[0]["lr"] = twin.param_groups[0]["lr"] = lr
        graphs[lr].replay() if lr in graphs else optimizer.step()
        twin.step()
        assert_same(optimizer, twin)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_capture_asks_for_capturable():
    optimizer = warmed_up(fusedopt.Adam(make_params(torch.float32)))
    with pytest.raises(RuntimeError, match="capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "skip_nonfinite": True, "ema_decay": 0.9}], ids=str)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_grad_scaler_waits_for_nothing(name, options):
    params = make_params(torch.float32)
    momentum = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(fusedopt, name)(params, lr=0.1, **momentum, **options)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    set_grads(params, 0)
    scaler.scale(torch.ones((), device="cuda"))
    scaler.step(optimizer)  # makes the tables
    scaler.update()
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for seed in range(1, 4):
            set_grads_on_device(params, seed)
            scaler.step(optimizer)
            scaler.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(param.isfinite().all() for param in params)


def set_grads_on_device(params, seed):
    for param in params:
        param.grad = torch.full_like(param, 0.1 * seed)


def test_grad_scaler_skips_on_overflow():
    params = make_params(torch.float32)
    optimizer = fusedopt.SGD(params, lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    before = [param.detach().clone() for param in params]
    for value in (float("inf"), 2.0):
        for param in params:
            param.grad = torch.full_like(param, value)
        scaler.scale(torch.ones((), device="cuda"))
        scaler.step(optimizer)
        scaler.update()
    for param, old in zip(params, before, strict=True):
        torch.testing.assert_close(param.detach(), old - 0.1)  # the scale was halved
    assert optimizer.skipped_steps == 1


def test_norm_has_the_same_bits_whatever_runs_beside():
    params = [torch.nn.Parameter(torch.randn(1_000_003, device="cuda")) for _ in range(50)]  # more chunks than programs
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = fusedopt.SGD(params, lr=0.0, max_grad_norm=1.0)
    norms = []
    for _ in range(20):
        other = torch.randn(2048, 2048, device="cuda")
        with torch.cuda.stream(torch.cuda.Stream()):
            other @ other
        optimizer.step()
        norms.append(optimizer.grad_norm)
    assert len(set(map(float, norms))) == 1
    expected = sum(param.grad.double().square().sum() for param in params).sqrt()
    torch.testing.assert_close(norms[0], expected, rtol=1e-12, atol=0)


def test_steps_on_another_stream():
    params = make_params(torch.float32)
    twins = copy.deepcopy(params)
    optimizer, twin = fusedopt.Adam(params, lr=0.1), fusedopt.Adam(twins, lr=0.1)
    for seed in range(6):
        set_grads(params, seed)
        set_grads(twins, seed)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        twin.step()
    assert_same(optimizer, twin)


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "skip_nonfinite": True, "ema_decay": 0.9}], ids=str)
def test_warmup_leaves_nothing_to_compile(options, tensor_lr):
    from fusedopt.kernels import gate, multi_tensor

    def versions():
        kernels = multi_tensor.prepare, multi_tensor.update, gate.sum_squares
        return [sum(len(caches[0]) for caches in kernel.device_caches.values()) for kernel in kernels]

    lr = torch.tensor(0.1, device="cuda") if tensor_lr else 0.1
    optimizer = fusedopt.NAdam(make_params(torch.float32), lr=lr, **options)
    fusedopt.warmup(optimizer)
    compiled = versions()
    set_grads(params_of(optimizer), 0)
    optimizer.step()
    scaler = torch.amp.GradScaler("cuda")
    scaler.scale(torch.ones((), device="cuda"))
    scaler.step(optimizer)
    assert versions() == compiled
