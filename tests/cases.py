"""The one table of optimizers and options that tests and benchmarks share.

A new optimizer needs one or more rows here; every property test, compile check and benchmark then covers it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

import fusedopt


@dataclass(frozen=True)
class Case:
    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)
    in_torch: bool = True  # False for the options that torch.optim lacks

    @property
    def id(self) -> str:
        named = [key if value is True else f"{key}={value}" for key, value in self.options.items()]
        return "-".join([self.optimizer, *named]).replace(" ", "")

    @property
    def optimizer_class(self) -> type[fusedopt.FusedOptimizer]:
        return getattr(fusedopt, self.optimizer)

    def make(self, params: Any, **extra: Any) -> fusedopt.FusedOptimizer:
        return self.optimizer_class(params, **self.options, **extra)

    def make_torch(self, params: Any, **extra: Any) -> torch.optim.Optimizer:
        assert self.in_torch, f"torch.optim has no {self.id}"
        loop = {} if self.optimizer == "Muon" else {"foreach": False}
        return getattr(torch.optim, self.optimizer)(params, **self.options, **loop, **extra)


@dataclass(frozen=True)
class Mode:
    """A way to store low precision: the dtype of the parameters, and the options that every optimizer takes."""

    dtype: torch.dtype
    options: dict[str, Any]

    @property
    def id(self) -> str:
        named = [key if value is True else f"{key}={value}" for key, value in self.options.items()]
        return "-".join([str(self.dtype), *named]).replace("torch.", "")

    def asks_for_nothing(self, case: Case) -> bool:
        """Whether the options have nothing to act on, since the optimizer has no states, or none for 8 bits."""
        stateless = case.optimizer == "SGD" and not case.options.get("momentum")
        if self.options.get("state_dtype") == "8bit":
            centered = case.options.get("centered") and not case.options.get("momentum")
            stateless = stateless or case.optimizer in ("ASGD", "Rprop") or centered
        rounds_states_only = self.dtype == torch.float32 or {"master_weights", "kahan"} & self.options.keys()
        return bool(stateless and "rounding" in self.options and rounds_states_only)


def _rows(optimizer: str, *options: dict[str, Any], in_torch: bool = True) -> list[Case]:
    return [Case(optimizer, row, in_torch) for row in options]


DECOUPLED = {"decoupled_weight_decay": True}

CASES = [
    *_rows(
        "SGD",
        {"lr": 0.1},
        {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    ),
    *_rows(
        "SGD",
        {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1, "lr_in_momentum": True},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "lr_in_momentum": True},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.9, "zero_init_momentum": True},
        in_torch=False,
    ),
    *_rows(
        "Adagrad",
        {"lr": 0.1},
        {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.1, "lr_decay": 0.5, "initial_accumulator_value": 0.1, "weight_decay": 0.1},
    ),
    *_rows("Adagrad", {"lr": 0.1, "eps": 1e-6, "eps_in_sqrt": True}, in_torch=False),
    *_rows(
        "RMSprop",
        {"lr": 0.01},
        {"lr": 0.01, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1},
        {"lr": 0.01, "centered": True, "weight_decay": 0.1},
        {"lr": 0.01, "alpha": 0.9, "centered": True, "momentum": 0.1, "weight_decay": 0.1, "maximize": True},
    ),
    *_rows("RMSprop", {"lr": 0.01, "alpha": 0.9, "eps": 1e-6, "eps_in_sqrt": True}, in_torch=False),
    *_rows(
        "Adadelta",
        {"lr": 1.0},
        {"lr": 0.5, "rho": 0.95, "eps": 1e-5, "weight_decay": 0.1},
        {"lr": 1.0, "weight_decay": 0.1, "maximize": True},
    ),
    *_rows(
        "Adam",
        {"lr": 0.01},
        {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True},
        {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    *_rows(
        "AdamW",
        {"lr": 0.01},
        {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, "maximize": True},
    ),
    *_rows("AdamW", {"lr": 0.01, "weight_decay": 0.5, "weight_decay_form": "cautious"}, in_torch=False),
    *_rows(
        "NAdam",
        {"lr": 0.01},
        {"lr": 0.01, "weight_decay": 0.1, "momentum_decay": 0.1, "maximize": True},
        {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    *_rows(
        "NAdam",
        {"lr": 0.01, "weight_decay": 0.1, **DECOUPLED, "weight_decay_form": "fully_decoupled", "max_lr": 0.02},
        in_torch=False,
    ),
    *_rows(
        "RAdam",
        {"lr": 0.01},
        {"lr": 0.01, "betas": (0.8, 0.7), "eps": 1e-6, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.01, "betas": (0.9, 0.9), "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    *_rows(
        "RAdam",
        {"lr": 0.1, "weight_decay": 0.5, **DECOUPLED, "weight_decay_form": "cautious_corrected", "max_lr": 0.2},
        in_torch=False,
    ),
    *_rows(
        "Adamax",
        {"lr": 0.01},
        {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1, "maximize": True},
    ),
    *_rows(
        "ASGD",
        {"lr": 0.1},
        {"lr": 0.1, "lambd": 0.1, "alpha": 0.5, "t0": 1, "weight_decay": 0.1},
        {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
    ),
    *_rows(
        "Rprop",
        {"lr": 0.1},
        {"lr": 0.1, "etas": (0.3, 1.5), "step_sizes": (0.05, 0.2), "maximize": True},
    ),
    *_rows(
        "Lion",
        {"lr": 0.01},
        {"lr": 0.01, "betas": (0.8, 0.7), "weight_decay": 0.1, "maximize": True},
        {"lr": 0.01, "weight_decay": 0.1, "weight_decay_form": "cautious_fully_decoupled", "max_lr": 0.02},
        in_torch=False,
    ),
]

# Muon's matrices are no elements: its tests are tests/rules/test_muon.py and those in tests/matrices.
MATRIX_CASES = [
    *_rows(
        "Muon",
        {"lr": 0.02},
        {"lr": 0.02, "nesterov": False, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0},
        {"lr": 0.02, "momentum": 0.5, "ns_steps": 3, "eps": 1e-3},
    ),
    *_rows(
        "Muon",
        {"lr": 0.02, "ns_coefficients": "polar_express", "adjust_lr_fn": "spectral_unclamped"},
        {"lr": 0.02, "weight_decay": 0.5, "weight_decay_form": "cautious"},
        {"lr": 0.02, "use_muon": False},
        in_torch=False,
    ),
]

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

MODES = [
    Mode(BF16, {"state_dtype": FP32}),
    Mode(FP32, {"state_dtype": BF16}),
    Mode(BF16, {"master_weights": True}),
    Mode(BF16, {"master_weights": True, "state_dtype": FP32}),
    Mode(FP16, {"master_weights": True}),
    Mode(BF16, {"kahan": True}),
    Mode(BF16, {"kahan": True, "state_dtype": FP32}),
    Mode(FP16, {"kahan": True}),
    Mode(BF16, {"rounding": "stochastic"}),
    Mode(FP16, {"rounding": "stochastic"}),
    Mode(FP32, {"rounding": "stochastic", "state_dtype": BF16}),
    Mode(BF16, {"rounding": "stochastic", "master_weights": True}),
    Mode(BF16, {"rounding": "stochastic", "kahan": True}),
    Mode(FP32, {"state_dtype": "8bit"}),
    Mode(BF16, {"state_dtype": "8bit", "master_weights": True}),
    Mode(FP32, {"state_dtype": "8bit", "rounding": "stochastic"}),
    Mode(BF16, {"state_dtype": "8bit", "rounding": "stochastic"}),
]

# The average is one stream more.
AVERAGED = [
    Mode(FP32, {"ema_decay": 0.999}),
    Mode(BF16, {"ema_decay": 0.999}),
    Mode(BF16, {"ema_decay": 0.999, "master_weights": True}),
    Mode(BF16, {"ema_decay": 0.999, "kahan": True}),
    Mode(BF16, {"ema_decay": 0.999, "rounding": "stochastic"}),
]
