"""What the tests of training libraries train: a tiny network, with fusedopt.AdamW where torch.optim.AdamW was."""

import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import fusedopt
from tests.conftest import DEVICE
from tests.twins import assert_same, bits, params_of

# States of other dtypes, options and a counter that live in the param groups, random numbers that a resumed run draws.
OPTIONS = {"state_dtype": torch.bfloat16, "rounding": "stochastic", "seed": 3, "skip_nonfinite": True, "ema_decay": 0.9}
BATCHES = 6
OVERFLOW = 3  # the batch whose loss is infinite


def make_net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).to(DEVICE)


def make_loader():
    inputs, targets = torch.randn(2, 4 * BATCHES, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(inputs, targets[:, :2]), batch_size=4)


def loss_of(output, target, batch=None):
    return mse_loss(output.float(), target) * (torch.inf if batch == OVERFLOW else 1.0)


def make_scaler():
    return torch.amp.GradScaler(DEVICE, init_scale=2.0**10)


def mine(backend, **options):
    return lambda params: fusedopt.AdamW(params, lr=0.1, backend=backend, **options)


def muon(backend, **options):
    """Muon for matrices, and its AdamW for the others."""

    def make(params):
        params = list(params)
        matrices, others = (
            [param for param in params if (param.dim() > 1) == is_matrix] for is_matrix in (True, False)
        )
        groups = [{"params": matrices}, {"params": others, "use_muon": False}]
        return fusedopt.Muon(groups, lr=0.1, backend=backend, **options)

    return make


def theirs(params):
    return torch.optim.AdamW(params, lr=0.1, foreach=False)


def assert_trained_the_same(run, backend):
    """Train with both libraries, and compare the weights and the states.

    Args:
        run: trains with the optimizer that a function makes of parameters, and returns the optimizer.

    Returns:
        fusedopt's optimizer.
    """
    optimizers = run(mine(backend)), run(theirs)
    assert isinstance(optimizers[0], fusedopt.AdamW)
    assert_same(*optimizers)
    return optimizers[0]


def assert_nothing_lost(resumed, unbroken):
    """Everything that is saved, and the parameters, are the same bit for bit."""
    dicts = resumed.state_dict(), unbroken.state_dict()
    states = [{k: {name: bits(v) for name, v in state.items()} for k, state in d["state"].items()} for d in dicts]
    groups = [[{name: bits(v) for name, v in group.items()} for group in d["param_groups"]] for d in dicts]
    assert states[0] == states[1]
    assert groups[0] == groups[1]
    assert list(map(bits, params_of(resumed))) == list(map(bits, params_of(unbroken)))
