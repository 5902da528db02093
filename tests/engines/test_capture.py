"""What a CUDA graph needs of a step. Without a GPU, a capture is a list of launches that are made at each replay."""

import copy
import gc

import pytest
import torch

import fusedopt
import fusedopt.engines.choice
import fusedopt.engines.tables
from fusedopt.options import KEYS
from fusedopt.rules import rmsprop, sgd
from fusedopt.step import hyper
from tests.conftest import DEVICE
from tests.twins import assert_same, params_of, set_grads, snapshot

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="imitates a graph, a GPU has real ones")

CAPTURABLE = {
    "Adadelta": {},
    "AdamW": {"weight_decay": 0.1},
    "NAdam": {},
    "RMSprop": {"momentum": 0.9},
    "SGD": {"momentum": 0.9, "dampening": 0.5},
}


class Graph:
    """Records launches instead of making them."""

    def __init__(self, monkeypatch):
        self._monkeypatch = monkeypatch
        self.launches = []

    def __enter__(self):
        self._launch = fusedopt.engines.tables.launch
        self._monkeypatch.setattr(fusedopt.step.graphs, "is_capturing", lambda: True)
        self._monkeypatch.setattr(
            fusedopt.engines.tables, "launch", lambda *args, **options: self.launches.append((args, options))
        )
        return self

    def __exit__(self, *error):
        self._monkeypatch.setattr(fusedopt.step.graphs, "is_capturing", lambda: False)
        self._monkeypatch.setattr(fusedopt.engines.tables, "launch", self._launch)

    def replay(self):
        for args, options in self.launches:
            self._launch(*args, **options)


@pytest.fixture
def graph(monkeypatch):
    monkeypatch.setattr("fusedopt.plan.DEBUG", False)
    return Graph(monkeypatch)


def parameters():
    return [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 16, 33)]


def make(name="AdamW", **options):
    flag = {} if name in ("SGD", "Adagrad") else {"capturable": True}
    options = {"lr": 0.1, **CAPTURABLE.get(name, {}), **flag, **options}
    return getattr(fusedopt, name)(parameters(), backend="triton", **options)


def new_grads(optimizer, seed):
    """New values where the old gradients are, as a graph has them."""
    old = [param.grad for param in params_of(optimizer)]
    set_grads(params_of(optimizer), seed)
    for param, grad in zip(params_of(optimizer), old, strict=True):
        if grad is not None:
            param.grad = grad.copy_(param.grad)


def stepped(optimizer, seed=0):
    new_grads(optimizer, seed)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", CAPTURABLE)
def test_replays_are_steps(graph, name):
    optimizer = stepped(make(name))
    twin = copy.deepcopy(optimizer)
    set_grads(params_of(twin), 0)
    before = snapshot(optimizer)
    with graph:
        optimizer.step()
    assert snapshot(optimizer) == before
    for seed in range(1, 4):
        new_grads(optimizer, seed)
        new_grads(twin, seed)
        graph.replay()
        twin.step()
        assert_same(optimizer, twin)


@pytest.mark.parametrize("options", [{}, {"state_dtype": "8bit"}], ids=["full", "8bit"])
def test_replays_clip_skip_and_average(graph, options):
    optimizer = stepped(make(max_grad_norm=0.5, skip_nonfinite=True, ema_decay=0.5, **options))
    twin = copy.deepcopy(optimizer)
    set_grads(params_of(twin), 0)
    with graph:
        optimizer.step()
    grad_norm = optimizer.grad_norm
    for seed in range(1, 5):
        new_grads(optimizer, seed)
        new_grads(twin, seed)
        if seed == 2:
            for param in (params_of(optimizer)[1], params_of(twin)[1]):
                param.grad[3] = float("nan")
        graph.replay()
        twin.step()
        assert_same(optimizer, twin)
        torch.testing.assert_close(grad_norm, twin.grad_norm, equal_nan=True)
    assert optimizer.skipped_steps == twin.skipped_steps == 1


def test_a_graph_keeps_its_numbers(graph):
    """Whatever the optimizer does between two replays: other numbers, ordinary steps, new tables."""
    optimizer = stepped(make())
    with graph:
        optimizer.step()
    twin = copy.deepcopy(optimizer)
    set_grads(params_of(twin), 0)
    group, twin_group = optimizer.param_groups[0], twin.param_groups[0]
    for seed in range(1, 4):
        group["lr"] = twin_group["lr"] = 0.5**seed
        new_grads(optimizer, seed)
        new_grads(twin, seed)
        optimizer.step()
        twin.step()
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})  # makes new tables
        twin_group["lr"] = 0.1
        graph.replay()
        twin.step()
        torch.testing.assert_close(params_of(optimizer)[:3], params_of(twin))


LIVE = {
    "AdamW": {
        "lr": (0.1, 0.05),
        "betas": ((0.9, 0.99), (0.5, 0.9)),
        "eps": (1e-8, 1e-3),
        "weight_decay": (0.1, 0.3),
        "max_lr": (0.2, 0.4),
        "max_grad_norm": (0.5, 0.1),
        "skip_grad_norm": (1e6, 1e-6),
        "ema_decay": (0.5, 0.9),
    },
    "SGD": {"lr": (0.1, 0.05), "momentum": (0.9, 0.5), "dampening": (0.5, 0.1), "weight_decay": (0.1, 0.3)},
    "RMSprop": {"alpha": (0.99, 0.9), "momentum": (0.9, 0.5)},
}


