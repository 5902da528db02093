"""The command line: `python -m fusedopt.textbook trace | train | stability | average`."""

from __future__ import annotations

import argparse
import errno
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ..engines.choice import BACKENDS
from . import average, forms, report, stability, trace, train

PROGRAM = "python -m fusedopt.textbook"


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def number(allowed: Callable[[float], bool], words: str) -> Callable[[str], float]:
    """A finite number in the range that the words tell."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not allowed(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
        return value

    return parse


any_number = number(lambda value: True, "a finite number")
positive = number(lambda value: value > 0, "a positive number")
not_negative = number(lambda value: value >= 0, "a number of at least 0")
decay = number(lambda value: 0 <= value < 1, "a number from 0 to below 1")
short_decay = number(lambda value: 0 <= value <= 0.9999, "a number from 0 to 0.9999")


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def make_parser() -> Parser:
    """The four commands and their arguments."""
    description = "The optimization chapter of Dive into Deep Learning, run on fusedopt."
    codes = (
        "Exit code: 1 if something is not as it should be (a line not the book's, weights that drift), 2 for bad input."
    )
    parser = Parser(prog=PROGRAM, description=description, epilog=codes)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, module: object, summary: str) -> Callable[..., argparse.Action]:
        description = f"{summary} Writes textbook-{name}.png."
        sub = commands.add_parser(name, help=summary, description=description)
        sub.set_defaults(run=module.run, parser=sub)  # type: ignore[attr-defined]
        out = "folder for the picture, made if it is not there (default: %(default)s)"
        sub.add_argument("--out", type=Path, default=Path("textbook-out"), metavar="DIR", help=out)
        sub.add_argument("--json", action="store_true", help="print JSON and nothing else to stdout")
        return sub.add_argument

    def backend(add: Callable[..., argparse.Action]) -> None:
        words = "auto, eager, compiled, or triton: the kernels, in Triton's interpreter if TRITON_INTERPRET=1 is set"
        add("--backend", choices=BACKENDS, default="auto", help=words)

    def quadratic(add: Callable[..., argparse.Action], default_a: float | None, default_b: float | None) -> None:
        add("--a", type=positive, default=default_a, metavar="A", help="of f(x) = A x₁² + B x₂² (default: 0.1)")
        add("--b", type=positive, default=default_b, metavar="B", help="(default: 2)")

    add = command("trace", trace, "The book's runs in two dimensions: the lines that it prints, and the paths.")
    quadratic(add, 0.1, 2.0)
    names = list(forms.FORMS)
    add("--optimizer", choices=names, nargs="+", metavar="NAME", help=f"any of {', '.join(names)} (default: all)")
    add("--start", type=any_number, nargs=2, default=[-5.0, -2.0], metavar=("X1", "X2"), help="(default: -5 -2)")
    add("--steps", type=count, default=20, metavar="N", help="(default: 20)")
    add("--lr", type=not_negative, metavar="η", help="learning rate")
    add("--momentum", type=decay, metavar="β", help="of momentum")
    add("--alpha", type=decay, metavar="β", help="of RMSProp's average of squares (γ in some editions)")
    add("--rho", type=decay, metavar="ρ", help="of AdaDelta's averages")
    add("--beta1", type=decay, metavar="β₁", help="of Adam's average of gradients")
    add("--beta2", type=decay, metavar="β₂", help="of Adam's average of squares")
    add("--eps", type=not_negative, metavar="ε", help="what is added before a division")
    backend(add)

    add = command("train", train, "Linear regression on the airfoil data: losses over many seeds, beside torch.optim.")
    words = "the airfoil data (default: FUSEDOPT_AIRFOIL; without it a synthetic set)"
    add("--data", type=Path, default=os.environ.get("FUSEDOPT_AIRFOIL") or None, metavar="FILE", help=words)
    add("--seeds", type=count, default=20, metavar="N", help="how many seeds (default: %(default)s)")
    backend(add)

    add = command("stability", stability, "Ill-conditioning: largest stable learning rates, and a map of convergence.")
    quadratic(add, None, None)
    add("--eigenvalues", type=positive, nargs="+", metavar="λ", help="of the Hessian (default: those of f, 2A and 2B)")
    add("--momentum", type=short_decay, default=0.5, metavar="β", help="(default: %(default)s)")
    mapped = list(stability.MAPPED)
    add("--optimizer", choices=mapped, nargs="+", metavar="NAME", help=f"on the map: any of {', '.join(mapped)}")
    add("--steps", type=count, default=200, metavar="N", help="of each run on the map (default: %(default)s)")

    add = command("average", average, "Exponential moving averages: weights, effective window, bias correction.")
    default = [0.6, 0.9, 0.95, 0.999]
    add("--betas", type=short_decay, nargs="+", default=default, metavar="β", help="(default: 0.6 0.9 0.95 0.999)")
    return parser


def make_folder(path: Path) -> None:
    """Make the folder for the picture, before anything is computed for it."""
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def main(arguments: list[str] | None = None) -> int:
    """Run a command, and return its exit code."""
    options = make_parser().parse_args(arguments)
    try:
        make_folder(options.out)
        document, text, status = options.run(options)
    except OSError as error:
        options.parser.error(f"argument --out: cannot write {options.out}: {error.strerror or error}")
    except report.UsageError as error:
        options.parser.error(str(error))
    print(report.to_json(document) if options.json else f"{text}\n\nPicture: {document['figure']}")
    return int(status)
