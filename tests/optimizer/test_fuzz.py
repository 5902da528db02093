"""Whatever happens between two steps, the next one does what torch.optim does.

More examples, other ones each time:

    FUSEDOPT_FUZZ_EXAMPLES=1000 pytest tests/optimizer/test_fuzz.py [--hypothesis-seed=N]
"""

import os
from collections import defaultdict
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import fusedopt
from fusedopt.options import KEYS
from fusedopt.storage.averaging import EMA
from fusedopt.storage.precision import KAHAN_COMP, MASTER_PARAM, kept_state, state_dtype
from fusedopt.storage.quantized_tensor import Quantized
from fusedopt.storage.states import ADDED
from tests import rounding_oracle
from tests.bounded import exact
from tests.cases import CASES, MATRIX_CASES, MODES
from tests.conftest import DEVICE
from tests.matrices.exact import exact_products  # noqa: F401
from tests.optimizer.fuzz_actions import ACTIONS, Actions, choose, lay
from tests.twins import ENGINES, bits

# One dimension, none, size 1, no elements; (3, 3) can be transposed at its address; full vectors and a tail.
SHAPES = [(3, 3), (3, 3), (4, 3), (2, 3, 2, 2), (17,), (), (1, 5), (0, 2)]
DTYPES = [torch.float64, torch.float64, torch.float32, torch.complex128]
# Of the largest element. fp64 decides; the twin of 16 bits is fp32, which leaves a few roundings.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
STEP = 1 / 14.9  # of the largest number in 8 bits
EXACT = {"step"}

EXAMPLES = int(os.environ.get("FUSEDOPT_FUZZ_EXAMPLES", "0"))  # of each case; 0 = always the same few


