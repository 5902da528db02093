"""Muon where matrices are cut between ranks: the bits of one process, whatever the placements."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import _muon

import fusedopt
from fusedopt.matrices import batches
from fusedopt.matrices.exchange import cost, owners
from fusedopt.matrices.newton_schulz import orthogonalize_
from fusedopt.storage.quantized_tensor import Quantized
from tests.cases import BF16, FP32
from tests.ranks import on_one_worker, on_ranks, rank_device, run_on_ranks
from tests.twins import BACKENDS

fsdp = pytest.importorskip("torch.distributed.fsdp")
import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.state_dict import (  # noqa: E402
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor  # noqa: E402
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module  # noqa: E402

from tests.distributed.test_sharded import assert_same_bits, whole_of  # noqa: E402

both_backends = pytest.mark.parametrize("backend", BACKENDS)
on_2_or_4_ranks = pytest.mark.parametrize("ranks", [2, 4])
FP64 = torch.float64
LR = 0.1
# Each of five iterations rounds three products, each by no more than this part of its magnitude.
ROUNDING = 5 * 3 * 2.0**-8


def orthogonalize_each(x, *args):
    for matrix in x.split(1):
        orthogonalize_(matrix, *args)


# How many matrices are multiplied together decides how their products are rounded.
multiplied_alone = mock.patch.object(batches, "orthogonalize_", orthogonalize_each)

# Shape, placement, and keys of the group. Sizes that are multiples of 8 lie in batches as they are, others are padded;
# some have fewer rows than there are ranks.
CUT = [
    ((16, 8), Shard(0), {}),
    ((16, 8), Shard(0), {"adjust_lr_fn": "match_rms_adamw", "nesterov": False}),
    ((8, 24), Shard(0), {}),
    ((8, 24), Shard(1), {}),
    ((13, 5), Shard(0), {}),
    ((5, 13), Shard(1), {}),
    ((3, 9), Shard(0), {}),
    ((1, 8), Shard(0), {}),
    ((16, 8), Replicate(), {}),
    ((4, 8, 16), Shard(0), {}),  # a batch of experts, of which each rank has some
    ((5, 8, 16), Shard(0), {}),
    ((5, 16, 8), Shard(1), {}),  # of which each rank has some rows
    ((3, 6, 10), Shard(2), {}),
    ((2, 3, 8, 8), Shard(2), {}),
    ((24, 8), Shard(0), {"split": 3}),  # queries, keys and values
    ((22, 10), Shard(0), {"split": (10, 6, 6)}),
    ((8, 24), Shard(0), {"split": 3, "split_dim": -1}),
    ((16, 8), Shard(0), {"use_muon": False}),
]
STORED = [
    (FP32, {"weight_decay": 0.3, "ema_decay": 0.9}),
    (FP32, {"ns_coefficients": "polar_express", "state_dtype": BF16}),
    (BF16, {}),
    (BF16, {"master_weights": True}),
    (FP64, {}),
]


def values_of(shape, seed, dtype=FP32):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values.to(rank_device()) if dist.is_initialized() else values


def line_mesh():
    return init_device_mesh(rank_device().type, (dist.get_world_size(),))


def square_mesh():
    return init_device_mesh(rank_device().type, (2, 2), mesh_dim_names=("outer", "inner"))


def distribute(values, mesh, placements):
    """What all ranks have alike."""
    return distribute_tensor(values, mesh, placements, src_data_rank=None)


class Parameters(nn.Module):
    """Those of `cases`, cut or whole."""

    def __init__(self, cases, mesh=None, dtype=FP32, is_transposed=False):
        super().__init__()
        self.all = nn.ParameterList()
        for seed, (shape, placement, _) in enumerate(cases):
            values = values_of(shape, seed, dtype)
            if mesh is not None:
                values = distribute(values, mesh, placement if isinstance(placement, tuple) else (placement,))
            if is_transposed:
                held = values._local_tensor if mesh is not None else values
                held = held.mT.contiguous().mT
                values = DTensor(held, values._spec, requires_grad=False) if mesh is not None else held
            self.all.append(nn.Parameter(values))

    def groups(self, cases):
        return [{"params": [param], **keys} for param, (_, _, keys) in zip(self.all, cases, strict=True)]


def make_both(cases, mesh, dtype=FP32, is_transposed=False, **options):
    """Models of cut and of whole parameters, and the optimizer of each."""
    models = Parameters(cases, mesh, dtype, is_transposed), Parameters(cases, None, dtype, is_transposed)
    return models, [fusedopt.Muon(model.groups(cases), lr=LR, **options) for model in models]


def set_same_grads(sharded, whole, step, scale=1.0, without=()):
    for place, (param, twin) in enumerate(zip(sharded.parameters(), whole.parameters(), strict=True)):
        grad = values_of(twin.shape, 100 * (step + 1) + place, twin.dtype) * scale
        twin.grad = param.grad = None
        if place not in without:
            twin.grad = grad
            param.grad = distribute(grad, param.device_mesh, param.placements) if isinstance(param, DTensor) else grad


def step_both(models, optimizers, step, **how):
    set_same_grads(*models, step, **how)
    for optimizer in optimizers:
        optimizer.step()


@multiplied_alone
def step_cut_matrices(backend):
    for dtype, options in STORED if dist.get_world_size() == 4 else STORED[:1]:
        models, optimizers = make_both(CUT, line_mesh(), dtype, backend=backend, **options)
        for step in range(2):
            step_both(models, optimizers, step)
        assert_same_bits(*models, optimizers)
    # Random numbers do not depend on the number of ranks where rows are cut.
    rows = [case for case in CUT if case[1] == Shard(0)]
    models, optimizers = make_both(rows, line_mesh(), BF16, backend=backend, rounding="stochastic", seed=3)
    step_both(models, optimizers, 0)
    assert_same_bits(*models, optimizers)


@on_one_worker
@on_2_or_4_ranks
@both_backends
def test_cut_matrices_step_as_whole_ones(backend, ranks):
    run_on_ranks(ranks, step_cut_matrices, backend=backend)


def zeropower(grad, ns_coefficients, ns_steps, eps):
    """What torch.optim.Muon does with a matrix, but in fp64."""
    a, b, c = ns_coefficients
    x = grad / grad.norm().clamp(min=eps)
    for _ in range(ns_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class OneByOne:
    """torch.optim.Muon for every matrix, or piece of one, by itself."""

    def __init__(self, values, use_muon=True, split=None, split_dim=-2, **options):
        self._split, self._split_dim = split, split_dim
        self.pieces = [nn.Parameter(piece.clone()) for piece in self._pieces_of(values)]
        make = torch.optim.Muon if use_muon else torch.optim.AdamW
        self._optimizer = make(self.pieces, lr=LR, weight_decay=0.1, **options)
        self._moved = [0.0] * len(self.pieces)

    def _pieces_of(self, values):
        length = values.shape[self._split_dim]
        sizes = length if self._split is None else self._split
        sizes = [length // sizes] * sizes if isinstance(self._split, int) else sizes
        matrices = values.reshape(-1, *values.shape[-2:])
        return [piece for matrix in matrices for piece in matrix.split(sizes, self._split_dim)]

    def step(self, grad):
        for piece, of_piece in zip(self.pieces, self._pieces_of(grad), strict=True):
            piece.grad = of_piece.clone()
        before = [piece.detach().clone() for piece in self.pieces]
        self._optimizer.step()
        self._moved = [
            moved + (piece.detach() - old).norm()
            for moved, piece, old in zip(self._moved, self.pieces, before, strict=True)
        ]

    def assert_close(self, values):
        for piece, of_piece in zip(self.pieces, self._pieces_of(values), strict=True):
            torch.testing.assert_close(of_piece, piece.detach(), rtol=1e-12, atol=1e-12)

    def assert_close_but_for_products(self, values):
        """Both have rounded in their own way."""
        for piece, of_piece, moved in zip(self.pieces, self._pieces_of(values), self._moved, strict=True):
            assert (of_piece - piece.detach()).norm() <= 2 * ROUNDING * moved


def step_both_libraries(dtype, **how):
    """Cut parameters and, each for one of them, what torch has made of the same."""
    models, optimizers = make_both(CUT, line_mesh(), dtype, **how)
    theirs = [OneByOne(param.detach(), **keys) for param, (_, _, keys) in zip(models[1].all, CUT, strict=True)]
    for step in range(2):
        step_both(models, optimizers, step)
        for one_by_one, param in zip(theirs, models[1].all, strict=True):
            one_by_one.step(param.grad)
    return models[0].all, theirs


@pytest.mark.parametrize("is_transposed", [False, True], ids=["rows", "columns"])
@both_backends
@on_ranks(4)
def test_each_matrix_steps_as_torch_steps_it(backend, is_transposed):
    """With products in fp64: iterations in bf16 differ by what rounding has become after five of them.

    Whatever lies together in memory; the owner of a matrix may have it in the other order.
    """
    with mock.patch.object(batches, "DTYPE", FP64), mock.patch.object(_muon, "_zeropower_via_newtonschulz", zeropower):
        params, theirs = step_both_libraries(FP64, is_transposed=is_transposed, backend=backend)
    for param, one_by_one in zip(params, theirs, strict=True):
        one_by_one.assert_close(param.full_tensor())
    held = [param._local_tensor for param in params]
    held = [tensor for tensor in held if tensor.numel() and min(tensor.shape[-2:]) > 1]
    assert all(tensor.is_contiguous() != is_transposed for tensor in held)


@both_backends
@on_ranks(4)
def test_each_matrix_steps_as_torch_steps_it_in_bf16(backend):
    for param, one_by_one in zip(*step_both_libraries(FP32, backend=backend), strict=True):
        one_by_one.assert_close_but_for_products(param.full_tensor())


class Net(nn.Module):
    """Of what a transformer has: a table, layers whose rows do not divide, some fewer than there are ranks, experts."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 10), nn.LayerNorm(10), nn.Linear(10, 3))
        self.experts = nn.Parameter(torch.randn(5, 3, 8) / 3)
        self.head = nn.Linear(8, 11)

    def forward(self, places):
        x = torch.einsum("bi,eij->bj", self.layers(self.table(places)), self.experts)
        return self.head(x)


