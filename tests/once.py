"""Work that is done once for all workers of pytest-xdist, whichever of them asks first."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path


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


def compiled_by(module, directory):
    """What a module prints that compiles Triton's kernels: in a process where these are not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(directory / f"{module}_triton_cache")}
    command = [sys.executable, "-m", module]
    root = Path(__file__).parents[1]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    assert "FP_FUSION" not in run.stderr  # Triton 3.9 warns of compilations that leave it to the default
    return run.stdout
