"""States in 8 bits on several ranks, and in checkpoints: the same codes wherever the shards are whole blocks."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fusedopt
from fusedopt.storage import precision, quantized
from fusedopt.storage.quantized_tensor import Decoded, Quantized, quantize
from tests.cases import FP32
from tests.ranks import on_one_worker, on_ranks, rank_device, run_on_ranks
from tests.twins import BACKENDS, ENGINES, bits

fsdp = pytest.importorskip("torch.distributed.fsdp")
import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.state_dict import (  # noqa: E402
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import DTensor, Shard, distribute_tensor  # noqa: E402

BLOCK = 256
STATES = ("exp_avg", "exp_avg_sq")
# What a step between the codes of small numbers is, as a part of the largest in its block: with a sign, and without.
SMALLEST = {"exp_avg": 2.0**-14 / 15, "exp_avg_sq": 2.0**-30 / 15}


class Model(nn.Module):
    """Shards of whole blocks on up to four ranks, shards that end within one, and shards that are less than one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Parameter(torch.randn(128, 64))
        self.ragged = nn.Parameter(torch.randn(67, 67))
        self.few = nn.Parameter(torch.randn(64))

    def forward(self, grads):
        """Something that has these gradients, bit for bit, however many ranks there are."""
        return sum((param * grad).sum() for param, grad in zip(self.parameters(), grads, strict=True))


def make_model(is_sharded=True, seed=0):
    torch.manual_seed(seed)
    model = Model().to(rank_device())
    if is_sharded:
        fsdp.fully_shard(model, mesh=init_device_mesh(rank_device().type, (dist.get_world_size(),)))
    return model


def make(model, backend="eager", **options):
    return fusedopt.AdamW(model.parameters(), lr=0.01, backend=backend, **{"state_dtype": "8bit", **options})


def grads_of(step):
    """Of all magnitudes, so that most elements of a block are far smaller than its largest."""
    generator = torch.Generator().manual_seed(step)
    shapes = [(128, 64), (67, 67), (64,)]
    return [torch.randn(shape, generator=generator).pow(5).to(rank_device()) for shape in shapes]


def train(model, optimizer, steps, factor=1.0):
    for step in steps:
        (model(grads_of(step)) * factor).backward()
        optimizer.step()
        optimizer.zero_grad()


def held(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor):
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.dequantize() if isinstance(tensor, Decoded) else tensor.detach()


