"""Work that is done once for all workers of pytest-xdist, whichever of them asks first."""

import fcntl
import os


def once(tmp_path_factory, name, make):
    """The text that `make` returns, given a folder that all workers share. One calls it, the others wait."""
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent
    result = directory / name
    with open(directory / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            result.write_text(make(directory))
    return result.read_text()
