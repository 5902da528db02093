"""Which dtypes belong together: of a complex number and its parts, of what is stored and the arithmetic on it."""

import torch
from torch import Tensor


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the parts."""
    return dtype.to_real() if dtype.is_complex else dtype


def scalar_dtype() -> torch.dtype:
    """The dtype in which torch.optim keeps a state that is one number."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def compute_dtype(param: Tensor) -> torch.dtype:
    """fp64 parameters are updated in fp64, all others in fp32."""
    return torch.float64 if real_dtype(param.dtype) == torch.float64 else torch.float32