def codes(state, rows=slice(None)):
    """The codes and scales of some rows of `blocks`."""
    state = held(state)
    assert type(state) is Quantized
    memory, numel = state.memory, state.numel()
    of_rows = memory[:numel].view(-1, 64)[rows], memory[numel:].view(-1, 64 * 4 // BLOCK)[rows]
    return [part.reshape(-1).tolist() for part in of_rows]


def my_rows(param):
    """Which of `blocks` this rank has."""
    count = len(param) // dist.get_world_size()
    return slice(dist.get_rank() * count, (dist.get_rank() + 1) * count)


def values_of(model, optimizer):
    """Parameters and states, whole."""
    values = {name: whole(param) for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        values.update({f"{name}.{key}": whole(value) for key, value in optimizer.state[param].items()})
    return {name: value.cpu().clone() for name, value in values.items()}


def assert_close(actual, expected, name, times=1):
    """But for as many roundings to a code."""
    error = expected.abs() / 16 + SMALLEST[name] * expected.abs().max()
    assert not ((actual - expected).abs() > times * error).any()


def assert_same(actual, expected, times=0):
    """The same bits, but for states whose blocks have been cut: they have been rounded so often."""
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        param, _, name = key.partition(".")
        if times and name in STATES and param != "blocks":
            assert_close(value, expected[key], name, times)
        else:
            assert bits(value) == bits(expected[key]), key


@pytest.mark.parametrize("backend", ENGINES)
@on_ranks(2)
def test_shards_have_the_codes_of_the_whole(backend):
    for options in ({}, {"rounding": "stochastic", "seed": 5}):
        models = make_model(), make_model(is_sharded=False)
        optimizers = [make(model, backend, **options) for model in models]
        for step in range(1 if backend == "triton" else 3):  # the interpreter takes its time
            for model, optimizer in zip(models, optimizers, strict=True):
                train(model, optimizer, [step])
            sharded, single = ([optimizer.state[param] for param in optimizer.state] for optimizer in optimizers)
            rows = my_rows(models[0].blocks)
            for name in STATES:
                for states, others in zip(sharded, single, strict=True):
                    assert isinstance(states[name], DTensor)
                    assert type(held(states[name])) is Quantized
                    if step == 0:
                        assert_close(whole(states[name]), whole(others[name]), name, times=2 + 2 * bool(options))
                assert codes(sharded[0][name]) == codes(single[0][name], rows), (options, name)
            assert bits(whole(models[0].blocks)) == bits(whole(models[1].blocks))
        for param, twin in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(whole(param), whole(twin), rtol=0, atol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
@on_ranks(2)
def test_clipping_and_skipping(backend):
    """The norm is the whole model's, and what one rank got wrong leaves the codes of all as they are."""
    models = make_model(), make_model(is_sharded=False)
    optimizers = [make(model, backend, max_grad_norm=0.5, skip_nonfinite=True) for model in models]
    for step, factor in enumerate([1.0, torch.nan, 1e-3]):
        before = [bits(held(value).memory) for value in states_in_codes(optimizers[0])]
        for model, optimizer in zip(models, optimizers, strict=True):
            rank_has_it = model is models[1] or dist.get_rank() == 1
            train(model, optimizer, [step], factor if rank_has_it or factor == factor else 1.0)
        after = [bits(held(value).memory) for value in states_in_codes(optimizers[0])]
        if step:
            assert (after == before) == (step == 1)
            torch.testing.assert_close(optimizers[0].grad_norm, optimizers[1].grad_norm, equal_nan=True)
    assert optimizers[0].skipped_steps == 1
    for name in STATES:  # the norms differ in their last bits
        sharded, single = (whole(opt.state[model.blocks][name]) for model, opt in zip(models, optimizers, strict=True))
        assert_close(sharded, single, name, times=2)


@pytest.mark.parametrize("backend", BACKENDS)
@on_ranks(2)
def test_the_size_of_the_whole_parameter_decides(backend):
    """Which is stored in 8 bits, and not what a rank has of it."""
    tests, precision.QUANTIZED_FROM = precision.QUANTIZED_FROM, 67 * 67
    try:
        model = make_model()
        optimizer = make(model, backend)
        train(model, optimizer, range(2))
    finally:
        precision.QUANTIZED_FROM = tests
    kinds = [type(held(optimizer.state[param]["exp_avg"])) for param in model.parameters()]
    assert kinds == [Quantized, Quantized, torch.Tensor]


def states_in_codes(optimizer):
    return [value for state in optimizer.state.values() for value in state.values() if type(held(value)) is Quantized]


def save_and_go_on(folder, is_sharded, backend, **options):
    model = make_model(is_sharded)
    optimizer = make(model, backend, **options)
    train(model, optimizer, range(2))
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    values = [values_of(model, optimizer)]
    train(model, optimizer, range(2, 4))
    values.append(values_of(model, optimizer))
    if dist.get_rank() == 0:
        torch.save(values, folder / "values.pt")


def load_and_go_on(folder, is_sharded, is_recut, backend, **options):
    model = make_model(is_sharded, seed=1)
    optimizer = make(model, backend, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
        model_state, optimizer_state = get_state_dict(model, optimizer)
        loaded = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(loaded, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    expected = torch.load(folder / "values.pt", weights_only=True)
    assert len(states_in_codes(optimizer)) == 6
    assert_same(values_of(model, optimizer), expected[0], times=2 * is_recut)
    train(model, optimizer, range(2, 4))
    values = values_of(model, optimizer)
    for key, value in values.items():
        if key.startswith("blocks") or not is_recut:
            assert bits(value) == bits(expected[1][key]), key
        elif "." not in key:
            torch.testing.assert_close(value, expected[1][key], rtol=0, atol=0.02)


@on_one_worker
@pytest.mark.parametrize(
    ("backend", "options"),
    [("eager", {}), (BACKENDS[1], {"rounding": "stochastic", "seed": 5})],
    ids=["eager", "kernels, stochastic"],
)
def test_a_checkpoint_goes_on_with_the_same_codes(backend, options, tmp_path):
    options = {"backend": backend, **options}
    run_on_ranks(2, save_and_go_on, folder=tmp_path, is_sharded=True, **options)
    run_on_ranks(2, load_and_go_on, folder=tmp_path, is_sharded=True, is_recut=False, **options)
    run_on_ranks(4, load_and_go_on, folder=tmp_path, is_sharded=True, is_recut=True, **options)
    run_on_ranks(1, load_and_go_on, folder=tmp_path, is_sharded=False, is_recut=True, **options)
    run_on_ranks(1, save_and_go_on, folder=tmp_path / "whole", is_sharded=False, **options)
    run_on_ranks(2, load_and_go_on, folder=tmp_path / "whole", is_sharded=True, is_recut=True, **options)


def load_mixed(folder, saved, backend):
    """An optimizer in the other form loads what `saved` says."""
    mine = None if saved == "8bit" else "8bit"
    for sharded in (True, False):
        model = make_model(sharded, seed=1)
        optimizer = make(model, backend, state_dtype=mine)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
            model_state, optimizer_state = get_state_dict(model, optimizer)
            loaded = {"model": model_state, "optimizer": optimizer_state}
            # Groups ask for what theirs have, which a full checkpoint has not.
            dcp.load(loaded, checkpoint_id=folder, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
            set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        expected = torch.load(folder / "values.pt", weights_only=True)[0]
        values = values_of(model, optimizer)
        if mine is None:
            assert_same(values, expected)
        else:
            for key, value in values.items():
                name = key.rpartition(".")[2]
                if name in STATES:
                    assert_close(value, expected[key], name, times=1 if sharded else 2)
                else:
                    assert bits(value) == bits(expected[key]), key
        train(model, optimizer, range(2, 3))
        assert len(states_in_codes(optimizer)) == (0 if mine is None else 6)


@on_one_worker
@pytest.mark.parametrize("saved", ["8bit", None], ids=str)
def test_between_full_states_and_codes(saved, tmp_path):
    run_on_ranks(2, save_and_go_on, folder=tmp_path, is_sharded=True, backend="eager", state_dtype=saved)
    run_on_ranks(2, load_mixed, folder=tmp_path, saved=saved, backend=BACKENDS[1])


@on_ranks(2)
def test_whole_state_dicts_hold_plain_numbers():
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, range(2))
    expected = values_of(model, optimizer)
    gather = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = get_optimizer_state_dict(model, optimizer, options=gather)
    assert bool(saved) == (dist.get_rank() == 0)
    for name, state in saved.get("state", {}).items():
        for key, value in state.items():
            assert type(value) is torch.Tensor
            assert value.device.type == "cpu"
            assert bits(value) == bits(expected[f"{name}.{key}"])
    memories = [bits(held(value).memory) for value in states_in_codes(optimizer)]
    for how in (
        StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
        StateDictOptions(full_state_dict=True),
    ):
        other_model = make_model()
        other = make(other_model)
        given = [saved]
        if not how.broadcast_from_rank0:
            dist.broadcast_object_list(given, device=rank_device())
        set_optimizer_state_dict(other_model, other, copy.deepcopy(given[0]), options=how)
        assert_same(values_of(other_model, other), {**expected, **parameters_of(other_model)})
        train(other_model, other, [2])
        assert len(states_in_codes(other)) == 6
        assert bits(held(other_model.blocks)) != bits(held(model.blocks))
    train(model, optimizer, [2])
    for mine, theirs in zip(states_in_codes(optimizer), states_in_codes(other), strict=True):
        assert bits(held(mine).memory) == bits(held(theirs).memory)
        assert bits(held(mine).memory) not in memories


def parameters_of(model):
    return {name: whole(param) for name, param in model.named_parameters()}


@on_ranks(2)
def test_set_optimizer_state_dict_takes_what_get_gives():
    for flat in (False, True):
        how = StateDictOptions(flatten_optimizer_state_dict=flat)
        model = make_model()
        optimizer = make(model, rounding="stochastic")
        train(model, optimizer, range(2))
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=how))
        other_model = make_model()
        other = make(other_model, rounding="stochastic")
        set_optimizer_state_dict(other_model, other, saved, options=how)
        for pair in ((model, optimizer), (other_model, other)):
            train(*pair, range(2, 4))
        mine, theirs = (states_in_codes(one) for one in (optimizer, other))
        assert len(mine) == 6
        for value, twin in zip(mine, theirs, strict=True):
            assert bits(held(value).memory) == bits(held(twin).memory)


@on_ranks(2)
def test_whole_state_dicts_of_whole_parameters():
    """There they hold the codes of rank 0, which the others get as numbers."""
    model = make_model(is_sharded=False)
    optimizer = make(model)
    train(model, optimizer, [dist.get_rank()])
    saved = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    expected = [values_of(model, optimizer) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(expected, device=rank_device())
    how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(model, optimizer, saved, options=how)
    assert_same(values_of(model, optimizer), {**expected[0], **parameters_of(model)})


@on_ranks(2)
def test_collectives():
    """They read and write states as other tensors, also after they have returned."""
    rank = dist.get_rank()

    def state(value):  # which has a code
        return quantize(torch.full((4, 256), value, device=rank_device()), quantized.SIGNED, (256, 1))

    mine = state(15.0 * (1 + rank))
    parts = [torch.zeros(4, 256, device=rank_device()), state(1.0)]
    dist.all_gather(parts, mine)
    assert [part.unique().tolist() for part in parts] == [[15], [30]]
    dist.all_reduce(mine)
    assert mine.unique().tolist() == [45]
    dist.broadcast(mine[:2].mul_(1 + rank), 1)
    assert mine[:, 0].tolist() == [90, 90, 45, 45]
    other = state(15.0 * rank)
    dist.broadcast(other, 1, async_op=True).wait()
    assert other.unique().tolist() == [15]
    if rank:
        dist.send(other, 0)
    else:
        with pytest.raises(RuntimeError, match="cannot receive"):
            dist.recv(other, 1)
        received = torch.zeros(4, 256, device=rank_device())
        dist.recv(received, 1)
        assert received.unique().tolist() == [15]


@on_ranks(4)
def test_replicated_shards():
    """On a mesh of two dimensions all replicas have the same codes; columns are split as well as rows."""
    mesh = init_device_mesh(rank_device().type, (2, 2), mesh_dim_names=("replicate", "shard"))
    models = make_model(is_sharded=False), make_model(is_sharded=False)
    fsdp.fully_shard(models[0], mesh=mesh)
    optimizers = [make(model, rounding="stochastic") for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(2))
    for name in STATES:
        sharded, single = (opt.state[model.blocks][name] for model, opt in zip(models, optimizers, strict=True))
        assert bits(whole(sharded)) == bits(whole(single))
    param = nn.Parameter(distribute_tensor(torch.ones(128, 64), mesh, [Shard(0), Shard(1)]))
    optimizer = fusedopt.AdamW([param], state_dtype="8bit")
    param.grad = distribute_tensor(grads_of(0)[0], mesh, [Shard(0), Shard(1)])
    optimizer.step()
    assert type(held(optimizer.state[param]["exp_avg"])) is Quantized
    assert_close(whole(optimizer.state[param]["exp_avg"]), grads_of(0)[0] * 0.1, "exp_avg")


@on_one_worker
def test_async_save(tmp_path):
    """It copies tensors by their memory and attributes before it writes them."""
    run_on_ranks(2, save_while_training, folder=tmp_path)
    run_on_ranks(2, load_and_go_on, folder=tmp_path, is_sharded=True, is_recut=False, backend="eager")


def save_while_training(folder):
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, range(2))
    model_state, optimizer_state = get_state_dict(model, optimizer)
    states = {"model": model_state, "optimizer": optimizer_state}
    saving = dcp.async_save(states, checkpoint_id=folder, process_group=dist.new_group(backend="gloo"))
    values = [values_of(model, optimizer)]
    saving.result()
    train(model, optimizer, range(2, 4))
    values.append(values_of(model, optimizer))
    if dist.get_rank() == 0:
        torch.save(values, folder / "values.pt")


@on_ranks(2)
def test_full_state_dict():
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, range(2))
    expected = values_of(model, optimizer)
    saved = fusedopt.full_state_dict(optimizer)
    assert len(states_in_codes(optimizer)) == 6
    for (name, param), state in zip(model.named_parameters(), saved["state"].values(), strict=True):
        for key, value in state.items():
            if key in STATES:
                assert isinstance(value, DTensor)
                assert value.placements == param.placements
            assert type(held(value)) is torch.Tensor
            assert held(value).dtype == FP32
            assert bits(whole(value)) == bits(expected[f"{name}.{key}"])
    theirs = torch.optim.AdamW(model.parameters(), lr=0.01)
    theirs.load_state_dict(saved)
    train(model, theirs, [2])
    for key in STATES:
        assert theirs.state[model.blocks][key].placements == model.blocks.placements


@on_ranks(2)
def test_zero():
    """Each rank keeps the codes of its part of the parameters; a checkpoint holds all."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # whose import warns of torch.jit

    model, twin = make_model(is_sharded=False), make_model(is_sharded=False)
    sharded = ZeroRedundancyOptimizer(model.parameters(), fusedopt.AdamW, lr=0.01, state_dtype="8bit")
    optimizer = make(twin, "auto")
    for pair in ((model, sharded), (twin, optimizer)):
        train(*pair, range(2))
    sharded.consolidate_state_dict(to=0)
    saved = [sharded.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(saved, device=rank_device())
    for key, state in optimizer.state_dict()["state"].items():
        for name in STATES:
            mine = saved[0]["state"][key][name]
            assert type(mine) is type(state[name])
            assert bits(whole(mine)) == bits(whole(state[name]))
    resumed = copy.deepcopy(model)
    other = ZeroRedundancyOptimizer(resumed.parameters(), fusedopt.AdamW, lr=0.5, state_dtype="8bit")
    other.load_state_dict(copy.deepcopy(saved[0]))
    for pair in ((model, sharded), (resumed, other)):
        train(*pair, range(2, 4))
    assert [bits(param) for param in resumed.parameters()] == [bits(param) for param in model.parameters()]


def test_all_ranks_in_one_process():
    """In LocalTensorMode all ranks have codes: those of a step without ranks."""
    local = pytest.importorskip("torch.distributed._local_tensor")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(2, *shape, generator=generator) for shape in [(4, 256), (3, 100)]]

    def trained(place):
        params = [nn.Parameter(place(torch.ones(4, 256))), nn.Parameter(place(torch.ones(3, 100)))]
        optimizer = fusedopt.AdamW(params, lr=0.1, state_dtype="8bit", rounding="stochastic", backend="eager")
        for step in range(2):
            for param, step_grads in zip(params, grads, strict=True):
                param.grad = place(step_grads[step])
            optimizer.step()
        return params[0].detach(), optimizer.state[params[0]]["exp_avg"]

    expected, state = trained(torch.clone)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        with local.LocalTensorMode(2):
            param, mine = trained(lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)]))
            assert bits(param.full_tensor().reconcile()) == bits(expected)
        memories = held(mine).memory._local_tensors.values()
        assert bits(torch.cat([memory[:512] for memory in memories])) == bits(state.memory[:1024])
        assert bits(torch.cat([memory[512:] for memory in memories])) == bits(state.memory[1024:])
    finally:
        dist.destroy_process_group()
