"""Start the command line, or say what has to be installed for it."""

import io
import sys

for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")  # where the console has no η, rather ? than an error

try:
    from .cli import main
except ModuleNotFoundError as error:
    package = str(error.name).partition(".")[0]
    if package not in ("matplotlib", "tabulate", "tqdm"):
        raise
    print(f"fusedopt.textbook needs {package}: pip install fusedopt[demo]", file=sys.stderr)
    sys.exit(2)

sys.exit(main())
