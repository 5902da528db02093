"""`python -m bench.host_time`."""

import sys

from .cli import main

sys.exit(main())
