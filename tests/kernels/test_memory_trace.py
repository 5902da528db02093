"""One pass over memory: what a step reads and writes, byte for byte, as Triton's interpreter sees it."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

import fusedopt.engines.tables
from fusedopt.engines.signature import Signature
from fusedopt.storage.quantized_tensor import Quantized
from fusedopt.storage.states import create_states
from tests.cases import AVERAGED, CASES, MATRIX_CASES, MODES, Case

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="traces the interpreter, the GPU runs the kernels")

BLOCK_SIZE = 4 * 4096  # the interpreter's time goes by the number of blocks
# Several programs, two blocks and a bit, one element, less than a vector, nothing, a whole number of vectors.
SIZES = (100_003, BLOCK_SIZE + 9, 1, 7, 0, 64)
# Parameter, gradient and states.
DTYPES = {
    "fp32": (torch.float32, torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "bf16-fp32states": (torch.bfloat16, torch.bfloat16, torch.float32),
    "fp32-bf16grad": (torch.float32, torch.bfloat16, torch.float32),
}


@dataclass
class Accesses:
    """Address and width of every element that was loaded, or stored, in any order."""

    addresses: list[np.ndarray] = field(default_factory=list)
    widths: list[np.ndarray] = field(default_factory=list)

    def add(self, ptrs, mask):
        addresses = np.broadcast_to(ptrs.data, np.shape(mask.data))[np.asarray(mask.data, dtype=bool)]
        self.addresses.append(addresses.astype(np.int64))
        self.widths.append(np.full(addresses.size, ptrs.get_element_ty().primitive_bitwidth // 8))

    def sort(self):
        addresses, widths = np.concatenate(self.addresses), np.concatenate(self.widths)
        order = np.argsort(addresses)
        self.addresses, self.widths = addresses[order], widths[order]

    def take(self, tensor, times=1):
        """Remove what went to a dense tensor; whether that was each of its elements so often, no byte more."""
        first, size = tensor.data_ptr(), tensor.element_size()
        inside = slice(*np.searchsorted(self.addresses, [first, first + tensor.nbytes]))
        each = np.arange(first, first + tensor.nbytes, size).repeat(times)
        as_often = np.array_equal(self.addresses[inside], each) and bool((self.widths[inside] == size).all())
        self.addresses, self.widths = np.delete(self.addresses, inside), np.delete(self.widths, inside)
        return as_often


@dataclass
class Trace:
    """The accesses of the kernels, and the tables that they were given."""

    loads: Accesses = field(default_factory=Accesses)
    stores: Accesses = field(default_factory=Accesses)
    tables: list[torch.Tensor] = field(default_factory=list)


@pytest.fixture
def traced_step(monkeypatch):
    """Makes a step of an optimizer and returns its trace. Accesses without a mask have a mask of ones here."""
    from triton.runtime.interpreter import interpreter_builder as builder

    load, store, launch = builder.create_masked_load, builder.create_masked_store, fusedopt.engines.tables.launch

    def step(optimizer):
        trace = Trace()

        def traced_load(ptrs, mask, *rest):
            trace.loads.add(ptrs, mask)
            return load(ptrs, mask, *rest)

        def traced_store(ptrs, value, mask, *rest):
            trace.stores.add(ptrs, mask)
            return store(ptrs, value, mask, *rest)

        def traced_launch(kernel, programs, *args, **options):
            trace.tables += [arg for arg in args if isinstance(arg, torch.Tensor)]
            launch(kernel, programs, *args, **options)

        monkeypatch.setattr(builder, "create_masked_load", traced_load)
        monkeypatch.setattr(builder, "create_masked_store", traced_store)
        monkeypatch.setattr(fusedopt.engines.tables, "launch", traced_launch)
        tiling = property(lambda signature: (BLOCK_SIZE, 2 * BLOCK_SIZE))
        monkeypatch.setattr(Signature, "tiling", tiling)
        optimizer.step()
        trace.loads.sort()
        trace.stores.sort()
        return trace

    return step


def distinct_cases():
    """The first case of every rule and set of states."""
    found = {}
    for case in [*CASES, MATRIX_CASES[0]]:
        optimizer = case.make([torch.zeros(1, 1)])
        group = optimizer.param_groups[0]
        used = tuple(optimizer.uses(name, group) for name in optimizer.states)
        found.setdefault((optimizer.kernel, used), case)
    return list(found.values())


def shifted(size, dtype):
    """Numbers that begin one element after a multiple of 16 bytes."""
    return torch.rand(size + 1, dtype=dtype)[1:]


def parameters(dtype, grad_dtype):
    """As the allocator lays them, all but the first also with an unaligned gradient, and themselves unaligned."""
    params = []
    for make, make_grad in ((torch.rand, torch.rand), (torch.rand, shifted), (shifted, torch.rand)):
        for size in SIZES if make is make_grad else SIZES[1:]:
            param = torch.nn.Parameter(make(size, dtype=dtype))
            if grad_dtype != dtype:
                param.grad_dtype = None
            param.grad = make_grad(size, dtype=grad_dtype)
            params.append(param)
    return params


def as_matrix(param):
    """The same memory. That of a direction is a batch's for the even ones."""
    shape = (8, -1) if param.numel() % 64 == 0 and param.numel() else (1, param.numel())
    matrix = torch.nn.Parameter(param.detach().view(shape))
    matrix.grad_dtype = param.grad_dtype
    matrix.grad = param.grad.view(shape)
    return matrix


