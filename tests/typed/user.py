"""What a type checker tells users of this package: `make lint` runs it as if the package were installed."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from typing_extensions import assert_type

import fusedopt
from fusedopt.backward import StepInBackward

model = torch.nn.Linear(20, 1)
optimizer = fusedopt.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0, state_dtype=torch.bfloat16)
assert_type(optimizer, fusedopt.AdamW)
number = torch.tensor(0.1)
fusedopt.AdamW(model.parameters(), weight_decay=number, betas=(number, number), weight_decay_form="cautious")
fusedopt.Muon(fusedopt.muon_groups(model), momentum=number, ns_coefficients="polar_express", split=[10, 10])
fusedopt.SGD(model.parameters(), momentum=number, skip_grad_norm=number, ema_decay=number)
assert_type(optimizer.grad_norm, Tensor | None)
assert_type(optimizer.skipped_steps, Tensor)
assert_type(optimizer.swap_ema(), AbstractContextManager[None])
optimizer.step()
torch.optim.lr_scheduler.StepLR(optimizer, 10)
assert_type(fusedopt.step_in_backward(model, lambda params: fusedopt.SGD(params, lr=0.1)), StepInBackward)

fusedopt.warmup(model)  # type: ignore[arg-type]
fusedopt.AdamW(model.parameters(), learning_rate=1e-3)  # type: ignore[call-arg]
fusedopt.AdamW(model.parameters(), kahan="yes")  # type: ignore[arg-type]
