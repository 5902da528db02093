"""Compiles every kernel for every target and prints what came out as JSON. Needs a process without TRITON_INTERPRET."""

import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

from cases import CASES, MODES

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.assembly import barriers
from bench.machine_code import DTYPES, TARGETS, compile_prepare, kernels_of, report, specializations

NUMBERS = [1, 2, 15, 16, 17, 2**31 - 1, 2**31, 2**40]


def compiled_for(kernel):
    """The targets: every one for the ordinary signatures; for the modes some, more for SGD and Adam than for others."""
    if kernel.dtypes in DTYPES:
        return list(TARGETS)
    few = kernel.dtypes in ("bfloat16-master_weights", "bfloat16-kahan", "bfloat16-rounding=stochastic")
    if kernel.optimizer.kernel in ("sgd", "adam"):
        return list(TARGETS) if few else ["sm_90"]
    return ["sm_90"] if few else []


def update_report(kernel, target):
    return asdict(report(kernel, target))


def prepare_report(kernel, target, hyper_tensors):
    code = compile_prepare(kernel, target, hyper_tensors=hyper_tensors)
    return {
        "name": code.name,
        "local_bytes": code.local_bytes,
        "shared_bytes": code.shared_bytes,
        "barriers": barriers(code),
    }


def main():
    kernels = kernels_of(CASES, MODES)
    rules = {kernel.optimizer.kernel: kernel for kernel in kernels}
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        updates = {(k.id, target): pool.submit(update_report, k, target) for k in kernels for target in compiled_for(k)}
        prepares = {
            (name, target, str(hyper_tensors)): pool.submit(prepare_report, kernel, target, hyper_tensors)
            for target in TARGETS
            for name, kernel in rules.items()
            for hyper_tensors in (False, True)
        }
        results = {" ".join(key): future.result() for key, future in {**updates, **prepares}.items()}
    results["specializations"] = {
        target: [specializations(kernels[0], target, number) for number in NUMBERS] for target in TARGETS
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
