"""What a user may do between two steps, done to an optimizer of fusedopt beside its twin of torch.optim.

An action that leaves every value as it is (other memory, a checkpoint, a copy) is done to fusedopt alone, one that
changes a value to both. The twin takes the gradients of fusedopt's parameters just before a step.
"""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR

import fusedopt
from fusedopt.options import COUNTERS, KEYS, SHARED
from fusedopt.storage.quantized_tensor import Quantized
from fusedopt.storage.states import ADDED
from tests.twins import snapshot

NUMBERS = {
    "lr": [0.01, 0.05, 0.2],
    "weight_decay": [0.0, 0.05, 0.2],
    "momentum": [0.0, 0.5, 0.9],
    "dampening": [0.0, 0.5],
    "eps": [1e-6, 1e-3],
    "alpha": [0.9, 0.95],
    "rho": [0.9, 0.5],
    "lr_decay": [0.0, 0.1],
    "betas": [(0.9, 0.99), (0.5, 0.9)],
    "maximize": [False, True],
    "nesterov": [False, True],
    "amsgrad": [False, True],
    "centered": [False, True],
}
MEMORIES = ["fresh", "transposed", "channels_last", "gaps", "unaligned"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def lay(tensor, memory="fresh"):
    """The values of a tensor in other memory."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if memory == "transposed":
        order = tuple(reversed(range(tensor.dim())))
        return tensor.permute(order).clone(memory_format=torch.contiguous_format).permute(order)
    if memory == "channels_last" and tensor.dim() == 4:
        return tensor.clone(memory_format=torch.channels_last)
    if memory == "gaps":
        return tensor.new_zeros(*tensor.shape, 2)[..., 1].copy_(tensor)
    if memory == "unaligned":
        return tensor.new_zeros(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    if memory == "lazy":
        return tensor.conj_physical().conj() if tensor.is_complex() else torch._neg_view(-tensor)
    return tensor.clone(memory_format=torch.contiguous_format)


def choose(draw, items):
    """One of them, told in the log of a failure by its index."""
    return items[draw(st.integers(0, len(items) - 1))]


def any_memory(draw, *more):
    return draw(st.sampled_from([*MEMORIES, *more]))


class Actions:
    """Each method is one action; `draw` takes its choices from hypothesis."""

    # Gradients.

    def new_gradient(self, draw):
        p, _ = self.pick(draw)
        p.grad = lay(self.values(p), any_memory(draw))

    def new_gradients(self, draw):
        for p, _ in self.pairs:
            p.grad = self.values(p)

    def reborn_gradient(self, draw):
        p, _ = self.pick(draw)
        p.grad = None
        p.grad = self.values(p)

    def lazy_gradients(self, draw):
        """Gradients with the conjugate or the negative bit, as backward makes them."""
        for p, _ in self.pairs:
            p.grad = lay(self.values(p), "lazy")

    def expanded_gradient(self, draw):
        p, _ = self.pick(draw)
        p.grad = self.values(p.new_empty(())).expand(p.shape)

    def gradient_in_place(self, draw):
        p, _ = self.pick(draw)
        if p.grad is not None and 0 not in p.grad.stride():
            p.grad.copy_(self.values(p))

    def gradient_moved(self, draw):
        p, _ = self.pick(draw)
        if p.grad is not None:
            p.grad.data = lay(p.grad, any_memory(draw))

    def gradient_turned(self, draw):
        """Other strides at the same address."""
        p, _ = self.pick(draw)
        if p.grad is not None and p.shape == (3, 3):
            p.grad.t_()

    def no_gradient(self, draw):
        self.pick(draw)[0].grad = None

    def shared_gradient(self, draw):
        (p, _), (other, _) = self.pick_alike(draw)
        p.grad = other.grad = self.values(p)

    def zero_grad(self, draw):
        for p, _ in self.pairs:
            if p.grad is not None and 0 in p.grad.stride():
                p.grad = lay(p.grad).to(p.dtype)
        self.ours.zero_grad(set_to_none=draw(st.booleans()))

    def requires_grad(self, draw):
        self.pick(draw)[0].requires_grad_(draw(st.booleans()))

    # Parameters. What gives one new memory ends its sharing memory with another, also for the twin.

    def param_moved(self, draw):
        p, q = self.pick(draw)
        p.data, q.data = lay(p, any_memory(draw)), q.data.clone()

    def param_set(self, draw):
        p, q = self.pick(draw)
        with torch.no_grad():
            p.set_(lay(p, any_memory(draw)))
        q.data = q.data.clone()

    def param_turned(self, draw):
        p, q = self.pick(draw)
        if p.shape == (3, 3):
            p.data, q.data = p.data.t(), q.data.t()

    def param_edited(self, draw):
        p, q = self.pick(draw)
        values = self.values(p)
        p.data.copy_(values)
        q.data.copy_(values)

    def params_share_memory(self, draw):
        (p, q), (other, twin) = self.pick_alike(draw)
        if p.dtype == q.dtype:  # the twin of a 16-bit parameter does not round between the two updates
            p.data, q.data = other.data, twin.data

    def storage_resized(self, draw):
        p, _ = self.pick(draw)
        storage, values = p.untyped_storage(), lay(p)
        size = storage.nbytes()
        storage.resize_(0)
        storage.resize_(size)
        p.data.copy_(values)

    def param_swapped_for_new(self, draw):
        p, q = self.pick(draw)
        new = nn.Parameter(lay(p, any_memory(draw)))
        new.grad = self.values(p)
        torch.utils.swap_tensors(p, new)
        q.data = q.data.clone()

    def params_swapped(self, draw):
        (p, q), (other, twin) = self.pick_alike(draw)
        if p is not other:
            torch.utils.swap_tensors(p, other)
            q.data, twin.data = twin.data, q.data

    def module_to_dtype(self, draw):
        """The states stay as they are."""
        convert = draw(st.sampled_from(["half", "bfloat16", "float", "double"]))
        getattr(nn.ParameterList([p for p, _ in self.pairs]), convert)()
        for p, q in self.pairs:
            self.follow_dtype(p, q)

    def data_to_dtype(self, draw):
        """The gradient stays as it is too."""
        p, q = self.pick(draw)
        if not p.is_complex():
            p.data = p.data.to(draw(st.sampled_from(DTYPES)))
            self.follow_dtype(p, q)

    # Groups.

    def param_replaced(self, draw):
        mine, true = choose(draw, self.groups)
        i = choose(draw, range(len(mine["params"])))
        mine["params"][i], true["params"][i] = self.new_pair(draw)

    def param_appended(self, draw):
        mine, true = choose(draw, self.groups)
        for group, p in zip((mine, true), self.new_pair(draw), strict=True):
            group["params"].append(p)

    def param_appended_twice(self, draw):
        mine, true = choose(draw, self.groups)
        i = choose(draw, range(len(mine["params"])))
        if self.case.optimizer != "SGD":  # torch's would begin with a buffer for each
            mine["params"].append(mine["params"][i])
            true["params"].append(true["params"][i])

    def param_removed(self, draw):
        mine, true = choose(draw, self.groups)
        if len(mine["params"]) > 1:
            i = choose(draw, range(len(mine["params"])))
            del mine["params"][i], true["params"][i]

    def params_reversed(self, draw):
        for group in choose(draw, self.groups):
            group["params"].reverse()

    def group_added(self, draw):
        options = {key: draw(st.sampled_from(NUMBERS[key])) for key in ("lr", "weight_decay")}
        for optimizer, p in zip((self.ours, self.theirs), self.new_pair(draw), strict=True):
            shared = {key: value for key, value in optimizer.param_groups[0].items() if key in map(KEYS.get, SHARED)}
            optimizer.add_param_group({"params": [p], **options, **shared})

    def group_boundary_moved(self, draw):
        """The parameters of all groups, one after the other, stay as they are."""
        i = choose(draw, range(len(self.groups)))
        for groups in (self.ours.param_groups, self.theirs.param_groups):
            before, after = groups[i - 1]["params"], groups[i]["params"]
            if i and len(before) > 1 and not any(p is before[-1] for p in before[:-1]):
                after.insert(0, before.pop())

    def groups_reversed(self, draw):
        self.ours.param_groups.reverse()
        self.theirs.param_groups.reverse()

    # Hyperparameters.

    def number_changed(self, draw):
        mine, true = choose(draw, self.groups)
        key = draw(st.sampled_from(sorted(NUMBERS.keys() & true.keys())))
        mine[key] = true[key] = draw(st.sampled_from(NUMBERS[key]))
        if key == "centered":  # an old mean beside newer squares would make the variance negative
            self.drop_states("grad_avg")

    def betas_edited_in_place(self, draw):
        groups = choose(draw, self.groups)
        for group in groups:
            if "betas" in group:
                group["betas"] = list(group["betas"])
        self.step()
        for group in groups:
            if "betas" in group:
                group["betas"][0] *= 0.9

    def tensor_lr(self, draw):
        before, after = (draw(st.sampled_from(NUMBERS["lr"])) for _ in range(2))
        groups = choose(draw, self.groups)
        for group in groups:
            group["lr"] = torch.tensor(before, dtype=torch.float64)  # torch rounds 1 - lr * weight_decay to its dtype
        self.step()
        for group in groups:
            group["lr"].fill_(after)

    def scheduled(self, draw):
        schedulers = [ExponentialLR(optimizer, 0.9) for optimizer in (self.ours, self.theirs)]
        self.step()
        for scheduler in schedulers:
            scheduler.step()

    # States.

    def state_moved(self, draw):
        p, _, name = self.pick_state(draw)
        if name:
            self.ours.state[p][name] = lay(self.ours.state[p][name], any_memory(draw, "lazy"))

    def state_data(self, draw):
        p, _, name = self.pick_state(draw)
        if name:
            self.ours.state[p][name].data = lay(self.ours.state[p][name], any_memory(draw))

    def states_turned(self, draw):
        p, q = self.pick(draw)
        if p.shape == (3, 3):
            for name in self.ours.state.get(p, {}).keys() & self.ours.states:
                if not isinstance(self.ours.state[p][name], Quantized):  # which refuses to be turned in place
                    self.ours.state[p][name].t_()
                    self.theirs.state[q][name].t_()

    def state_edited(self, draw):
        p, q, name = self.pick_state(draw)
        if name in self.ours.states:
            factor = 0.5 if name == "grad_avg" else 2
            self.ours.state[p][name].mul_(factor)
            self.theirs.state[q][name].mul_(factor)

    def states_swapped(self, draw):
        for optimizer, p, other in zip((self.ours, self.theirs), *self.pick_alike(draw), strict=True):
            if p in optimizer.state and other in optimizer.state:
                optimizer.state[p], optimizer.state[other] = optimizer.state[other], optimizer.state[p]

    def state_cleared(self, draw):
        self.ours.state.clear()
        self.theirs.state.clear()

    def state_of_one_cleared(self, draw):
        p, q = self.pick(draw)
        if p in self.ours.state:
            self.ours.state[p].clear()
            self.theirs.state[q].clear()

    def state_of_one_gone(self, draw):
        p, q = self.pick(draw)
        self.ours.state.pop(p, None)
        self.theirs.state.pop(q, None)

    def one_state_gone(self, draw):
        p, _, name = self.pick_state(draw)
        if name not in self.ours.always:
            self.drop_states(name)
        elif p.grad is not None:
            before, gone = snapshot(self.ours), self.ours.state[p].pop(name)
            with pytest.raises(RuntimeError, match=f"has no '{name}'"):
                self.ours.step()
            self.ours.state[p][name] = gone
            assert snapshot(self.ours)["params"] == before["params"]

    def step_as_others_save_it(self, draw):
        p, _ = self.pick(draw)
        if "step" in self.ours.state.get(p, {}):
            step = int(self.ours.state[p]["step"])
            forms = [step, float(step), torch.tensor(step), torch.tensor([float(step)]), torch.tensor(step).double()]
            self.ours.state[p]["step"] = draw(st.sampled_from(forms))

    def step_edited(self, draw):
        p, q = self.pick(draw)
        if isinstance(self.ours.state.get(p, {}).get("step"), torch.Tensor):
            self.ours.state[p]["step"].fill_(7)
            self.theirs.state[q]["step"].fill_(7)

    # What comes around the step.

    def clipped(self, draw):
        self.set_option("max_grad_norm", draw(st.sampled_from([None, 0.5, 5.0, 1e4])))

    def averaged(self, draw):
        self.set_option("ema_decay", draw(st.sampled_from([None, 0.0, 0.5, 0.999])))

    def set_option(self, name, value):
        for group, _ in self.groups:
            group[KEYS[name]] = value

    def scaled(self, draw):
        """As GradScaler leaves the optimizer; None where it has unscaled already."""
        self.ours.grad_scale = draw(st.sampled_from([None, 0.5, 3.0]))
        self.ours.found_inf = 0.0
        self.step()
        del self.ours.grad_scale, self.ours.found_inf

    def overflowed(self, draw):
        """Skipped, unless that would create states which the twin lacks."""
        if self.case.optimizer == "SGD" or all(self.theirs.state.get(q) for p, q in self.pairs if p.grad is not None):
            self.ours.found_inf = 1.0
            self.skipped_step()
            del self.ours.found_inf

    def too_long(self, draw):
        """Skipped for the norm of its gradients, unless that would create states which the twin lacks."""
        norm = self.norm()
        begun = all(self.theirs.state.get(q) for p, q in self.pairs if p.grad is not None)
        if norm > 0 and (self.case.optimizer == "SGD" or begun):
            self.set_option("skip_grad_norm", draw(st.sampled_from([0.0, norm / 2, torch.tensor(norm / 2)])))
            self.skipped_step()
        self.set_option("skip_grad_norm", draw(st.sampled_from([None, 1e9])))

    def decayed_in_another_form(self, draw):
        group, _ = choose(draw, self.groups)
        if "weight_decay_form" in self.ours.optional and group.get("decoupled_weight_decay", True):
            group["weight_decay_form"] = draw(st.sampled_from(["standard", "fully_decoupled", "corrected"]))
            group["max_lr"] = draw(st.sampled_from([None, 0.1, 0.4]))

    def evaluated_with_averages(self, draw):
        before = snapshot(self.ours)
        if any(group.get(KEYS["ema_decay"]) is not None for group, _ in self.groups):
            with self.ours.swap_ema(), pytest.raises(RuntimeError, match="step within swap_ema"):
                self.ours.step()
        assert snapshot(self.ours) == before

    # The whole optimizer.

    def loaded_from_itself(self, draw):
        self.forget_replaced()
        state_dict = self.ours.state_dict()
        self.ours.load_state_dict(copy.deepcopy(state_dict) if draw(st.booleans()) else state_dict)

    def loaded_from_a_file(self, draw):
        self.forget_replaced()
        file = io.BytesIO()
        torch.save(self.ours.state_dict(), file)
        file.seek(0)
        self.ours.load_state_dict(torch.load(file, weights_only=True))

    def loaded_from_torch(self, draw):
        self.forget_replaced()
        self.ours.load_state_dict(self.theirs.state_dict())

    def loaded_into_torch(self, draw):
        self.forget_replaced()
        if not all(self.ours.state.values()):  # torch's Adagrad refuses an empty state
            return
        self.theirs.load_state_dict(copy.deepcopy(fusedopt.full_state_dict(self.ours)))
        for group in self.theirs.param_groups:
            group["foreach"] = False
            for key in (*KEYS.values(), *COUNTERS, *self.ours.optional):
                group.pop(key, None)
        for name in ADDED:
            self.drop_of(self.theirs, name)

    def copied(self, draw):
        pickled = draw(st.booleans())
        self.ours = pickle.loads(pickle.dumps(self.ours)) if pickled else copy.deepcopy(self.ours)
        for p, q in self.pairs:
            p.grad = self.values(p)  # a copy has none
            q.data = q.data.clone()

    def step_with_closure(self, draw):
        def closure():
            self.new_gradients(draw)
            self.give_gradients()
            return 1.5

        self.step(closure)


ACTIONS = [name for name in vars(Actions) if not name.startswith("_") and name != "set_option"]
