"""Optimizers for PyTorch that step in one pass over memory: drop-ins for `torch.optim`."""

from .adadelta import Adadelta
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .adamax import Adamax
from .asgd import ASGD
from .backward import step_in_backward
from .lion import Lion
from .nadam import NAdam
from .optimizer import FusedOptimizer
from .radam import RAdam
from .rmsprop import RMSprop
from .rprop import Rprop
from .sgd import SGD
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
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "step_in_backward",
    "warmup",
]
__version__ = "0.1.0"
