"""The checks of arguments that optimizers share, with torch's messages."""

from collections.abc import Sequence

from torch import Tensor


def check_lr(lr: float | Tensor) -> None:
    """Raise unless the learning rate is one number that is not negative."""
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")


def check_not_negative(**values: float | Tensor) -> None:
    """Raise for the first of the named values that is negative or NaN."""
    for name, value in values.items():
        if not value >= 0.0:
            raise ValueError(f"Invalid {name} value: {value}")


def lies_on_device(number: float | Tensor) -> bool:
    """Whether a number is a tensor that the host would wait for."""
    return isinstance(number, Tensor) and number.device.type != "cpu"


def check_betas(betas: Sequence[float | Tensor]) -> None:
    """Raise unless there are two betas in [0, 1)."""
    if len(betas) != 2:
        raise ValueError(f"betas must be two numbers: {betas}")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
