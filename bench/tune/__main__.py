"""`python -m bench.tune`."""

import sys

from .cli import main

sys.exit(main())
