"""Compiles kernels for the targets and prints what came out as JSON. Needs a process without TRITON_INTERPRET."""

import json
from dataclasses import asdict

from bench.static.cli import reports_of
from bench.static.kernels import DTYPES, SIGNATURES, SumSquares, prepares_of, unscaling, updates_of
from bench.static.machine_code import specialization
from bench.static.targets import TARGETS
from tests.cases import AVERAGED, CASES, MATRIX_CASES, MODES

TESTED = ["sm_80", "sm_90", "gfx942"]
EVERY_MODE = [*MODES, *AVERAGED]
HEAVIEST = ["bfloat16-rounding=stochastic", "bfloat16-ema_decay=0.999-master_weights"]  # most registers and streams
QUANTIZED = "float32-state_dtype=8bit"
MOMENTUM, ADAM, AMSGRAD = "sgd-momentum_buffer", "adam-exp_avg-exp_avg_sq", "adam-exp_avg-exp_avg_sq-max_exp_avg_sq"
NUMBERS = [1, 2, 15, 16, 17, 2**31 - 1, 2**31, 2**40]
UPDATES = updates_of([*CASES, *MATRIX_CASES], EVERY_MODE)
PREPARES = prepares_of(UPDATES)
UPDATES += unscaling(
    kernel
    for kernel in UPDATES
    if (kernel.rule == ADAM and kernel.dtypes in (*SIGNATURES, *HEAVIEST, QUANTIZED))
    or (kernel.rule == "sgd" and kernel.dtypes in SIGNATURES)
)
SQUARES = list(map(SumSquares, DTYPES))


def compiled_for(kernel):
    """The targets: all for the usual dtypes of SGD and Adam and what is heaviest of Adam; sm_90 for the other rules.

    A rule is the same text in every mode, and a mode the same for every rule. So the other rules are compiled in each
    dtype of the arithmetic, and rounding stochastically, which has the accesses of bf16 and more instructions; the
    other modes with SGD and Adam only, averages with the fewest and the most states. gfx942 has functions of its own
    and takes every rule once; sm_80 has those of sm_90. `bench.static` compiles everything for all targets.
    """
    if kernel.rule == "muon-exp_avg-exp_avg_sq":  # Adam's function
        return ["sm_90"] if kernel.dtypes == "fp32" else []
    usual, heaviest = kernel.dtypes in SIGNATURES, kernel.dtypes in (*HEAVIEST, QUANTIZED)
    if kernel.unscale:
        return (
            TESTED if kernel.dtypes in ("fp32", "bf16", HEAVIEST[0], QUANTIZED) and kernel.rule == ADAM else ["sm_90"]
        )
    if (kernel.rule in (ADAM, MOMENTUM) and usual) or (kernel.rule == ADAM and heaviest) or kernel.id == "sgd-fp32":
        return TESTED
    if kernel.dtypes in ("fp32", "fp64", HEAVIEST[0]):
        return ["sm_90", "gfx942"] if kernel.dtypes == "fp32" else ["sm_90"]
    some = ("sgd", AMSGRAD) if "ema_decay" in kernel.dtypes else ("sgd", MOMENTUM, ADAM, AMSGRAD)
    return ["sm_90"] if kernel.rule in some else []


def prepared_for(kernel):
    """The targets of a `prepare` that reads numbers of the host only: as the updates of its rule in fp32."""
    if kernel.hyper_tensors:
        return ["sm_90"]
    return TESTED if kernel.of.optimizer.kernel in ("adam", "sgd") else ["sm_90", "gfx942"]


def main():
    pairs = [(kernel, target) for kernel in UPDATES for target in compiled_for(kernel)]
    pairs += [(kernel, target) for target in TESTED for kernel in SQUARES]
    pairs += [(kernel, target) for kernel in PREPARES for target in prepared_for(kernel)]
    results = {f"{report.kernel} {report.target}": asdict(report) for report in reports_of(pairs, jobs=2)}
    results["specializations"] = {
        f"{kernel.id} {target}": [str(specialization(kernel, TARGETS[target], number)) for number in NUMBERS]
        for target in TESTED
        for kernel in (UPDATES[0], PREPARES[0], SQUARES[0])
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
