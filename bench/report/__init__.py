"""Tables and figures of a result: `python -m bench.report FILE`."""