def make_net(mesh=None, dtype=FP32, device=None):
    torch.manual_seed(0)
    net = Net().to(device or rank_device(), dtype)
    if mesh is not None:
        fsdp.fully_shard(net.layers, mesh=mesh)
        fsdp.fully_shard(net, mesh=mesh)
    return net


def make_optimizer(net, **options):
    return fusedopt.Muon(fusedopt.muon_groups(net, lr=0.01), lr=LR, **options)


def loss_of(net, step):
    generator = torch.Generator().manual_seed(step)
    places, targets = torch.randint(11, (2, 8), generator=generator).to(next(net.parameters()).device)
    return nn.functional.cross_entropy(net(places).float(), targets)


@both_backends
@on_ranks(4)
@multiplied_alone
def test_fully_shard(backend):
    """Also where ranks replicate what others have cut: each set of them orthogonalizes by itself."""
    for make_mesh, placements in (line_mesh, (Shard(0),)), (square_mesh, (Replicate(), Shard(0))):
        for dtype, options in [(FP32, {}), (BF16, {"master_weights": True})]:
            nets = make_net(make_mesh(), dtype), make_net(dtype=dtype)
            optimizers = [make_optimizer(net, backend=backend, **options) for net in nets]
            for step in range(2):
                step_both(nets, optimizers, step)
            assert_same_bits(*nets, optimizers)
            assert {param.placements for param in nets[0].parameters()} == {placements}
            kinds = [len(state) for state in optimizers[0].state.values()]
            assert len(set(kinds)) == 2  # Muon's and AdamW's


