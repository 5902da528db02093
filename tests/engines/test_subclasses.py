"""Parameters whose class holds another tensor, which in-place operations replace, as torchao's tutorial has them."""

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_map_only

from tests.cases import AVERAGED, FP32, MODES
from tests.twins import IN_TORCH, make

ATEN = torch.ops.aten


class Held(Tensor):
    """A tensor that is kept as the double of another one."""

    @staticmethod
    def __new__(cls, held):
        return Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)

    def __init__(self, held):
        self.held = held

    @classmethod
    def of(cls, tensor):
        return cls(tensor / 2)

    def whole(self):
        return self.held * 2

    def __repr__(self):
        return f"Held({self.held})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            return Linear.apply(*args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        if func is ATEN.detach.default:
            return cls(args[0].held)
        assert func is not ATEN.to.dtype, "an operation that autograd takes apart"
        whole = func(*tree_map_only(cls, cls.whole, args), **tree_map_only(cls, cls.whole, kwargs or {}))
        if not (isinstance(args[0], cls) and func.overloadpacket.__name__.endswith("_")):
            return whole
        args[0].held = whole / 2
        return args[0]


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, weight):
        ctx.save_for_backward(inputs, weight.held)
        return inputs @ weight.whole().T

    @staticmethod
    def backward(ctx, grad):
        inputs, held = ctx.saved_tensors
        return grad @ (held * 2), grad.T @ inputs


def trained(make, param, steps=3):
    """The weights after some steps, each with a backward pass through them."""
    optimizer = make([param])
    for step in range(steps):
        inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(step)).to(param.dtype)
        torch.nn.functional.linear(inputs, param).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def start(dtype=FP32):
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(9)).to(dtype)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("case", IN_TORCH, ids=lambda case: case.id)
def test_a_step_is_torchs(case):
    mine, theirs = Parameter(Held.of(start())), Parameter(start())
    trained(case.make, mine)
    trained(case.make_torch, theirs)
    torch.testing.assert_close(mine.detach().whole(), theirs.detach())


@pytest.mark.parametrize("mode", [*MODES, *AVERAGED], ids=lambda mode: mode.id)
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam"])
def test_a_step_with_low_precision_is_that_of_a_plain_tensor(name, mode):
    params = [Parameter(Held.of(start(mode.dtype))), Parameter(start(mode.dtype))]
    if "rounding" in mode.options:
        with pytest.raises(RuntimeError, match="it is a Held"):
            trained(lambda params: make(name, params, **mode.options), params[0])
        return
    options = {"backend": "eager", **mode.options}
    # A Held has no memory of its own: its states stay what they are.
    full = {key: value for key, value in options.items() if value != "8bit"}
    held, plain = (
        trained(lambda params: make(name, params, **options), param)  # noqa: B023
        for param, options in zip(params, (options, full), strict=True)
    )
    assert torch.equal(params[0].detach().held * 2, params[1].detach())
    states, expected = (dict(*optimizer.state.values()) for optimizer in (held, plain))
    assert states.keys() == expected.keys()
    for key, state in states.items():
        assert torch.equal(state, expected[key]), key


def test_a_parameter_of_another_kind_beside_it():
    params = Parameter(Held.of(start())), Parameter(start())
    optimizer = make("Adam", params)
    for _ in range(2):
        torch.nn.functional.linear(params[1].detach(), params[0]).square().sum().backward()
        params[1].grad = params[0].grad.clone()
        optimizer.step()
    torch.testing.assert_close(params[0].detach().whole(), params[1].detach())
    assert not params[0].held.is_inference()
