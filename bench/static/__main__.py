"""`python -m bench.static`."""

import sys

from .cli import main

sys.exit(main())