class Twins(Actions):
    """An optimizer of fusedopt and one of torch, on parameters, gradients and states of the same values.

    The twin is plain: memory of its own in the ordinary order, and fp32 in place of 16 bits, where torch would round
    after every operation.
    """

    shapes, dtypes = SHAPES, DTYPES

    def __init__(self, case, backend, draw, mode=None):
        self.case = case
        self.random = torch.Generator().manual_seed(0)
        self.dtypes = self.dtypes if mode is None else [mode.dtype]
        pairs = [self.new_pair(draw) for _ in range(draw(st.integers(1, 4)))]
        cut = draw(st.integers(0, len(pairs) - 1))
        groups = [pairs[:cut], pairs[cut:]] if cut else [pairs]
        options = {} if mode is None else mode.options
        self.ours = case.make([{"params": [p for p, _ in group]} for group in groups], backend=backend, **options)
        self.theirs = case.make_torch([{"params": [q for _, q in group]} for group in groups])

    def new_pair(self, draw):
        dtype = draw(st.sampled_from(self.dtypes))
        p = nn.Parameter(torch.empty(draw(st.sampled_from(self.shapes)), dtype=dtype, device=DEVICE))
        p.data = self.values(p)
        p.grad = self.values(p) if draw(st.sampled_from([True, True, True, False])) else None
        return p, nn.Parameter(p.detach().to(torch.promote_types(dtype, torch.float32), copy=True))

    def values(self, like):
        dtype = torch.complex128 if like.is_complex() else torch.float64
        return torch.randn(like.shape, dtype=dtype, generator=self.random).to(like.device, like.dtype)

    @property
    def groups(self):
        return list(zip(self.ours.param_groups, self.theirs.param_groups, strict=True))

    @property
    def pairs(self):
        return [pair for mine, true in self.groups for pair in zip(mine["params"], true["params"], strict=True)]

    def pick(self, draw):
        return choose(draw, self.pairs)

    def pick_alike(self, draw):
        """Two parameters that could change places; often the same one twice."""
        p, q = self.pick(draw)
        alike = [pair for pair in self.pairs if (pair[0].shape, pair[0].dtype) == (p.shape, p.dtype)]
        return (p, q), choose(draw, alike)

    def pick_state(self, draw):
        """A parameter and the name of one of its states; None where there is none yet."""
        p, q = self.pick(draw)
        names = sorted(self.ours.state.get(p, {}).keys() - {*self.ours.scalar_states})
        return p, q, draw(st.sampled_from(names)) if names else None

    def follow_dtype(self, p, q):
        """Convert the twin of a converted parameter, states and all: not every step of torch can mix dtypes."""
        if p.dtype != q.dtype:
            q.grad, q.data = None, lay(p).to(torch.promote_types(p.dtype, torch.float32))
            state = self.theirs.state.get(q, {})
            state.update({name: value.to(q.dtype) for name, value in state.items() if name in self.ours.states})

    def drop_of(self, optimizer, name):
        for state in optimizer.state.values():
            state.pop(name, None)

    def drop_states(self, name):
        self.drop_of(self.ours, name)
        self.drop_of(self.theirs, name)

    def forget_replaced(self):
        """Drop the states of parameters that are in no group any more: no state_dict can hold them."""
        for optimizer in (self.ours, self.theirs):
            known = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for owner in [owner for owner in optimizer.state if id(owner) not in known]:
                del optimizer.state[owner]

    def fill_in(self):
        """Give the twin the states with which fusedopt begins where torch raises KeyError."""
        for mine, true in self.groups:
            for q in true["params"]:
                state = self.theirs.state.get(q, {})
                state.update({k: torch.tensor(float(v)) for k, v in state.items() if k in self.ours.scalar_states})
                if q.grad is not None and self.case.optimizer != "SGD" and (state or self.case.optimizer == "Adagrad"):
                    fresh = {}
                    self.ours.init_state(q.detach(), fresh, mine)
                    plain = {k: v.dequantize() if isinstance(v, Quantized) else v for k, v in fresh.items()}
                    fresh.update({k: v.to(q.dtype) for k, v in plain.items() if k in self.ours.states})
                    fresh.update({k: torch.tensor(float(v)) for k, v in fresh.items() if k in self.ours.scalar_states})
                    self.theirs.state[q] = {**fresh, **state}

    def give_gradients(self):
        """Unscaled and clipped, in float64."""
        self.grads = [None if p.grad is None else lay(p.grad) for p, _ in self.pairs]
        factor = 1 / (getattr(self.ours, "grad_scale", None) or 1.0)
        max_grad_norm = self.ours.param_groups[0].get(KEYS["max_grad_norm"])
        if max_grad_norm is not None:
            factor *= min(1.0, max_grad_norm / (factor * self.norm() + 1e-6))
        for (_, q), grad in zip(self.pairs, self.grads, strict=True):
            q.grad = None if grad is None else grad.to(q.dtype) * factor

    def norm(self):
        """Of all gradients together, in float64."""
        grads = [lay(p.grad).to(torch.complex128) for p, _ in self.pairs if p.grad is not None]
        return float(sum(grad.abs().square().sum() for grad in grads)) ** 0.5

    @contextmanager
    def twin_decay(self):
        """In place of a form of weight decay that torch lacks, as much of the one that it has."""
        kept = [true.get("weight_decay") for _, true in self.groups]
        for mine, true in self.groups:
            form = mine.get("weight_decay_form", "standard")
            if form != "standard":
                true["weight_decay"] *= (1 if form == "fully_decoupled" else float(mine["lr"])) / float(mine["max_lr"])
        yield
        for (_, true), weight_decay in zip(self.groups, kept, strict=True):
            true.update({} if weight_decay is None else {"weight_decay": weight_decay})

    def value_of(self, p):
        """What a parameter stands for: of 16 bits, also what its rounding lost, as long as nobody has written it."""
        state = self.ours.state.get(p, {})
        group = next(group for group, _ in self.groups if any(p is param for param in group["params"]))
        name = kept_state(p, group)
        if name not in state:
            return p.detach()
        kept = rounding_oracle.with_kept(exact(p), {name: exact(state[name])}, p.dtype)
        return torch.from_numpy(kept.astype("float32")).to(p.device).reshape(p.shape)

    @torch.no_grad()
    def skipped_step(self):
        """A step of fusedopt alone, which leaves the parameters as they are; the next ones tell of the states."""
        self.give_gradients()
        before = [bits(p) for p, _ in self.pairs]
        self.ours.step()
        self.fill_in()
        assert [bits(p) for p, _ in self.pairs] == before

    def averages(self):
        """The average of each parameter, None where it has none, or one that has not begun."""
        states = [self.ours.state.get(p, {}) for p, _ in self.pairs]
        begun = self.ours._stepper.begun
        return [state[EMA].clone() if EMA in state and begun.get(state[EMA]) != 0 else None for state in states]

    def check_average(self, p, before, tolerance, what):
        """It has moved towards the parameter, or begun with it."""
        group = next(group for group, _ in self.groups if any(p is param for param in group["params"]))
        decay = group.get(KEYS["ema_decay"])
        if decay is not None:
            value = self.value_of(p)
            true = value if before is None else before + (1 - decay) * (value - before)
            assert_near(self.ours.state[p][EMA], true, value, tolerance, f"average of {what}")

    def check_gradient(self, p, scaled):
        """It is as it was, or unscaled, once."""
        scale = getattr(self.ours, "grad_scale", None)
        if scale is None:
            assert bits(lay(p.grad)) == bits(scaled), "the step wrote into a gradient"
        else:
            torch.testing.assert_close(lay(p.grad), scaled / scale)

    @torch.no_grad()
    def step(self, closure=None):
        """One step of each; then everything must be equal."""
        self.give_gradients()
        pairs = self.pairs
        for p, q in pairs:
            q.copy_(self.value_of(p))
        places = [(p.data_ptr(), p.stride(), p.dtype) for p, _ in pairs]
        versions = [p._version for p, _ in pairs]
        states = [self.ours.state.get(p, {}) for p, _ in pairs]
        averages = self.averages()
        dtypes = [{name: state[name].dtype for name in state.keys() & self.ours.states} for state in states]
        new_dtypes = [state_dtype(p, group) for group, _ in self.groups for p in group["params"]]
        assert self.ours.step(closure) == (closure and 1.5)
        self.fill_in()
        before = [{k: v.detach().clone() for k, v in {"": q, **self.theirs.state.get(q, {})}.items()} for _, q in pairs]
        with self.twin_decay():
            self.theirs.step()

        self.forget_replaced()
        mine, true = (
            {i: s.keys() - ADDED for i, s in o.state_dict()["state"].items() if s.keys() - ADDED}
            for o in (self.ours, self.theirs)
        )
        assert mine == true
        tolerances = self.tolerances()
        for i, (p, q) in enumerate(pairs):
            assert (p.data_ptr(), p.stride(), p.dtype) == places[i], "the step moved a parameter"
            if p.grad is not None:
                assert p._version > versions[i] or not p.numel(), "the step did not tell autograd"
                self.check_gradient(p, self.grads[i])
            near = tolerances[p.data_ptr()]
            if p.grad is not None and sum(p.data_ptr() == other.data_ptr() for other, _ in pairs) == 1:
                self.check_average(p, averages[i], near, f"parameter {i}")
            assert_near(self.value_of(p), q.detach(), before[i][""], near, f"parameter {i}")
            for name, true in self.theirs.state.get(q, {}).items():
                mine, what = self.ours.state[p][name], f"{name} of parameter {i}"
                if name in self.ours.states:
                    assert mine.shape == p.shape, what
                    is_quantized = isinstance(mine, Quantized)
                    assert mine.dtype == (torch.float32 if is_quantized else dtypes[i].get(name, new_dtypes[i])), what
                elif p.grad is not None:
                    assert mine.shape == (), what
                if name in EXACT:
                    assert float(mine) == true, what
                else:
                    near_state = max(near, STEP) if isinstance(mine, Quantized) else near
                    assert_near(mine, true, before[i].get(name), near_state, what)
        for mine, true in self.groups:
            for key in true.keys() - {"params", "foreach"}:
                assert mine[key] == true[key], key
        self.meet()

    def tolerances(self):
        """By the address of a parameter, since two may share it: that of the coarsest tensor in its update.

        Of a parameter that stands twice, the second update takes a state that the first has coded in 8 bits.
        """
        tolerances = defaultdict(float)
        for p, q in self.pairs:
            states = [value for name, value in self.ours.state.get(p, {}).items() if name not in EXACT]
            coarsest = max(TOLERANCE[tensor.dtype.to_real()] for tensor in (self.value_of(p), q, *states))
            times = sum(p is other for other, _ in self.pairs)
            if times > 1 and any(isinstance(state, Quantized) for state in states):
                coarsest = times * STEP
            tolerances[p.data_ptr()] = max(coarsest, tolerances[p.data_ptr()])
        return tolerances

    @torch.no_grad()
    def meet(self):
        """Go on from the same values, in place: errors do not add up, and a stale address still shows."""
        for p, q in self.pairs:
            if self.ours.state.get(p, {}).keys() & {MASTER_PARAM, KAHAN_COMP}:
                q.copy_(self.value_of(p))
            else:
                q.copy_(p.copy_(q))
            for name, value in self.theirs.state.get(q, {}).items():
                if name != "step":
                    value.copy_(self.ours.state[p][name].copy_(value))


