"""Steps whose kernels are compiled for a GPU that is not there: the launches end before the device.

Runs in a process without TRITON_INTERPRET. Takes a class, its options and the dtypes of the parameters as JSON, and
prints as JSON how many steps there were, the name of every compiled kernel, how often it was launched, and how many
versions of it the runtime asked for: by `warmup` alone, and in the end. The tensors lie on the CPU; nobody reads
through their addresses.
"""

import json
import random
import sys
from collections import Counter

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import fusedopt
from fusedopt.engines import choice, tables
from fusedopt.step import hyper


class AbsentGPU:
    """What the launcher asks of a driver before it compiles."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


compiled = Counter()
launches = Counter()


def compile_only(kernel, programs, *args, **options):
    before = versions(kernel)
    name = kernel.warmup(*args, grid=(programs,), **options).metadata.name
    launches[name] += 1
    compiled[name] += versions(kernel) - before


def versions(kernel):
    return sum(len(caches[0]) for caches in kernel.device_caches.values())


def tensor(size, dtype, offset=0):
    """Of this size, `offset` elements behind a multiple of 16 bytes."""
    return torch.ones(size + offset, dtype=dtype)[offset:]


def parameters(sizes, dtypes):
    return [torch.nn.Parameter(tensor(size, dtype)) for size in sizes for dtype in dtypes]


def set_grads(optimizer):
    """Of some parameters, at some addresses."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for i, param in enumerate(params):
        missing = random.random() < 0.3 and i > 2
        param.grad = None if missing else tensor(param.numel(), param.dtype, random.choice([0, 1, 2, 8]))


def set_numbers(group, step):
    new = {
        "lr": torch.tensor(0.5**step) if isinstance(group["lr"], torch.Tensor) else 0.5**step,
        "betas": (0.5, 1 - 0.5**step),
        "momentum": 0.9 - 0.1 * step,
        "weight_decay": float(step),
        "seed": 2**64 - 1 >> 16 * step % 64,
        "max_grad_norm": 16.0 * step,
        "ema_decay": 1 - 0.5**step,
    }
    group.update({key: new[key] for key in new.keys() & group.keys()})


def main():
    name, options, dtypes = json.loads(sys.argv[1])
    dtypes = [getattr(torch, dtype) for dtype in dtypes]
    if options.pop("tensor_lr", False):
        options["lr"] = torch.tensor(0.1)
        hyper._number = lambda number, *_: number  # as if it were on the device
    driver.set_active(AbsentGPU())
    choice.triton_interprets = lambda: True  # lets tensors on the CPU through; signatures go on with a GPU's tiling
    tables.launch = compile_only

    def make(sizes):
        return getattr(fusedopt, name)(parameters(sizes, dtypes), backend="triton", **options)

    fusedopt.warmup(make([5]))
    ahead = dict(compiled)
    launches.clear()
    random.seed(0)
    steps = 0
    numbers = torch.tensor([0.0, 1.0, 2.0])
    for count in (1, 2, 3, 15, 16, 17, 33, 64, 200):
        optimizer = make(range(1, 1 + count))
        for step in range(6):
            for group in optimizer.param_groups:
                set_numbers(group, step)
            set_grads(optimizer)
            if step == 3:
                shared = {"max_grad_norm": optimizer.param_groups[0].get("max_grad_norm")}
                optimizer.add_param_group({"params": parameters([0, 1, 16, 4097, 70_000], dtypes), **shared})
                unaligned = torch.nn.Parameter(tensor(17, dtypes[0], offset=1))
                optimizer.add_param_group({"params": [unaligned], "weight_decay": 1, **shared})
                set_grads(optimizer)
            if step % 3 == 1:
                optimizer.grad_scale, optimizer.found_inf = numbers[2], numbers[count % 2]
            optimizer.step()
            optimizer.__dict__.pop("grad_scale", None)
            optimizer.__dict__.pop("found_inf", None)
            steps += 1
    print(json.dumps({"steps": steps, "ahead": ahead, "compiled": compiled, "launches": launches}))


if __name__ == "__main__":
    main()