@both_backends
@on_ranks(4)
@multiplied_alone
def test_a_mesh_of_two_dimensions(backend):
    """One of them may cut matrices, the other whole ones from a batch; each parameter may have its own."""
    cases = [
        ((5, 9, 8), (Shard(0), Shard(1)), {}),
        ((5, 9, 8), (Shard(2), Shard(0)), {}),
        ((16, 8), (Shard(0), Replicate()), {}),
        ((16, 8), (Replicate(), Shard(1)), {}),
        ((8, 8, 8), (Shard(0), Shard(0)), {}),
        ((1, 8, 8), (Shard(0), Shard(1)), {}),  # which half of the ranks have nothing of
    ]
    for mesh, on_mesh in (square_mesh(), cases), (square_mesh()["inner"], CUT[:6]):
        models, optimizers = make_both(on_mesh, mesh, backend=backend)
        for step in range(2):
            step_both(models, optimizers, step)
        assert_same_bits(*models, optimizers)


@both_backends
@on_ranks(4)
def test_placements_that_nobody_puts_together_are_named(backend):
    mesh = square_mesh()
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(rank_device())
    parallelize_module(net, mesh["inner"], {"0": ColwiseParallel()})
    fsdp.fully_shard(net, mesh=mesh["outer"])
    strided = net[0].weight
    assert type(strided.placements[0]).__name__ == "_StridedShard"
    partial = nn.Parameter(DTensor.from_local(torch.ones(8, 8, device=rank_device()), mesh, [Replicate(), Partial()]))
    for param in [
        strided,
        nn.Parameter(distribute(values_of((8, 8), 0), mesh, [Shard(0), Shard(1)])),
        nn.Parameter(distribute(values_of((3, 8, 8), 0), mesh, [Shard(1), Shard(2)])),
        partial,
    ]:
        fine = nn.Parameter(distribute(values_of((8, 8), 1), mesh, [Shard(0), Replicate()]))
        optimizer = fusedopt.Muon([("fine", fine), ("other", param)], lr=LR, backend=backend)
        kept = [whole_of(fine.detach()), param.to_local().clone()]
        fine.grad, param.grad = torch.ones_like(fine), torch.ones_like(param)
        message = r"parameter 1 of group 0 \('other'\).*placements.*" + ("partial" if param is partial else "one dim")
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        assert torch.equal(whole_of(fine.detach()), kept[0])
        assert torch.equal(param.to_local(), kept[1])
        assert not optimizer.state


