"""Compiles every kernel for every target and prints what came out as JSON. Needs a process without TRITON_INTERPRET."""

import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from cases import AVERAGED, CASES, MODES

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.assembly import accesses, barriers, loops
from bench.machine_code import (
    DTYPES,
    TARGETS,
    compile_prepare,
    compile_sum_squares,
    kernels_of,
    report,
    specializations,
)

EVERY_MODE = [*MODES, *AVERAGED]
GRADIENTS = ["float64", "float32", "bfloat16", "float16"]
NUMBERS = [1, 2, 15, 16, 17, 2**31 - 1, 2**31, 2**40]


def compiled_for(kernel):
    """The targets: every one for the ordinary signatures; for the modes some, more for SGD and Adam than for others."""
    if kernel.dtypes in DTYPES:
        return list(TARGETS)
    few = kernel.dtypes in ("bfloat16-master_weights", "bfloat16-kahan", "bfloat16-rounding=stochastic")
    averaged = kernel.dtypes in ("float32-ema_decay=0.999", "bfloat16-ema_decay=0.999-master_weights")
    if kernel.optimizer.kernel in ("sgd", "adam"):
        return list(TARGETS) if few or averaged else ["sm_90"]
    return ["sm_90"] if few or averaged else []


def update_report(kernel, target):
    return asdict(report(kernel, target))


def prepare_report(kernel, target, hyper_tensors):
    return memory_report(compile_prepare(kernel, target, hyper_tensors=hyper_tensors))


def squares_report(grad, target):
    code = compile_sum_squares(getattr(torch, grad), target)
    found = [{f"{access} {width}": n for (access, width), n in accesses(loop).items()} for loop in loops(code)]
    return {**memory_report(code), "loops": found}


def memory_report(code):
    return {
        "name": code.name,
        "local_bytes": code.local_bytes,
        "shared_bytes": code.shared_bytes,
        "barriers": barriers(code),
    }


def main():
    kernels = kernels_of(CASES, EVERY_MODE)
    rules = {kernel.optimizer.kernel: kernel for kernel in kernels}
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        updates = {(k.id, target): pool.submit(update_report, k, target) for k in kernels for target in compiled_for(k)}
        prepares = {
            (name, target, str(hyper_tensors)): pool.submit(prepare_report, kernel, target, hyper_tensors)
            for target in TARGETS
            for name, kernel in rules.items()
            for hyper_tensors in (False, True)
        }
        squares = {
            ("sum_squares", grad, target): pool.submit(squares_report, grad, target)
            for target in TARGETS
            for grad in GRADIENTS
        }
        results = {" ".join(key): future.result() for key, future in {**updates, **prepares, **squares}.items()}
    results["specializations"] = {
        target: [specializations(kernels[0], target, number) for number in NUMBERS] for target in TARGETS
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
