"""Optimizers for PyTorch that step in one pass over memory: drop-ins for `torch.optim`."""

from .backward import step_in_backward
from .full_state import full_state_dict
from .functional import register_functional_optim
from .optimizer import FusedOptimizer
from .rules.adadelta import Adadelta
from .rules.adagrad import Adagrad
from .rules.adam import Adam, AdamW
from .rules.adamax import Adamax
from .rules.asgd import ASGD
from .rules.lion import Lion
from .rules.muon import Muon
from .rules.muon_groups import muon_groups
from .rules.nadam import NAdam
from .rules.radam import RAdam
from .rules.rmsprop import RMSprop
from .rules.rprop import Rprop
from .rules.sgd import SGD
from .warming import warmup

__all__ = [
    "ASGD",
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "FusedOptimizer",
    "Lion",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "full_state_dict",
    "muon_groups",
    "register_functional_optim",
    "step_in_backward",
    "warmup",
]
__version__ = "0.2.0"
