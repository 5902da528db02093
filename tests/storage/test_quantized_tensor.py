"""A state in 8 bits is a tensor to all programs: saved, copied, cut, written through views, simulated."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fusedopt
from fusedopt.storage import quantized
from fusedopt.storage.quantized_tensor import Decoded, Quantized, View, quantize
from tests.cases import BF16, FP32
from tests.conftest import DEVICE
from tests.optimizer.test_surgery import CUTS, operate
from tests.twins import BACKENDS, OPTIMIZERS, bits, make, make_torch, params_of

COMPLEX = torch.complex64
both_backends = pytest.mark.parametrize("backend", BACKENDS)


def make_params(of="AdamW"):
    """Blocks that end with the tensor and that do not, elements in another order, complex ones, a number."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in [(8, 64), (30, 23), (4, 9, 20), ()]]
    values.append(torch.view_as_complex(torch.randn(19, 15, 2, generator=generator)))
    values[2] = values[2].transpose(0, 2)
    values = values[:2] if of == "Muon" else values  # real ones of two dimensions
    return [torch.nn.Parameter(value.to(DEVICE)) for value in values]


def grad_of(param, seed):
    """Of all magnitudes, so that most elements of a block are far smaller than its largest."""
    grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed), dtype=param.dtype).to(DEVICE)
    return grad * grad.abs() ** 4


def train(optimizer, steps):
    for step in steps:
        for place, param in enumerate(params_of(optimizer)):
            param.grad = grad_of(param, 100 * step + place)
        optimizer.step()


def trained(backend="eager", name="AdamW", **options):
    optimizer = make(name, make_params(name), backend=backend, **{"state_dtype": "8bit", **options})
    train(optimizer, range(2))
    return optimizer


def states_of(optimizer):
    return [value for state in optimizer.state.values() for value in state.values() if value.dim()]


def all_bits(optimizer):
    return [[bits(param), *map(bits, optimizer.state[param].values())] for param in params_of(optimizer)]


def assert_within_the_code(tensor, expected):
    """The numbers of a tensor are others, rounded to the nearest code."""
    assert isinstance(tensor, Decoded)
    largest = expected.abs().max()
    error = expected.abs() / 16 + largest * 2.0**-14 / 15
    assert not ((tensor.dequantize() - expected).abs() > error).any()


