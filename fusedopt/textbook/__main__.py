"""Start the command line, or say what has to be installed for it."""

import sys

try:
    from .cli import main
except ModuleNotFoundError as error:
    package = str(error.name).partition(".")[0]
    if package not in ("matplotlib", "tabulate", "tqdm"):
        raise
    sys.exit(print(f"fusedopt.textbook needs {package}: pip install fusedopt[demo]", file=sys.stderr) or 2)

if __name__ == "__main__":
    sys.exit(main())