def with_states(case, param_dtype, grad_dtype, **options):
    """An optimizer whose states are there, so that a step reads and writes what every later one does."""
    params = parameters(param_dtype, grad_dtype)
    params = list(map(as_matrix, params)) if case in MATRIX_CASES else params
    optimizer = case.make(params, backend="triton", **options)
    for param in params:
        create_states(optimizer, param, optimizer.state[param], optimizer.param_groups[0])
    return optimizer, params


def states_of(optimizer):
    """And the numbers that say whether they have begun."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    values = [value for value in (*states, *optimizer._stepper.begun.values()) if isinstance(value, torch.Tensor)]
    return [stored for value in values for stored in (parts_of(value) if isinstance(value, Quantized) else [value])]


def directions_of(optimizer):
    """What the first update of Muon's matrices writes, and the second one reads."""
    return getattr(optimizer._stepper.plan._step, "_slots", [])


def parts_of(state):
    """The codes, and after as many bytes as make a multiple of 16 the scales."""
    return [state.memory[: state.numel()], state.memory[-(-state.numel() // 16) * 16 :].view(torch.float32)]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("case", distinct_cases(), ids=lambda case: case.id)
def test_every_byte_once(traced_step, case, dtypes):
    param_dtype, grad_dtype, state_dtype = DTYPES[dtypes]
    other_dtype = {"state_dtype": state_dtype} if state_dtype != param_dtype else {}
    check_every_byte(traced_step, *with_states(case, param_dtype, grad_dtype, **other_dtype))


@pytest.mark.parametrize("mode", [*MODES, *AVERAGED], ids=lambda mode: mode.id)
def test_every_byte_once_in_every_mode(traced_step, mode):
    check_every_byte(traced_step, *with_states(Case("AdamW"), mode.dtype, mode.dtype, **mode.options))


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}], ids=str)
def test_gradients_twice_where_they_decide(traced_step, options):
    check_every_byte(traced_step, *with_states(Case("AdamW"), torch.float32, torch.bfloat16, **options), grads=2)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_gradients_are_written_once_where_they_are_unscaled(traced_step, dtypes):
    param_dtype, grad_dtype, state_dtype = DTYPES[dtypes]
    optimizer, params = with_states(Case("AdamW"), param_dtype, grad_dtype, state_dtype=state_dtype)
    optimizer.grad_scale = torch.tensor(65536.0)
    check_every_byte(traced_step, optimizer, params, unscales=True)


def test_a_skipped_step_reads_gradients_only(traced_step):
    optimizer, params = with_states(Case("AdamW"), torch.float32, torch.float32, skip_nonfinite=True, ema_decay=0.9)
    params[0].grad[-1] = float("nan")
    optimizer.grad_scale = torch.tensor(65536.0)
    trace = traced_step(optimizer)
    assert all(trace.loads.take(param.grad) for param in params)
    for tensor in [*params, *states_of(optimizer), *(param.grad for param in params)]:
        for accesses in (trace.loads, trace.stores):
            before = accesses.addresses.size
            accesses.take(tensor)
            assert accesses.addresses.size == before


def check_every_byte(traced_step, optimizer, params, grads=1, unscales=False):
    """Each stream is read and written once, but gradients read `grads` times, and written if the step unscales."""
    trace = traced_step(optimizer)
    written = [*params, *states_of(optimizer)]
    directions = directions_of(optimizer)

    total = trace.loads.widths.sum() + trace.stores.widths.sum()
    assert all(trace.loads.take(tensor) for tensor in written)
    assert all(trace.loads.take(param.grad, times=grads) for param in params)
    assert all(trace.stores.take(tensor) for tensor in [*written, *directions])
    # Here also what they overwrite is loaded. Nobody uses it, so that machine code does without: `bench.static` counts.
    assert all(trace.loads.take(direction, times=2) for direction in directions)
    assert all(trace.stores.take(param.grad) for param in params if unscales)
    tables = trace.loads.widths.sum() + trace.stores.widths.sum()
    for table in trace.tables:
        trace.loads.take(table)
        trace.stores.take(table)
    assert trace.loads.addresses.size == trace.stores.addresses.size == 0, "neither a stream nor a table"

    tables += sum(2 * tensor.nbytes for tensor in states_of(optimizer) if tensor.dim() == 0)
    print(f"{100 * tables / total:.2f} % of {total} bytes are tables and 0-d states")
    assert tables < 0.02 * total


def test_parameters_without_a_gradient_are_not_touched(traced_step):
    optimizer, params = with_states(CASES[-1], torch.float32, torch.float32)
    params[0].grad = None
    trace = traced_step(optimizer)
    for tensor in (params[0], *optimizer.state[params[0]].values()):
        for accesses in (trace.loads, trace.stores):
            before = accesses.addresses.size
            accesses.take(tensor)
            assert accesses.addresses.size == before