def saved(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    size = len(file.getvalue())
    file.seek(0)
    return torch.load(file, weights_only=True), size


def anew(optimizer, backend):
    """Another optimizer, of copies of the parameters."""
    params = [torch.nn.Parameter(param.detach().clone()) for param in params_of(optimizer)]
    return make("AdamW", params, backend=backend)


COPIES = {
    "saved": lambda state_dict: saved(state_dict)[0],
    "pickled": lambda state_dict: pickle.loads(pickle.dumps(state_dict)),
    "copied": copy.deepcopy,
}


@both_backends
@pytest.mark.parametrize("how", COPIES)
def test_a_loaded_optimizer_goes_on_with_the_same_bits(how, backend):
    optimizer = trained(backend, rounding="stochastic", seed=3)
    loaded = COPIES[how](optimizer.state_dict())
    before = all_bits(optimizer)
    other = anew(optimizer, backend)
    other.load_state_dict(loaded)
    assert all_bits(other) == before
    train(optimizer, range(2, 4))
    assert all_bits(other) == before
    train(other, range(2, 4))
    assert all_bits(other) == all_bits(optimizer) != before


def test_what_is_saved_is_codes():
    params = [torch.nn.Parameter(torch.zeros(1 << 20))]
    optimizer = fusedopt.AdamW(params, state_dtype="8bit")
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    _, size = saved(optimizer.state_dict())
    assert size < 2.1 * (1 << 20)


@both_backends
def test_copies_share_nothing(backend):
    optimizer = trained(backend)
    other = copy.deepcopy(optimizer)
    before = all_bits(other)
    assert before == all_bits(optimizer)
    state = copy.deepcopy(next(iter(optimizer.state.values())))
    assert type(state["exp_avg"]) is Quantized
    state["exp_avg"].zero_()
    assert all_bits(optimizer) == before
    train(optimizer, range(2, 4))
    assert all_bits(other) == before
    train(other, range(2, 4))
    assert all_bits(other) == all_bits(optimizer)


@pytest.mark.usefixtures("exact_products")
@both_backends
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_between_codes_and_full_states(name, backend):
    mine = trained(backend, name, state_dtype="8bit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full = fusedopt.full_state_dict(mine)
        assert all("fusedopt_state_dtype" not in group for group in full["param_groups"])
        held = [{key: value for key, value in state.items() if value.dim()} for state in mine.state.values()]
        for state, expected in zip(full["state"].values(), held, strict=True):
            for key, value in expected.items():
                assert type(state[key]) is torch.Tensor
                assert torch.equal(state[key], value)
        theirs = make_torch(name, make_params(name))
        theirs.load_state_dict(copy.deepcopy(full))
        ours = make(name, make_params(name), backend=backend)
        ours.load_state_dict(full)
        for optimizer in (theirs, ours):
            train(optimizer, [2])
            assert not any(isinstance(value, Decoded) for value in states_of(optimizer))
        for param, twin in zip(params_of(theirs), params_of(ours), strict=True):
            torch.testing.assert_close(param, twin)

        again = make(name, make_params(name), backend=backend, state_dtype="8bit")
        again.load_state_dict(theirs.state_dict())
        before = [value.clone() for value in states_of(again)]
        for param in params_of(again):
            param.grad = torch.zeros_like(param)
        for group in again.param_groups:
            group.update({"lr": 0.0, "weight_decay": 0.0} if "weight_decay" in group else {"lr": 0.0})
        again.step()
    kinds = {type(value) for value in states_of(again)}
    assert kinds <= {Quantized, torch.Tensor}
    assert (Quantized in kinds) == any(isinstance(value, Decoded) for value in states_of(mine))
    assert [type(value) for value in before] == [torch.Tensor] * len(before)


@both_backends
@pytest.mark.parametrize("how", CUTS)
def test_programs_that_cut_and_lengthen(how, backend):
    """What they make of a state has its bits in the next step: those of the numbers that they would see in fp32."""

    def cut(decoded):
        optimizer = trained(backend)
        optimizer.param_groups[0]["params"] = [param for param in params_of(optimizer) if param.dim()]
        for state in optimizer.state.values() if decoded else ():
            state.update({key: value.dequantize() for key, value in state.items() if isinstance(value, Decoded)})
        operate(optimizer, CUTS[how])
        train(optimizer, range(2, 4))
        return optimizer

    mine, theirs = cut(decoded=False), cut(decoded=True)
    assert all_bits(mine)[:4] == all_bits(theirs)[:4]
    assert sum(isinstance(value, Quantized) for value in states_of(mine)) == 8


def write_mask(state):
    state[torch.arange(len(state)) % 3 == 1] = 0


def write_rows(state):
    state[torch.tensor([5, 2])] = 0.5


def write_row(state):
    state[-1] = 1e-3


def write_chunks(state):
    for number, part in enumerate(state.chunk(3)):
        part.mul_(number)


def write_view(state):
    state.view(-1)[100:300].fill_(0.25)


def write_transposed(state):
    state.t()[::2].zero_()


def write_unbound(state):
    state.unbind(1)[4].copy_(torch.arange(len(state)))


def write_foreach(state):
    torch._foreach_mul_([state], 0.5)
    torch._foreach_add_([state], [torch.full_like(state, 0.125)])


def write_out(state):
    torch.add(state, 1, out=state)


def write_copy(state):
    state.copy_(torch.linspace(-1, 1, state.numel()).view(state.shape))


def write_data(state):
    state.data = state.data * 3


WRITES = [
    write_mask,
    write_rows,
    write_row,
    write_chunks,
    write_view,
    write_transposed,
    write_unbound,
    write_foreach,
    write_out,
    write_copy,
    write_data,
]


@both_backends
@pytest.mark.parametrize("write", WRITES)
def test_programs_that_write(write, backend):
    optimizer = trained(backend)
    state = optimizer.state[params_of(optimizer)[1]]
    tensor = state["exp_avg"]
    expected = tensor.dequantize()
    before = expected.clone()
    write(tensor)
    write(expected)
    assert tensor is state["exp_avg"]
    assert type(tensor) is Quantized
    for part, other, old in zip(
        *(values.reshape(-1).split(quantized.BLOCK) for values in (tensor, expected, before)), strict=True
    ):
        if torch.equal(other, old):
            assert torch.equal(part, other)
        else:
            assert_within_the_code(part, other)
    assert not torch.equal(tensor, before)
    other = copy.deepcopy(optimizer)
    other.state[params_of(other)[1]]["exp_avg"] = tensor.dequantize()
    for one in (optimizer, other):
        train(one, range(2, 4))
    assert all_bits(optimizer) == all_bits(other)


VIEWS = {
    "rows": lambda a: a[3:5],
    "columns": lambda a: a.t()[5:9, ::3],
    "a number": lambda a: a[-1, -1],
    "no rows": lambda a: a[3:3],
    "no rows, behind all": lambda a: a[len(a) :],
    "overlapping": lambda a: a.view(-1).as_strided((3, 3), (2, 1), 250),
    "bits": lambda a: a.view(torch.int32)[17],
    "bytes": lambda a: a.view(torch.int8)[30, 8:20],
    "split and turned": lambda a: a.unflatten(1, (3, 9)).transpose(0, 2)[5],
    "expanded": lambda a: a.expand(2, *a.shape)[1, 4:6],
    "diagonal": lambda a: a.diagonal(),
    "diagonal, of a view": lambda a: a[3:].t()[2:].diagonal(),
    "one of many": lambda a: a.split(7)[3][::2].t(),
    "the tensor": lambda a: a[:].view(-1),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(view):
    """Each reads what it should, writes only that, and is written by what writes the tensor."""
    values = torch.randn(40, 27, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    tensor = quantize(values, quantized.SIGNED, values.stride())
    plain = tensor.dequantize()
    seen, expected = VIEWS[view](tensor), VIEWS[view](plain)
    assert type(seen) is View
    assert (seen.shape, seen.stride(), seen.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert torch.equal(seen, expected)
    assert seen.tolist() == expected.tolist()
    before = tensor.memory.clone()
    seen.copy_(expected.clone())
    assert torch.equal(tensor.memory, before)
    seen.zero_()
    expected.zero_()
    assert torch.equal(seen, expected)
    assert torch.equal(tensor == 0, plain == 0)
    assert_within_the_code(tensor, plain)
    tensor.fill_(15)  # which has a code, whose scale is 1
    plain.fill_(15)
    assert torch.equal(seen, expected)
    assert type(copy.deepcopy(seen)) is torch.Tensor
    assert torch.equal(pickle.loads(pickle.dumps(seen)), expected)


def test_a_view_writes_only_its_blocks():
    """The others keep their codes, also such as numbers of their own would not have."""
    tensor = quantize(torch.ones(1024), quantized.SIGNED, (1,))
    tensor.memory[:1024] = 3  # of a block whose largest number could have a larger code
    before = tensor.memory.clone()
    tensor[300:310] = 0
    changed = (tensor.memory != before).nonzero()
    assert set(changed[:-4].flatten().tolist()) <= set(range(256, 512))
    assert set(changed[-4:].flatten().tolist()) <= set(range(1024 + 4, 1024 + 8))


@pytest.mark.parametrize("stride", [(15, 1), (1, 19)], ids=str)
def test_views_of_complex_numbers(stride):
    values = torch.randn(19, 15, dtype=COMPLEX, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for view in (
        lambda a: a[14:, 3:],
        lambda a: torch.view_as_real(a)[15:, 3],
        lambda a: a.real[5],
        lambda a: a.imag[18],
    ):
        tensor = quantize(values, quantized.SIGNED, stride)
        plain = tensor.dequantize()
        assert torch.equal(view(tensor), view(plain))
        view(tensor).zero_()
        view(plain).zero_()
        assert torch.equal(tensor == 0, plain == 0)
        assert torch.equal(tensor.conj()[8:], tensor.dequantize().conj()[8:])
        assert torch.equal(tensor.conj().imag, tensor.dequantize().conj().imag)


def test_what_has_the_same_bits_shares_them():
    """All that shows the whole tensor as it is stands for the same codes, so that copies between them are exact."""
    tensor = next(iter(trained().state.values()))["exp_avg"]
    for same in (tensor.detach(), tensor.data, tensor[:], tensor.view(8, 64), tensor.narrow(0, 0, 8), tensor.t().t()):
        assert type(same) is Quantized
        assert same.memory is tensor.memory
    for other in (tensor.clone(), tensor.to("meta"), tensor.to(DEVICE, copy=True)):
        assert type(other) is Quantized
        assert other.memory is not tensor.memory
    for plain in (
        tensor.new_empty(tensor.shape),
        tensor * 2,
        tensor.to(torch.float64),
        torch.zeros_like(tensor),
        torch.cat([tensor, tensor]),
    ):
        assert type(plain) is torch.Tensor


def test_copies_between_codes():
    """Of another kind, or in another order."""
    values = torch.rand(30, 23, generator=torch.Generator().manual_seed(0))
    kinds = [(code, stride) for code in quantized.CODES for stride in [(23, 1), (1, 30)]]
    for kind in kinds:
        tensor = quantize(values, *kind)
        for other in kinds:
            copied = quantize(torch.zeros_like(values), *other)
            assert copied.copy_(tensor) is copied
            (assert_within_the_code if other != kind else assert_equal)(copied, tensor.dequantize())
        laid = tensor.clone(memory_format=torch.contiguous_format)
        assert laid.stride() == (23, 1)
        assert torch.equal(laid, tensor)


def assert_equal(tensor, expected):
    assert torch.equal(tensor, expected)


@both_backends
def test_parameters_in_another_order(backend):
    """The codes follow them, and so do those that are loaded from elsewhere."""
    optimizer, other = trained(backend), trained(backend)
    for state in other.state.values():
        state.update({key: value.dequantize() for key, value in state.items() if isinstance(value, Decoded)})
    for one in (optimizer, other):
        param = params_of(one)[1]
        param.data = param.detach().t().contiguous().t()
        train(one, [2])
        assert one.state[param]["exp_avg"].stride() == param.stride() == (1, 30)
    assert all_bits(optimizer) == all_bits(other)
    third = trained(backend)
    third.load_state_dict(optimizer.state_dict())
    train(third, [3])
    assert third.state[params_of(third)[1]]["exp_avg"].stride() == (23, 1)


def test_assigning_data():
    """As programs do that bring an optimizer to another device."""
    optimizer = trained()
    before = all_bits(optimizer)
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.to(DEVICE, copy=True)
    assert all_bits(optimizer) == before
    state = next(iter(optimizer.state.values()))
    signed, unsigned = state["exp_avg"], state["exp_avg_sq"]
    signed.data = unsigned
    assert signed.memory is unsigned.memory
    unsigned.data = torch.full((3, 5), 15.0, dtype=BF16, device=DEVICE)
    assert torch.equal(unsigned, torch.full((3, 5), 15.0, device=DEVICE))
    assert unsigned.memory.dtype == quantized.UNSIGNED


def double(tensor):
    tensor.mul_(2)


@pytest.mark.skipif(DEVICE != "cpu", reason="shares memory of the CPU")
def test_shared_memory():
    """Of an optimizer that several processes step. A wrapper has no memory of its own to share."""
    tensor = quantize(torch.full((4, 256), 15.0), quantized.SIGNED, (256, 1))
    assert tensor.share_memory_() is tensor
    process = multiprocessing.get_context("fork").Process(target=double, args=(tensor,))
    process.start()
    process.join(30)
    assert torch.equal(tensor, torch.full((4, 256), 30.0))


@both_backends
def test_swapped_tensors(backend):
    optimizer, other = trained(backend), trained(backend)
    param = params_of(optimizer)[0]
    torch.utils.swap_tensors(param, torch.nn.Parameter(param.detach().clone()))
    state = optimizer.state[param]
    moved = torch.zeros_like(state["exp_avg"])
    torch.utils.swap_tensors(state["exp_avg"], moved)
    assert type(moved) is Quantized
    state["exp_avg"] = moved
    for one in (optimizer, other):
        train(one, range(2, 4))
    assert all_bits(optimizer) == all_bits(other)


@both_backends
def test_inference_mode(backend):
    """What is made in it of a state that is none of its tensors is none either, as with tensors of torch."""
    optimizer, other = trained(backend), trained(backend)
    state = next(iter(optimizer.state.values()))["exp_avg"]
    with torch.inference_mode():
        optimizer.step()
        views = [state[3], state.detach(), state.data, state[:], state.view(-1).chunk(3)[1]]
        state[3] = 0
        (state * 2).sum()
        copied = state.clone()
    other.step()
    next(iter(other.state.values()))["exp_avg"][3] = 0
    assert not any(view.is_inference() for view in views)
    for view in views:
        view.add_(0)
        assert view[0].sum() == view[0].clone().sum()
    assert torch.equal(copied, state)
    train(optimizer, [2])
    train(other, [2])
    assert all_bits(optimizer) == all_bits(other)


@both_backends
def test_default_device(backend):
    optimizer, other = trained(backend), trained(backend)
    torch.set_default_device("meta")
    try:
        state = next(iter(optimizer.state.values()))["exp_avg"]
        state[3] = 0
        state.mul_(2)
        state.t()[4].add_(1)
        repr(state)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.step()
        fusedopt.full_state_dict(optimizer)
    finally:
        torch.set_default_device(None)
    state = next(iter(other.state.values()))["exp_avg"]
    state[3] = 0
    state.mul_(2)
    state.t()[4].add_(1)
    other.step()
    assert all_bits(optimizer) == all_bits(other)


@pytest.mark.parametrize("options", [{}, {"rounding": "stochastic", "max_grad_norm": 1.0}], ids=str)
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_steps_without_values(kind, options):
    mode, cls = {"meta": (nullcontext, torch.Tensor), "fake": (FakeTensorMode, FakeTensor)}[kind]
    device = "meta" if kind == "meta" else DEVICE
    real = trained(**options)
    lies = [(param.shape, param.stride(), param.dtype) for param in params_of(real)]
    with mode():
        params = [
            torch.nn.Parameter(torch.empty_strided(shape, stride, dtype=dtype, device=device))
            for shape, stride, dtype in lies
        ]
        optimizer = fusedopt.AdamW(params, state_dtype="8bit", **options)
        for _ in range(2):
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
        for value in states_of(optimizer):
            assert type(value) is Quantized
            assert type(value[1:]) is View
            value[0].mul_(2)
            assert type(value * 2) is cls
        fusedopt.full_state_dict(optimizer)
        copied = [type(value.clone().memory) for value in states_of(optimizer)]
    assert set(copied) == {cls}
    for mine, theirs in zip(states_of(optimizer), states_of(real), strict=True):
        dry, other = ((x.memory.dtype, x.memory.shape, x.shape, x.stride(), x.dtype) for x in (mine, theirs))
        assert dry == other
        assert type(mine.memory) is cls
        assert mine.device.type == mine.memory.device.type == device


def test_fake_states_of_real_ones():
    """As those of an optimizer that is made fake: a fake state has shape and dtype, and becomes codes in the step."""
    real = trained()
    values = [param.detach() for param in params_of(real)]
    with FakeTensorMode() as mode:
        params = [torch.nn.Parameter(mode.from_tensor(value)) for value in values]
        optimizer = fusedopt.AdamW(params, state_dtype="8bit")
        for param, state in zip(params, real.state.values(), strict=True):
            optimizer.state[param] = {key: mode.from_tensor(value) for key, value in state.items()}
            param.grad = torch.ones_like(param)
        optimizer.step()
    for value in states_of(optimizer):
        assert type(value) is Quantized
        assert isinstance(value.memory, FakeTensor)


@both_backends
def test_a_view_as_a_state(backend):
    """What a program has left of a state is a state, and stands for itself after the step."""
    optimizer, other = trained(backend), trained(backend)
    for one, cut in ((optimizer, lambda value: value[:5]), (other, lambda value: value.clone()[:5].dequantize())):
        param = params_of(one)[1]
        state = one.state.pop(param)
        new = torch.nn.Parameter(param.detach()[:5].clone())
        one.state[new] = {key: cut(value) if value.dim() else value for key, value in state.items()}
        one.param_groups[0]["params"][1] = new
    kept = optimizer.state[params_of(optimizer)[1]]["exp_avg"]
    assert type(kept) is View
    copied = copy.deepcopy(optimizer)
    loaded = COPIES["saved"](optimizer.state_dict())
    third = anew(optimizer, backend)
    third.load_state_dict(loaded)
    for one in (optimizer, other, copied, third):
        train(one, range(2, 4))
    expected = {frozenset(map(str, state)) for state in all_bits(optimizer)}
    for one in (other, copied, third):
        assert {frozenset(map(str, state)) for state in all_bits(one)} == expected
    assert type(optimizer.state[params_of(optimizer)[1]]["exp_avg"]) is Quantized
    assert optimizer.state[params_of(optimizer)[1]]["exp_avg"].dtype == FP32


@pytest.mark.parametrize(
    "operation",
    [
        lambda tensor: tensor.to(torch.bfloat16),
        lambda tensor: tensor.double(),
        lambda tensor: tensor.to("cpu", copy=True),
        lambda tensor: tensor.t().reshape(-1),
        lambda tensor: tensor.t().contiguous(),
        lambda tensor: tensor.flatten(),
    ],
    ids=["bf16", "double", "copy", "reshape", "contiguous", "flatten"],
)
def test_operations_in_inference_mode(operation):
    """torch takes them apart for whoever is called only outside of it."""
    state = quantize(torch.randn(20, 30, generator=torch.Generator().manual_seed(0)), quantized.SIGNED, (30, 1))
    expected = operation(state.dequantize())
    with torch.inference_mode():
        assert torch.equal(operation(state) + 0, expected)


@pytest.mark.parametrize("operation", [torch.Tensor.t_, lambda tensor: tensor.resize_(30, 20)], ids=["t_", "resize_"])
def test_it_lies_as_it_does(operation):
    state = quantize(torch.ones(20, 30), quantized.SIGNED, (30, 1))
    before = state.memory.clone()
    with pytest.raises(RuntimeError, match="would change how a state in 8 bits lies"):
        operation(state)
    assert torch.equal(state.memory, before)


def test_dlpack():
    state = quantize(torch.randn(600, generator=torch.Generator().manual_seed(0)), quantized.SIGNED, (1,))
    assert torch.equal(torch.from_dlpack(state), state.dequantize())


def test_memory_that_is_part_of_a_programs_own():
    """Scales at an odd address cannot be read: the step copies the memory, bit for bit."""
    weight = torch.nn.Parameter(torch.ones(600))
    optimizer = fusedopt.SGD([weight], lr=0.1, momentum=0.5, state_dtype="8bit", backend="eager")
    weight.grad = torch.linspace(-1, 1, 600)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    (other,) = twin.param_groups[0]["params"]
    memory = optimizer.state[weight]["momentum_buffer"].memory
    room = torch.empty(len(memory) + 1, dtype=memory.dtype)
    room[1:] = memory
    optimizer.state[weight]["momentum_buffer"] = Quantized(room[1:], weight.shape, weight.stride(), False)
    for param, each in ((weight, optimizer), (other, twin)):
        param.grad = torch.ones(600)
        each.step()
    assert torch.equal(weight.detach(), other.detach())
