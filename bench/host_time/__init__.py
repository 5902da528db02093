"""How long `step()` keeps Python busy, and where: `python -m bench.host_time`."""