@pytest.mark.parametrize(("name", "number"), [(name, number) for name, numbers in LIVE.items() for number in numbers])
def test_a_number_on_the_device_is_live(graph, monkeypatch, name, number):
    """A replay reads what the tensor holds then, and nobody asks for the value before."""
    first, second = LIVE[name][number]
    options = {"weight_decay_form": "cautious_corrected"} if name == "AdamW" else {}
    optimizer = make(name, **{**options, number: first})
    group, key = optimizer.param_groups[0], KEYS.get(number, number)
    twin = copy.deepcopy(optimizer)
    as_if_on_device(monkeypatch)
    live = torch.utils._pytree.tree_map(lambda value: torch.tensor(value, dtype=torch.float64), first)
    group[key] = live
    stepped(optimizer)
    stepped(twin)
    with graph:
        optimizer.step()
    with Graph(monkeypatch):  # a plan of its own
        optimizer.step()
    for seed, value in enumerate((first, second, first), start=1):
        torch.utils._pytree.tree_map(lambda tensor, value: tensor.fill_(value), live, value)
        twin.param_groups[0][key] = value
        new_grads(optimizer, seed)
        new_grads(twin, seed)
        graph.replay()
        twin.step()
        assert_same(optimizer, twin)
    assert optimizer.skipped_steps == twin.skipped_steps == (number == "skip_grad_norm")


def as_if_on_device(monkeypatch):
    """Tensors of numbers are read where they lie, and cannot be asked before a replay."""
    monkeypatch.setattr(hyper, "_number", lambda value, *_: value if isinstance(value, torch.Tensor) else float(value))
    for module in (sgd, rmsprop):
        monkeypatch.setattr(module, "lies_on_device", lambda value: isinstance(value, torch.Tensor))


def test_what_a_graph_reads_is_kept(graph):
    optimizer = stepped(make(max_grad_norm=1.0))
    transposed = torch.nn.Parameter(torch.ones(4, 5))
    optimizer.add_param_group({"params": [transposed, torch.nn.Parameter(torch.ones(8, 2)[:, 0])]})
    stepped(optimizer, 1)
    with graph:
        optimizer.step()
    tensors = [arg for args, _ in graph.launches for arg in args if isinstance(arg, torch.Tensor)]
    refs = [tensor.untyped_storage()._weak_ref() for tensor in tensors]
    del tensors
    graph.launches.clear()  # a graph knows addresses only
    for seed in range(2, 5):  # new gradients, new numbers, new plans
        optimizer.param_groups[0]["lr"] *= 0.5
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
        set_grads(params_of(optimizer), seed)
        optimizer.step()
    gc.collect()
    assert not any(torch.UntypedStorage._expired(ref) for ref in refs)
    for ref in refs:
        torch.UntypedStorage._free_weak_ref(ref)


def test_a_capture_allocates_no_pinned_memory(graph, monkeypatch):
    """PyTorch records a copy from pinned memory only, and cannot always allocate any meanwhile."""
    tables = stepped(make())._stepper.plan._step._kernels._tables[0]
    allocated = []

    def empty(*size, pin_memory, **options):
        allocated.append(torch.ones(*size, **options))
        return allocated[-1]

    monkeypatch.setattr(torch, "empty", empty)
    before = tables.uploads._staging(10)
    with graph:
        captured = tables.uploads._staging(10)
        assert len(allocated) == 2
    after = tables.uploads._staging(10)
    assert captured is not before
    assert after is not captured
    assert tables.uploads._spare is not captured


def test_two_graphs(graph, monkeypatch):
    optimizer = stepped(make())
    twin = copy.deepcopy(optimizer)
    set_grads(params_of(twin), 0)
    other = Graph(monkeypatch)
    with graph:
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.7
    with other:
        optimizer.step()
    for seed, (replayed, lr) in enumerate([(graph, 0.1), (other, 0.7), (graph, 0.1)], start=1):
        new_grads(optimizer, seed)
        new_grads(twin, seed)
        twin.param_groups[0]["lr"] = lr
        replayed.replay()
        twin.step()
        torch.testing.assert_close(params_of(optimizer), params_of(twin))


@pytest.mark.parametrize(
    "name", ["Adadelta", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "Lion"]
)
def test_capturable_is_asked_for(graph, name):
    optimizer = stepped(make(name, capturable=False))
    before = snapshot(optimizer)
    with graph, pytest.raises(RuntimeError, match="capturable=True"):
        optimizer.step()
    assert snapshot(optimizer) == before
    assert not graph.launches


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_classes_without_the_option_are_captured(graph, name):
    """As torch's SGD is."""
    optimizer = stepped(make(name))
    with graph:
        optimizer.step()
    assert graph.launches


def test_states_come_before_the_capture(graph):
    optimizer = make()
    new_grads(optimizer, 0)
    with graph, pytest.raises(RuntimeError, match="make a step before the capture"):
        optimizer.step()
    assert not graph.launches
    assert not optimizer.state or not any(optimizer.state.values())


def test_what_has_begun_comes_before_the_capture(graph):
    """States that have been loaded are there, but what says that they have begun would be a part of the graph."""
    optimizer = make(ema_decay=0.9)
    optimizer.load_state_dict(stepped(make(ema_decay=0.9)).state_dict())
    new_grads(optimizer, 0)
    with graph, pytest.raises(RuntimeError, match="make a step before the capture"):
        optimizer.step()
    assert not graph.launches


def test_the_counter_comes_before_the_capture(graph):
    optimizer = stepped(make())
    optimizer.param_groups[0]["fusedopt_skip_nonfinite"] = True
    with graph, pytest.raises(RuntimeError, match="make a step before the capture"):
        optimizer.step()
    assert not graph.launches


def test_the_reference_is_not_captured(graph):
    optimizer = stepped(fusedopt.AdamW(parameters(), capturable=True))
    with graph, pytest.raises(RuntimeError, match="where Triton's kernels step"):
        optimizer.step()
