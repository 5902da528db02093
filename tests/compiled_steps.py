"""Steps whose kernels are compiled for a GPU that is not there: the launches end before the device.

Runs in a process without TRITON_INTERPRET. Takes options of the optimizer as JSON, and prints as JSON the name of every
compiled kernel and how many versions of each the runtime asked for: by `warmup` alone, and in the end. The tensors lie
on the CPU; nobody reads through their addresses.
"""

import json
import sys
from collections import Counter

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import fusedopt
from fusedopt import backend, tables


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
    name = kernel.warmup(*args, grid=(programs,), **options).metadata.name
    launches[name] += 1
    compiled[name] = sum(len(caches[0]) for caches in kernel.device_caches.values())


def parameters(sizes):
    params = [torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16)) for size in sizes]
    for param in params:
        param.grad = torch.ones_like(param)
    return params


def main():
    options = json.loads(sys.argv[1])
    driver.set_active(AbsentGPU())
    backend.triton_interprets = lambda: True  # lets tensors on the CPU through; tables.py goes on with a GPU's tiling
    tables.launch = compile_only

    fusedopt.warmup(fusedopt.AdamW(parameters([5]), backend="triton", **options))
    ahead = dict(compiled)
    launches.clear()
    numbers = torch.tensor([0.0, 1.0, 2.0])
    for count in (1, 2, 3, 15, 16, 17, 33, 200):
        params = parameters(range(count))
        optimizer = fusedopt.AdamW(params, lr=0.1 * count, backend="triton", **options)
        for step in range(6):
            optimizer.param_groups[0]["lr"] = 0.5**step
            optimizer.param_groups[0]["betas"] = (0.5, 1 - 0.5**step)
            optimizer.param_groups[0]["weight_decay"] = float(step)
            optimizer.param_groups[0]["seed"] = 2**64 - 1 >> 16 * step
            params[0].grad = None if step % 2 else torch.ones_like(params[0])
            if step == 3:
                optimizer.add_param_group({"params": parameters([1, 16, 4097])})
                unaligned = torch.nn.Parameter(torch.ones(18, dtype=torch.bfloat16)[1:])
                unaligned.grad = torch.ones_like(unaligned)
                optimizer.add_param_group({"params": [unaligned], "lr": 1})
            if step % 3 == 1:
                optimizer.grad_scale, optimizer.found_inf = numbers[2], numbers[step % 2]
            optimizer.step()
            optimizer.__dict__.pop("grad_scale", None)
            optimizer.__dict__.pop("found_inf", None)
    print(json.dumps({"ahead": ahead, "compiled": compiled, "launches": launches}))


if __name__ == "__main__":
    main()
