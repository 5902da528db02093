"""What surrounds a step: gradients are unscaled and clipped, weights averaged. Here in the step, in torch around it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.cases import Case

from .compare import Check, Makers, Params, Setting
from .machine import Machine
from .peers import FOREACH, FUSED, OURS, Contender, Groups

SCALE = 1024.0
MAX_GRAD_NORM = 1.0
EMA_DECAY = 0.999
CASE = Case("AdamW", {"lr": 0.01, "max_grad_norm": MAX_GRAD_NORM, "ema_decay": EMA_DECAY})


class ScaledGradients:
    """Gradients as a scaled loss leaves them, to be put back after unscaling and clipping have written into them."""

    def __init__(self) -> None:
        self._saved: list[Tensor] = []

    def put_back(self, params: Params) -> None:
        """At the first time the gradients are not scaled yet."""
        if not self._saved:
            self._saved = [param.grad * SCALE for param in params]
        for param, saved in zip(params, self._saved, strict=True):
            param.grad.copy_(saved)


def pipeline_makers(machine: Machine) -> Makers:
    gradients = ScaledGradients()
    return {
        OURS: partial(in_the_step, gradients=gradients, backend=machine.backend),
        FUSED: lambda groups: by_torch(groups, gradients, fused=True)[0],
        FOREACH: lambda groups: by_torch(groups, gradients, foreach=True)[0],
    }


def in_the_step(groups: Groups, gradients: ScaledGradients, backend: str) -> Contender:
    """GradScaler hands its scale over; fusedopt does the rest."""
    optimizer = CASE.make(groups, backend=backend)
    params = _params(optimizer)
    scaler = _scaler(params)

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    return Contender(optimizer, step, partial(gradients.put_back, params), is_one_pass=False)


def by_torch(groups: Groups, gradients: ScaledGradients, **options: bool) -> tuple[Contender, AveragedModel]:
    """The calls of torch's documentation, one after the other."""
    optimizer = torch.optim.AdamW(groups, lr=CASE.options["lr"], **options)
    params = _params(optimizer)
    scaler = _scaler(params)
    model = nn.ParameterList(params)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))

    def step() -> None:
        scaler.unscale_(optimizer)
        clip_grad_norm_(params, MAX_GRAD_NORM)
        scaler.step(optimizer)
        scaler.update()
        averaged.update_parameters(model)

    return Contender(optimizer, step, partial(gradients.put_back, params), is_one_pass=False), averaged


def same_pipeline(setting: Setting, params: Params) -> Check:
    """Whether parameters and averages are torch's."""
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    for ours, theirs in zip(params, copies, strict=True):
        theirs.grad = ours.grad.clone()
    contender, averaged = by_torch([{"params": copies}], ScaledGradients(), foreach=True)
    contender.prepare()
    contender.step()

    def check(contender: Contender) -> None:
        averages = [contender.optimizer.state[param]["ema"] for param in params]
        for ours, theirs in ((params, copies), (averages, list(averaged.module))):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

    return check


def _params(optimizer: torch.optim.Optimizer) -> Params:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _scaler(params: Params) -> torch.amp.GradScaler:
    device = params[0].device
    scaler = torch.amp.GradScaler(device.type, init_scale=SCALE)
    scaler.scale(torch.zeros((), device=device))  # which makes its tensors
    return scaler
