"""A small transformer learns text with AdamW, its states in fp32, bf16 and 8 bits, here and in other libraries.

All runs of a seed begin with the same weights and get the same batches and the same clipping, so that the losses differ
by what is done to the states, and by rounding: how much that is, torch.optim's fp32 beside fusedopt's tells. Then for
each optimizer how many bytes its states take, counted in the memory in which they lie. Writes a table, a figure and
JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict

import fusedopt

from ..common import RESULTS, Parser, circumstances, default_device, file_name, usable_device, writable_folder
from ..steps.peers import version
from ..steps.shapes import GPT2
from ..transformer import find_text
from .report import draw, markdown
from .sizes import all_bytes, bytes_of_states
from .training import BATCH_SIZE, BETAS, CONTENDERS, HEADS, HYPER, LAYERS, MAX_GRAD_NORM, WIDTH, train_all

MOST_BYTES = 2.04  # a parameter of GPT-2 small, with AdamW's two states in 8 bits


def parse_arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m bench.eight_bits", description=__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=400, metavar="N", help="of each training (default: %(default)s)")
    add("--seeds", type=int, default=3, metavar="N", help="how often to train each (default: %(default)s)")
    add("--jobs", type=int, default=1, metavar="N", help="trainings at a time (default: %(default)s)")
    add("--device", type=usable_device, default=default_device(), help="where to train (default here: %(default)s)")
    out_help = "of table, JSON, PNG (default: %(default)s)"
    add("--out", type=writable_folder, default=RESULTS, metavar="DIR", help=out_help)
    options = parser.parse_args()
    for name in ("steps", "seeds", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"argument --{name}: must be at least 1")
    return options


def main() -> int:
    options = parse_arguments()
    result = circumstances("python -m bench.eight_bits", options.device)
    text = find_text()
    runs = train_all(text, options)
    result |= {
        "peers": {name: version(name) for name in dict.fromkeys(each.library for each in CONTENDERS[2:])},
        "model": {"width": WIDTH, "heads": HEADS, "layers": LAYERS, "parameters": runs[0].parameters},
        "text": {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()},
        "hyperparameters": HYPER,
        "betas": BETAS,
        "max_grad_norm": MAX_GRAD_NORM,
        "steps": options.steps,
        "batch_size": BATCH_SIZE,
        "seeds": options.seeds,
        "runs": [asdict(run) for run in runs],
        "bytes": all_bytes(),
        "gpt2": {
            "tensors": len(GPT2.sizes),
            "parameters": GPT2.elements,
            **bytes_of_states(fusedopt.AdamW, GPT2.sizes),
            "most": MOST_BYTES,
        },
    }
    path = options.out / f"eight-bits-{file_name(options.device)}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    table, figure = path.with_suffix(".md"), path.with_suffix(".png")
    table.write_text(markdown(result))
    draw(result, figure)
    print(f"\n{markdown(result)}\nTable: {table}, numbers: {path}, figure: {figure}")
    return 0
