"""Muon's products in fp64, so that nothing but rounding in fp64 stands between an implementation and its oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.optim import _muon

import fusedopt
from fusedopt.matrices import batches


def zeropower(grad: Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float) -> Tensor:
    """What torch.optim.Muon does with a matrix, but in fp64."""
    a, b, c = ns_coefficients
    x = grad.double() / grad.double().norm().clamp(min=eps)
    for _ in range(ns_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both Muons multiply in fp64."""
    monkeypatch.setattr(batches, "DTYPE", torch.float64)
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", zeropower)


def stepped_by_torch(
    params: list[Tensor], grads: list[list[Tensor | None]], options: dict[str, object]
) -> list[tuple[Tensor, Tensor | None]]:
    """The parameters, and their momenta, after torch.optim.Muon has stepped copies of them with these gradients."""
    copies = [torch.nn.Parameter(param.detach().clone()) for param in params]
    options = dict(options)
    adjust_lr_fn = options.get("adjust_lr_fn")
    optimizers = []
    for param in copies:
        if adjust_lr_fn == "spectral_unclamped":  # torch 2.15 has it
            rows, columns = param.shape
            lr = float(options["lr"])  # type: ignore[arg-type]
            scaled = {**options, "adjust_lr_fn": "original", "lr": lr}
            if rows < columns:
                ratio = (rows / columns) ** 0.5
                scaled |= {"lr": lr * ratio, "weight_decay": float(options.get("weight_decay", 0.1)) / ratio}  # type: ignore[arg-type]
            optimizers.append(torch.optim.Muon([param], **scaled))  # type: ignore[arg-type]
        else:
            optimizers.append(torch.optim.Muon([param], **options))  # type: ignore[arg-type]
    for of_step in grads:
        for param, grad, optimizer in zip(copies, of_step, optimizers, strict=True):
            param.grad = None if grad is None else grad.clone()
            optimizer.step()
    return [
        (param, optimizer.state[param].get("momentum_buffer"))
        for param, optimizer in zip(copies, optimizers, strict=True)
    ]


def step(optimizer: fusedopt.FusedOptimizer, params: list[Tensor], grads: list[list[Tensor | None]]) -> None:
    for of_step in grads:
        for param, grad in zip(params, of_step, strict=True):
            param.grad = None if grad is None else grad.clone()
        optimizer.step()