@both_backends
@on_ranks(4)
def test_the_norm_is_that_of_the_whole_model(backend):
    nets = make_net(line_mesh()), make_net()
    optimizers = [make_optimizer(net, backend=backend, max_grad_norm=0.5) for net in nets]
    for step, scale in enumerate([1e-3, 1e3]):
        step_both(nets, optimizers, step, scale=scale)
        norm = torch.stack([param.grad.double().norm() for param in nets[1].parameters()]).norm()
        torch.testing.assert_close(optimizers[0].grad_norm, norm, rtol=1e-12, atol=0)
    momenta = [
        [whole_of(state["momentum_buffer"]) for state in optimizer.state.values() if "momentum_buffer" in state]
        for optimizer in optimizers
    ]
    torch.testing.assert_close(*momenta)


def bits_of_all(net, optimizer):
    held = [*net.parameters(), *(value for state in optimizer.state.values() for value in state.values())]
    return [(tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone() for tensor in held]


@both_backends
@on_ranks(4)
@multiplied_alone
def test_an_element_that_is_not_finite_skips_the_step_on_every_rank(backend):
    for where in ("layers.0.weight", "experts", "head.bias"):
        nets = make_net(line_mesh()), make_net()
        optimizers = [make_optimizer(net, backend=backend, skip_nonfinite=True) for net in nets]
        for step in range(3):
            set_same_grads(*nets, step)
            grad = nets[0].get_parameter(where).grad._local_tensor
            if step == 1:
                before = bits_of_all(nets[0], optimizers[0])
                if dist.get_rank() == 1:
                    grad.view(-1)[0] = torch.inf
            else:
                optimizers[1].step()
            optimizers[0].step()
            if step == 1:
                assert all(map(torch.equal, bits_of_all(nets[0], optimizers[0]), before))
        assert int(optimizers[0].skipped_steps) == 1
        assert_same_bits(*nets, optimizers)


@both_backends
@on_ranks(4)
@multiplied_alone
def test_matrices_without_gradients_sit_out(backend):
    """Those that had one before, and those that never have; in one step no parameter has any."""
    models, optimizers = make_both(CUT, line_mesh(), backend=backend)
    some = {0, 4, 10, 11, 13}
    for step, without in enumerate([{0, 2, 11}, some, set(), some, set(range(len(CUT))), {*range(len(CUT))} - {3}]):
        step_both(models, optimizers, step, without=without)
    assert_same_bits(*models, optimizers)


@both_backends
@on_ranks(4)
def test_ranks_that_disagree_about_gradients_are_told(backend):
    """Before any of them waits for the others, also in the first step, and if a rank has no gradient at all."""
    for names in (["only"], ["first", "second"]):
        for step_before in (False, True):
            named = [(name, nn.Parameter(distribute(values_of((8, 8), 0), line_mesh(), [Shard(0)]))) for name in names]
            optimizer = fusedopt.Muon(named, lr=LR, backend=backend)
            for disagree in [False] * step_before + [True]:
                for _, param in named:
                    param.grad = distribute(values_of((8, 8), 1), param.device_mesh, [Shard(0)])
                if disagree:
                    kept = [param.to_local().clone() for _, param in named]
                    if dist.get_rank() % 2 == 0:
                        named[-1][1].grad = None
                    with pytest.raises(RuntimeError, match=f"ranks disagree.*'{names[-1]}'.* ranks 1, 3 only"):
                        optimizer.step()
                    assert all(map(torch.equal, kept, [param.to_local() for _, param in named]))
                else:
                    optimizer.step()


def test_who_owns_what():
    costs = [cost(shape) for shape in [(64, 64)] * 8 + [(64, 256)] * 4 + [(8, 8)] * 3]
    for count in (1, 2, 3, 4):
        owner = owners(costs, count)
        loads = [sum(value for value, of in zip(costs, owner, strict=True) if of == rank) for rank in range(count)]
        # What is given last goes to the one that has least, and was its last.
        assert max(loads) - min(loads) <= max(costs)
        assert max(loads) <= sum(costs) / count + max(costs)
    assert [owners([1.0], 4, first) for first in range(4)] == [[0], [1], [2], [3]]


@both_backends
@on_ranks(4)
def test_every_rank_has_its_part_of_the_work(backend):
    """Two all-to-alls a step; as many multiplications for each rank; and no memory for more than its part."""
    count = dist.get_world_size()
    cases = [((32, 32), Shard(0), {})] * 8 + [((8, 32, 16), Shard(1), {})]
    model = Parameters(cases, line_mesh())
    optimizer = fusedopt.Muon(model.groups(cases), lr=LR, backend=backend)
    calls = []
    all_to_all = dist.all_to_all_single
    with mock.patch.object(dist, "all_to_all_single", lambda *a, **k: (calls.append(k["group"]), all_to_all(*a, **k))):
        for step in range(3):
            set_same_grads(model, Parameters(cases), step)
            optimizer.step()
            assert len(calls) == 2 * (step + 1)
    assert len(set(calls)) == 1
    taken = optimizer._stepper.plan._step
    multiplied = {(batch.key.rows, batch.key.columns): batch.count for batch in taken._batches._batches.values()}
    assert multiplied == {(32, 32): 8 // count, (32, 16): 8 // count}
    numel = sum(param.numel() for param in model.all) // count
    experts = 8 * 32 * 16 // count
    workspace = 8 // count * 32 * 32 + 2 * (8 // count) * 32 * 32  # of the larger batch, and its squares
    # What it sends and gets, what it multiplies, and the direction of experts, which are sent to several ranks.
    assert taken.nbytes == 2 * (3 * numel + experts + workspace)


def train_both(nets, optimizer, steps):
    """The first net steps in backward, the second after it."""
    for step in range(steps):
        for net in nets:
            loss_of(net, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(param.grad is None for param in nets[0].parameters())


@both_backends
@on_ranks(2)
@multiplied_alone
def test_step_in_backward(backend):
    """Every parameter has an exchange of its own, and not one rank owns all of them."""
    nets = [make_net(line_mesh()) for _ in range(2)]
    steps = fusedopt.step_in_backward(nets[0], lambda params: make_optimizer(nets[0], backend=backend))
    optimizer = make_optimizer(nets[1], backend=backend)
    train_both(nets, optimizer, 2)
    for param, twin in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(param.full_tensor(), twin.full_tensor())
    steps_taken = [part._stepper.plan._step for part in steps._parts.values()]
    owned = [len(step._exchanges.owned) if step.exchanges else 0 for step in steps_taken]
    assert any(owned)
    total = torch.tensor(owned, device=rank_device())
    dist.all_reduce(total)
    assert total.tolist() == [0, 1, 1, 1, *([0] * 8)]  # experts are whole on a rank


@pytest.mark.parametrize("backend", BACKENDS)
@multiplied_alone
def test_step_in_backward_in_one_process(backend, device):
    nets = make_net(device=device), make_net(device=device)
    steps = fusedopt.step_in_backward(nets[0], lambda params: make_optimizer(nets[0], backend=backend))
    optimizer = make_optimizer(nets[1], backend=backend)
    train_both(nets, optimizer, 3)
    assert_same_bits(*nets, (steps.optimizer, optimizer))


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_share_the_memory_of_their_products(backend, device):
    net = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(3))).to(device)
    steps = fusedopt.step_in_backward(net, lambda params: fusedopt.Muon(params, lr=LR, backend=backend))
    for _ in range(2):
        net(values_of((4, 16), 0).to(device)).square().sum().backward()
    memories = [part._stepper.plan._step.memory for part in steps._parts.values()]
    buffers = {id(buffer): buffer.nbytes for memory in memories for buffer in memory._held.values()}
    assert sum(buffers.values()) == memories[0].nbytes == 2 * 4 * 16 * 16


@both_backends
@on_ranks(2)
def test_ddp(backend):
    """Every rank steps all matrices itself."""
    net, whole = make_net(), make_net()
    replica = nn.parallel.DistributedDataParallel(net)
    optimizers = [make_optimizer(model, backend=backend) for model in (net, whole)]
    for step in range(2):
        (loss_of(replica, step) * (1 + dist.get_rank())).backward()  # the mean of the ranks
        for param, twin in zip(net.parameters(), whole.parameters(), strict=True):
            twin.grad = param.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_same_bits(net, whole, optimizers)


@both_backends
@on_ranks(2)
@multiplied_alone
def test_steps_that_overlap_with_ddp(backend):
    """Bucket by bucket, where all parameters are matrices."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16, bias=False), nn.Tanh(), nn.Linear(16, 3, bias=False)).to(rank_device())
    replica = nn.parallel.DistributedDataParallel(net, bucket_cap_mb=1e-4)
    whole = copy.deepcopy(net)
    fusedopt.register_functional_optim(fusedopt.Muon)
    replica._register_fused_optim(fusedopt.Muon, LR, backend=backend)
    optimizer = fusedopt.Muon(whole.parameters(), lr=LR, backend=backend)
    for step in range(3):
        replica.zero_grad()
        replica(values_of((4, 6), step)).square().sum().backward()
        for param, twin in zip(net.parameters(), whole.parameters(), strict=True):
            twin.grad = param.grad.clone()
        optimizer.step()
        for param, twin in zip(net.parameters(), whole.parameters(), strict=True):
            assert torch.equal(param, twin)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@both_backends
@on_ranks(2)
@multiplied_alone
def test_zero(backend):
    """Each rank steps some whole parameters; in groups, as of `muon_groups`."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net, whole = make_net(), make_net()
    groups = [
        {**group, "params": [param for _, param in group["params"]]} for group in fusedopt.muon_groups(net, lr=0.01)
    ]
    sharded = ZeroRedundancyOptimizer(groups, fusedopt.Muon, lr=LR, backend=backend)
    optimizer = make_optimizer(whole, backend=backend)
    for step in range(2):
        step_both((net, whole), (sharded, optimizer), step)
    for param, twin in zip(net.parameters(), whole.parameters(), strict=True):
        assert torch.equal(param, twin)


@both_backends
@on_ranks(4)
@multiplied_alone
def test_momenta_in_8_bits(backend):
    """The codes of one process where shards are whole blocks."""
    cases = [((16, 64), Shard(0), {}), ((16, 128), Shard(0), {})]
    models, optimizers = make_both(cases, line_mesh(), backend=backend, state_dtype="8bit")
    for step in range(2):
        step_both(models, optimizers, step)
    full, expected_full = (fusedopt.full_state_dict(optimizer)["state"] for optimizer in optimizers)
    for key, state in full.items():
        assert torch.equal(state["momentum_buffer"].full_tensor(), expected_full[key]["momentum_buffer"])
    for param, twin in zip(*(model.all for model in models), strict=True):
        assert torch.equal(param.full_tensor(), twin.detach())
        held, expected = (opt.state[p]["momentum_buffer"] for opt, p in zip(optimizers, (param, twin), strict=True))
        rows = slice(dist.get_rank() * 4, dist.get_rank() * 4 + 4)
        assert type(held._local_tensor) is type(expected) is Quantized
        assert torch.equal(held._local_tensor.dequantize(), expected.dequantize()[rows])


STATES = {"backend": "eager", "ema_decay": 0.9}


def train_alone(net, optimizer, steps):
    for step in steps:
        set_same_grads(net, make_net(), step)
        optimizer.step()
        optimizer.zero_grad()


def everything(net, optimizer):
    """All values, whole, by their names."""
    values = {name: whole_of(param.detach()).clone() for name, param in net.named_parameters()}
    for name, state in get_optimizer_state_dict(net, optimizer)["state"].items():
        values.update({f"{name}.{key}": whole_of(value).clone() for key, value in state.items()})
    return values


@multiplied_alone
def save_and_go_on(folder):
    net = make_net(line_mesh())
    optimizer = make_optimizer(net, **STATES)
    train_alone(net, optimizer, range(2))
    model_state, optimizer_state = get_state_dict(net, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / "cut")
    model_state, optimizer_state = get_state_dict(net, optimizer, options=StateDictOptions(full_state_dict=True))
    torch.save({"model": model_state, "optimizer": optimizer_state}, folder / f"whole{dist.get_rank()}.pt")
    train_alone(net, optimizer, range(2, 4))
    torch.save(everything(net, optimizer), folder / f"expected{dist.get_rank()}.pt")


@multiplied_alone
def load_and_go_on(folder, is_full):
    net = make_net(line_mesh())
    with torch.no_grad():
        for param in net.parameters():
            param.zero_()
    optimizer = make_optimizer(net, **STATES)
    options = StateDictOptions(full_state_dict=is_full)
    if is_full:
        loaded = torch.load(folder / "whole0.pt", weights_only=True)
    else:
        model_state, optimizer_state = get_state_dict(net, optimizer)
        loaded = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(loaded, checkpoint_id=folder / "cut")
    set_state_dict(
        net, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"], options=options
    )
    train_alone(net, optimizer, range(2, 4))
    expected = torch.load(folder / "expected0.pt", weights_only=True)
    values = everything(net, optimizer)
    assert values.keys() == expected.keys()
    for key, value in values.items():
        assert torch.equal(value, expected[key]), key


@on_one_worker
def test_a_checkpoint_goes_on_with_the_same_bits_on_other_ranks(tmp_path):
    run_on_ranks(2, save_and_go_on, folder=tmp_path)
    for count in (4, 1):
        for is_full in (False, True):
            run_on_ranks(count, load_and_go_on, folder=tmp_path, is_full=is_full)