class MatrixTwins(Twins):
    """The same for Muon, with products in fp64 on both sides."""

    shapes, dtypes = [(3, 3), (3, 3), (4, 3), (8, 16), (1, 5), (0, 2)], [torch.float64]


def assert_near(mine, true, before, tolerance, what):
    values = true if before is None else torch.stack([true, before])
    scale = values.abs().max().item() if values.numel() else 0.0
    smallest = torch.finfo(mine.dtype).tiny * torch.finfo(mine.dtype).eps
    mine, near = mine.to(true.dtype), {"rtol": 0, "atol": tolerance * scale + smallest, "equal_nan": True}
    if mine.shape != true.shape or not torch.allclose(mine, true, **near):  # a fraction of the time of assert_close
        torch.testing.assert_close(mine, true, **near, msg=lambda message: f"{what}: {message}")


def fuzz(case, backend, draw, mode=None, kind=Twins):
    # In debug mode no plan is used twice, so half of the examples go without.
    with patch.object(fusedopt.plan, "DEBUG", draw(st.booleans(), label="debug")):
        twins = kind(case, backend, draw, mode)
        for _ in range(draw(st.integers(1, 6), label="rounds")):
            for _ in range(draw(st.integers(1, 3), label="actions")):
                getattr(twins, draw(st.sampled_from(ACTIONS)))(draw)
            for _ in range(draw(st.integers(1, 3), label="steps")):
                twins.step()


IN_TORCH = [case for case in CASES if case.in_torch]
in_torch = pytest.mark.parametrize("case", IN_TORCH, ids=lambda case: case.id)


def budget(examples):
    return settings(
        max_examples=EXAMPLES or examples // len(IN_TORCH),
        derandomize=not EXAMPLES,  # and yet different for each case
        print_blob=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=set(Phase) - {Phase.explain},
    )


engines = st.sampled_from(ENGINES)


@in_torch
@budget(500)
@given(data=st.data())
def test_equals_torch(case, data):
    fuzz(case, data.draw(engines), data.draw)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("case", [case for case in MATRIX_CASES if case.in_torch], ids=lambda case: case.id)
@budget(500)
@given(data=st.data())
def test_matrices_equal_torch(case, data):
    fuzz(case, data.draw(engines), data.draw, kind=MatrixTwins)


every_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.id)


def cases_of(mode):
    return st.sampled_from([case for case in IN_TORCH if not mode.asks_for_nothing(case)])


@every_mode
@budget(200)
@given(data=st.data())
def test_equals_torch_in_every_mode(mode, data):
    fuzz(data.draw(cases_of(mode)), data.draw(engines), data.draw, mode)
