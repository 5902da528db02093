"""Other launches, tried on a GPU: `python -m bench.tune`."""
